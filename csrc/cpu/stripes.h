// Maps whose channels lie side by side, in tasks of some channels of an image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../feature_map.h"

namespace auglocal {

// A task's rows run along its channels; of few channels, several positions that lie together make one row.
struct Stripes {
  static constexpr int64_t kWidth = 64, kRow = 256;

  int64_t width, number, repeats;

  // Of `map` and another of its shape, which may be the same.
  Stripes(const FeatureMap& map, const FeatureMap& other)
      : width(std::min(kWidth, map.channels)), number((map.channels + width - 1) / width), repeats(1) {
    const bool packed = map.stride_p == map.channels && other.stride_p == map.channels;
    if (packed && number == 1) repeats = std::min(std::max<int64_t>(1, kRow / width), map.positions);
  }

  int64_t size() const { return repeats * width; }
};

}  // namespace auglocal

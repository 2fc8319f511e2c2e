// Maps whose channels lie side by side, in tasks of some channels of an image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../feature_map.h"

namespace auglocal {

// A task's rows run along its channels; of few channels, several positions that lie together make one row.
struct Stripes {
  static constexpr int64_t kRow = 256;  // elements that are enough for a row

  int64_t width, number, repeats;

  // Of `map` and another of its shape, which may be the same, at most `most` channels a task.
  Stripes(const FeatureMap& map, const FeatureMap& other, int64_t most)
      : width(std::min(most, map.channels)), number((map.channels + width - 1) / width), repeats(1) {
    const bool packed = map.stride_p == map.channels && other.stride_p == map.channels;
    if (packed && number == 1) repeats = std::min(std::max<int64_t>(1, kRow / width), map.positions);
  }

  // Channels of a map that is met once, and of one that is met twice while a task's part is in the cache.
  static constexpr int64_t kOnce = 512;
  static int64_t twice(const FeatureMap& map) {
    constexpr int64_t kElements = 131072;
    return std::clamp<int64_t>(kElements / map.positions, 32, 256);
  }

  int64_t size() const { return repeats * width; }
};

}  // namespace auglocal

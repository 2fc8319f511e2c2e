// A feature map as rows: what the loops of the CPU providers run over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "../batch_norm_act_host.h"
#include "../feature_map.h"

namespace auglocal {

// Whether the elements of a map lie together in the order (N, P, C).
inline bool is_packed(const FeatureMap& map) {
  return map.stride_c == 1 && (map.positions == 1 || map.stride_p == map.channels) &&
         (map.images == 1 || map.stride_n == map.positions * map.channels);
}

// Whether the planes of an image lie together in the order (C, P).
inline bool has_planes(const FeatureMap& map) {
  return (map.positions == 1 || map.stride_p == 1) && (map.channels == 1 || map.stride_c == map.positions);
}

inline const FeatureMap* pointer(const std::optional<FeatureMap>& map) {
  return map ? &*map : nullptr;
}

// Rows along the positions, one for each image and channel; or along the channels, one for each image and
// position. Of maps with few channels, several of the latter that lie together make one, in which the
// channels repeat.
struct Grid {
  static constexpr int64_t kRow = 256;  // elements that are enough for a row

  bool channels;
  int64_t images, width, positions;
  int64_t repeats;     // rows in one, where they run along the channels
  int64_t rows, size;  // how many, and the elements of each but perhaps the last

  // Rows that suit `map`: the result, whose elements lie together, where there is one. The others may be
  // null.
  Grid(const FeatureMap& map, std::initializer_list<const FeatureMap*> others)
      : channels(map.positions == 1 || (map.stride_c == 1 && map.channels > 1)),
        images(map.images),
        width(map.channels),
        positions(map.positions),
        repeats(1) {
    bool packed = channels && is_packed(map);
    for (const auto* other : others) packed = packed && (!other || is_packed(*other));
    if (packed) repeats = std::clamp<int64_t>(kRow / width, 1, images * positions);
    rows = channels ? (images * positions + repeats - 1) / repeats : images * width;
    size = channels ? repeats * width : positions;
  }

  // Elements of a row.
  int64_t count(int64_t row) const {
    return repeats == 1 ? size : std::min(size, (images * positions - row * repeats) * width);
  }
};

// Small planes, of several channels side by side, as rows: one plane would be too short a row.
struct Planes {
  static constexpr int64_t kSmall = 256;   // positions that a small plane has fewer than
  static constexpr int64_t kRow = 1024;    // elements that are enough for a row
  static constexpr int64_t kChunk = 1024;  // positions whose sums are one task

  int64_t images, width, positions;
  int64_t blocks, of_block, of_task;  // rows of an image, channels of a row, images of a task

  explicit Planes(const Grid& grid) : images(grid.images), width(grid.width), positions(grid.positions) {
    of_block = std::clamp<int64_t>(kRow / positions, 1, width);
    of_task = std::clamp<int64_t>(kChunk / positions, 1, images);
    blocks = (width + of_block - 1) / of_block;
  }

  static bool suit(const Grid& grid, const FeatureMap& map, std::initializer_list<const FeatureMap*> others) {
    bool all = !grid.channels && grid.positions < kSmall && has_planes(map);
    for (const FeatureMap* other : others) all = all && (!other || has_planes(*other));
    return all;
  }

  int64_t parts() const { return (images + of_task - 1) / of_task; }
  int64_t tasks() const { return parts() * blocks; }
  int64_t size() const { return of_block * positions; }
};

// One of them: some channels of some images.
struct PlanesTask {
  int64_t part, image, last_image, channel, channels, size;

  PlanesTask(const Planes& planes, int64_t task)
      : part(task / planes.blocks),
        image(part * planes.of_task),
        last_image(std::min(planes.images, image + planes.of_task)),
        channel(task % planes.blocks * planes.of_block),
        channels(std::min(planes.of_block, planes.width - channel)),
        size(channels * planes.positions) {}
};

}  // namespace auglocal

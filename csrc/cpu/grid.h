// A feature map as rows: what the loops of the CPU providers run over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <optional>

#include "../batch_norm_act_host.h"
#include "../feature_map.h"
#include "level.h"

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

// Some elements of some rows.
struct Task {
  int64_t first_row, last_row;  // up to the latter, as everywhere
  int64_t first, last;          // elements of each row
  int64_t part;                 // which of the tasks that sum up a channel
};

// A row has the elements of one channel at all positions of an image; or those of all channels at one
// position, and of maps with few channels at several that lie together, a multiple of kLanes; or, where
// planes are small, all elements of an image.
struct Grid {
  enum class Row { kPlane, kPositions, kImage };

  static constexpr int64_t kSmall = 256;     // positions that a small plane has fewer than
  static constexpr int64_t kWide = 256;      // channels that are a row long enough
  static constexpr int64_t kBlock = 1024;    // elements of an image's row that are a task's
  static constexpr int64_t kTask = 1 << 15;  // elements of a task, about

  Row row;
  int64_t images, channels, positions;
  int64_t repeats;                     // positions of a row, where it has all channels
  int64_t rows, size;                  // how many, and the elements of each but perhaps the last
  int64_t rows_of_task, size_of_task;  // how many rows of a task, and of which the elements are so many

  // Rows that suit `map`: the result, whose elements lie together, where there is one. The others may be
  // null.
  Grid(const FeatureMap& map, std::initializer_list<const FeatureMap*> others)
      : row(Row::kPlane), images(map.images), channels(map.channels), positions(map.positions), repeats(1) {
    const auto all = [&](bool (*has)(const FeatureMap&)) {
      return has(map) && std::all_of(others.begin(), others.end(),
                                     [&](const FeatureMap* other) { return !other || has(*other); });
    };
    if (positions == 1 || (map.stride_c == 1 && channels > 1)) {
      row = Row::kPositions;
      if (channels < kWide && all(is_packed))
        repeats = std::min<int64_t>(kLanes / std::gcd<int64_t>(channels, kLanes), images * positions);
      size = size_of_task = channels * repeats;
      rows = (images * positions + repeats - 1) / repeats;
      rows_of_task = std::max<int64_t>(1, kTask / (size * kRun)) * kRun;
    } else if (positions < kSmall && all(has_planes)) {
      row = Row::kImage;
      size = channels * positions;
      size_of_task = std::clamp<int64_t>(kBlock / positions, 1, channels) * positions;
      rows = images;
      rows_of_task = kRun;
    } else {
      rows = images * channels;
      size = size_of_task = positions;
      rows_of_task = 1;
    }
  }

  // Whether an element's place in its row says which channel it is of.
  bool many_channels() const { return row != Row::kPlane; }

  // Tasks that sum up a channel.
  int64_t parts() const { return row == Row::kPlane ? images : (rows + rows_of_task - 1) / rows_of_task; }
  int64_t blocks() const { return (size + size_of_task - 1) / size_of_task; }
  int64_t tasks() const { return row == Row::kPlane ? rows : parts() * blocks(); }
  int64_t elements_of_task() const { return rows_of_task * size_of_task; }

  Task task(int64_t index) const {
    if (row == Row::kPlane) return {index, index + 1, 0, size, index / channels};
    const int64_t part = index / blocks(), begin = index % blocks() * size_of_task;
    return {part * rows_of_task, std::min(rows, (part + 1) * rows_of_task), begin,
            std::min(size, begin + size_of_task), part};
  }

  // Elements of a row.
  int64_t count(int64_t at) const {
    return repeats == 1 ? size : std::min(size, (images * positions - at * repeats) * channels);
  }

  // Of a task whose rows have many channels: calls f(first row, last row, elements) for runs of at most kRun
  // rows of the same length.
  template <typename F>
  void for_runs(const Task& task, const F& f) const {
    for (int64_t from = task.first_row; from < task.last_row;) {
      int64_t to = std::min(task.last_row, from + kRun);
      if (to - from > 1 && count(to - 1) != size) --to;
      f(from, to, std::min(task.last, count(from)) - task.first);
      from = to;
    }
  }

  // Of the same: calls f(channel, first element, step, last element) for those of its elements that are a
  // channel's, counted from the task's first.
  template <typename F>
  void for_channels(const Task& task, const F& f) const {
    if (row == Row::kPositions) {
      for (int64_t c = 0; c < channels; ++c) f(c, c, channels, size);
    } else {
      for (int64_t i = task.first; i < task.last; i += positions)
        f(i / positions, i - task.first, int64_t{1}, i - task.first + positions);
    }
  }
};

}  // namespace auglocal

// The rows of a map, kLanes elements at a time. For `each_level.h`.
#include "lane_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Where rows begin, and how far apart their elements are.
struct RowPlaces {
  int64_t outer, stride_n, stride_outer, stride;

  RowPlaces(const FeatureMap& map, const Grid& grid)
      : outer(1), stride_n(map.stride_n), stride_outer(0), stride(grid.size == 1 ? 1 : map.stride_p) {
    if (grid.row == Grid::Row::kImage) return;
    const bool channels = grid.row == Grid::Row::kPositions;
    outer = channels ? map.positions : map.channels;
    stride_outer = channels ? map.stride_p : map.stride_c;
    if (channels && grid.size > 1) stride = map.stride_c;
    // Most maps need no division.
    if (grid.repeats > 1 || outer == 1 || map.images == 1 || stride_n == outer * stride_outer) {
      stride_n = grid.repeats > 1 ? grid.size : outer == 1 ? stride_n : stride_outer;
      outer = 1;
    }
  }

  int64_t operator()(int64_t row) const {
    return outer == 1 ? row * stride_n : row / outer * stride_n + row % outer * stride_outer;
  }
};

// The rows of a map. A run of them is looked up at a time.
template <typename T>
class Rows {
 public:
  Rows(const FeatureMap& map, const Grid& grid) : data_(map.tensor.const_data_ptr<T>()), place_(map, grid) {}

  // Rows first, ..., last - 1 are the ones that `read` counts from now on.
  void start(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) run_[row - first] = data_ + place_(row);
  }

  // Whether the elements of a row lie side by side.
  bool dense() const { return place_.stride == 1; }

  // kLanes elements of a row from the i-th on as numbers. Of n of them; the others are made zeros.
  template <typename Number, typename Real>
  void read(int64_t row, int64_t i, Number n, Real* __restrict__ to) const {
    read_lanes(run_[row] + i * place_.stride, place_.stride, n, to);
  }

 private:
  const T* data_;
  RowPlaces place_;
  const T* run_[kRun];
};

// The rows of a map that is written to. Their elements lie side by side, as `empty_map` lays them.
template <typename T>
class Results {
 public:
  Results(const FeatureMap& map, const Grid& grid)
      : data_(map.tensor.mutable_data_ptr<T>()), place_(map, grid) {
    STD_TORCH_CHECK(place_.stride == 1, "expected a result whose rows lie together");
  }

  void start(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) run_[row - first] = data_ + place_(row);
  }

  // Writes n elements from the i-th on, of kLanes numbers.
  template <typename Number, typename Real>
  void write(const Real* __restrict__ from, int64_t row, int64_t i, Number n) const {
    write_lanes(from, n, run_[row] + i);
  }

 private:
  T* data_;
  RowPlaces place_;
  T* run_[kRun];
};

// Numbers of each channel for the elements of a task, side by side.
template <typename Real, size_t kNumber>
class TaskFactors {
 public:
  using Pointers = std::array<const Real*, kNumber>;

  TaskFactors(const Grid& grid, const Pointers& of_channel) : grid_(grid), of_channel_(of_channel) {
    if (!grid.many_channels()) return;
    const int64_t size = whole_lanes(grid.size_of_task);
    memory_.resize(kNumber * size, 0);
    for (size_t k = 0; k < kNumber; ++k) of_element_[k] = memory_.data() + k * size;
    if (grid.row == Grid::Row::kPositions) spread(grid.task(0));
  }

  // Those of the elements of a task, or of its only channel.
  const Pointers& operator()(const Task& task) {
    if (grid_.row == Grid::Row::kImage) spread(task);
    if (grid_.row == Grid::Row::kPlane)
      for (size_t k = 0; k < kNumber; ++k) of_element_[k] = of_channel_[k] + task.first_row % grid_.channels;
    return of_element_;
  }

 private:
  const Grid& grid_;
  Pointers of_channel_, of_element_;
  std::vector<Real> memory_;

  void spread(const Task& task) {
    grid_.for_channels(task, [&](int64_t c, int64_t first, int64_t step, int64_t last) {
      for (size_t k = 0; k < kNumber; ++k) {
        Real* to = memory_.data() + k * (memory_.size() / kNumber);
        if (step == 1) std::fill(to + first, to + last, of_channel_[k][c]);
        else
          for (int64_t i = first; i < last; i += step) to[i] = of_channel_[k][c];
      }
    });
  }
};

// Calls f(row, i, n, factors) for the rows of a task, of which `start(first, last)` looks up a run, and the
// lanes of each. kMany: whether rows have many channels.
template <bool kMany, typename Real, size_t kNumber, typename Start, typename F>
void for_rows(const Grid& grid, const Task& task, const std::array<const Real*, kNumber>& factors, bool dense,
              const Start& start, const F& f) {
  const auto run = [&](int64_t first, int64_t last, int64_t size) {
    start(first, last);
    // Few rows and many elements of each, so that memory is read with few leaps.
    const int64_t most = size <= kLanes ? kRun : 8;
    for (int64_t from = 0; from < last - first; from += most) {
      const int64_t to = std::min(last - first, from + most);
      int64_t begin = 0;
      if constexpr (kMany) {
        for (; dense && begin + 2 * kLanes <= size; begin += 2 * kLanes) {
          const int64_t i = task.first + begin;
          const LaneFactors<Real, kNumber, true> own(factors, begin), others(factors, begin + kLanes);
          for (int64_t row = from; row < to; ++row) {
            f(row, i, AllLanes(), own);
            f(row, i + kLanes, AllLanes(), others);
          }
        }
      }
      for_lanes_again(begin, size, dense, [&](int64_t i, auto n) {
        const LaneFactors<Real, kNumber, kMany> own(factors, kMany ? i : 0);
        for (int64_t row = from; row < to; ++row) f(row, task.first + i, n, own);
      });
    }
  };
  if constexpr (kMany) grid.for_runs(task, run);
  else run(task.first_row, task.last_row, task.last);
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

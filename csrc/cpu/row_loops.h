// The rows of a map, read and written in the type `Held` of their elements. For `each_level.h`.
#include "conversion_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// The rows of one map. Those whose elements do not lie side by side, and those to convert, are copied, one at
// a time.
template <typename T>
class Rows {
 public:
  // `most` elements are read of a row.
  Rows(const FeatureMap& map, const Grid& grid, int64_t most)
      : data_(map.tensor.const_data_ptr<T>()),
        stride_n_(map.stride_n),
        stride_outer_(grid.channels ? map.stride_p : map.stride_c),
        stride_(grid.channels ? map.stride_c : map.stride_p),
        outer_(grid.channels ? map.positions : map.channels),
        size_(grid.size),
        packed_(grid.repeats > 1) {
    if (most == 1) stride_ = 1;
    if (stride_ != 1 || !std::is_same_v<T, Held<T>>) buffer_.resize(most);
  }

  // The first `count` elements of a row, until the next one is asked for.
  const Held<T>* operator()(int64_t row, int64_t count) {
    const T* first =
        data_ + (packed_ ? row * size_ : row / outer_ * stride_n_ + row % outer_ * stride_outer_);
    return held(first, stride_, count, buffer_.data());
  }

 private:
  const T* data_;
  int64_t stride_n_, stride_outer_, stride_, outer_, size_;
  bool packed_;
  std::vector<Held<T>> buffer_;
};

// The rows of a map that is written to. Its elements lie side by side, as `empty_map` lays them.
template <typename T>
class Results {
 public:
  // `most` elements are written of a row.
  Results(const FeatureMap& map, const Grid& grid, int64_t most)
      : data_(map.tensor.mutable_data_ptr<T>()),
        stride_n_(map.stride_n),
        stride_outer_(grid.channels ? map.stride_p : map.stride_c),
        outer_(grid.channels ? map.positions : map.channels),
        size_(grid.size),
        packed_(grid.repeats > 1) {
    STD_TORCH_CHECK(size_ == 1 || (grid.channels ? map.stride_c : map.stride_p) == 1,
                    "expected a result whose rows lie together");
    if (kConverted) converted_.resize(most);
  }

  // Where a row's elements are written, before finish().
  Held<T>* operator()(int64_t row) {
    if constexpr (kConverted) return converted_.data();
    else return at(row);
  }

  void finish(int64_t row, int64_t count) {
    if constexpr (kConverted) narrow_row(converted_.data(), count, at(row));
  }

 private:
  static constexpr bool kConverted = !std::is_same_v<T, Held<T>>;

  T* at(int64_t row) const {
    return data_ + (packed_ ? row * size_ : row / outer_ * stride_n_ + row % outer_ * stride_outer_);
  }

  T* data_;
  int64_t stride_n_, stride_outer_, outer_, size_;
  bool packed_;
  std::vector<Held<T>> converted_;
};

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

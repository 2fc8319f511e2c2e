// kLanes elements at a time, in arrays that the compiler keeps in registers. For `each_level.h`.
#include "conversion_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Of a plain loop the compiler makes a call of memcpy, through which it does not see.
template <typename Real>
void copy_lanes(const Real* __restrict__ from, Real* __restrict__ to) {
#if AUGLOCAL_VECTOR
  typedef Real Vector __attribute__((vector_size(AUGLOCAL_VECTOR), aligned(alignof(Real)), may_alias));
  for (int i = 0; i < kLanes; i += AUGLOCAL_VECTOR / sizeof(Real))
    *reinterpret_cast<Vector*>(to + i) = *reinterpret_cast<const Vector*>(from + i);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = from[i];
#endif
}

// kLanes elements to numbers and back.
template <typename T, typename Real>
void widen_lanes(const T* __restrict__ from, Real* __restrict__ to) {
  if constexpr (std::is_same_v<T, Real>) copy_lanes(from, to);
  else if constexpr (std::is_same_v<T, c10::Half>)
    for (int i = 0; i < kLanes; i += kHalves) widen_halves(from + i, to + i);
  else
    for (int i = 0; i < kLanes; ++i) to[i] = widened(from[i]);
}

template <typename T, typename Real>
void narrow_lanes(const Real* __restrict__ from, T* __restrict__ to) {
  if constexpr (std::is_same_v<T, Real>) copy_lanes(from, to);
  else if constexpr (std::is_same_v<T, c10::Half>)
    for (int i = 0; i < kLanes; i += kHalves) narrow_halves(from + i, to + i);
  else
    for (int i = 0; i < kLanes; ++i) to[i] = narrowed<T>(from[i]);
}

using AllLanes = std::integral_constant<int64_t, kLanes>;

// Calls f(i, n) for the elements [first, last), kLanes at a time from the i-th on, of which n are there.
// Where maps are dense n is AllLanes as long as it can: the calls for all other cases would keep sums in
// memory.
template <typename F>
void for_lanes(int64_t first, int64_t last, bool dense, const F& f) {
  int64_t i = first;
  if (dense)
    for (; i + kLanes <= last; i += kLanes) f(i, AllLanes());
  for (; i < last; i += kLanes) f(i, std::min<int64_t>(kLanes, last - i));
}

// The same where f may be called with some elements twice, also with those before `first`.
template <typename F>
void for_lanes_again(int64_t first, int64_t last, bool dense, const F& f) {
  if (!dense || last < kLanes) return for_lanes(first, last, dense, f);
  for (int64_t i = first; i < last; i += kLanes) f(std::min(i, last - kLanes), AllLanes());
}

// n elements that lie `stride` apart, side by side, with zeros behind them.
template <typename T>
AUGLOCAL_NOT_INLINE void collect(const T* from, int64_t stride, int64_t n, T* __restrict__ to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  std::fill(to + n, to + kLanes, T(0));
}

// kLanes elements as numbers: n that lie `stride` apart, 1 for AllLanes, and zeros.
template <typename T, typename Number, typename Real>
void read_lanes(const T* from, int64_t stride, Number n, Real* __restrict__ to) {
  if constexpr (std::is_same_v<Number, AllLanes>) {
    widen_lanes(from, to);
  } else {
    T some[kLanes];
    collect(from, stride, n, some);
    widen_lanes(some, to);
  }
}

// Writes n elements, of kLanes numbers.
template <typename Real, typename Number, typename T>
void write_lanes(const Real* __restrict__ from, Number n, T* __restrict__ to) {
  if constexpr (std::is_same_v<Number, AllLanes>) {
    narrow_lanes(from, to);
  } else {
    T some[kLanes];
    narrow_lanes(from, some);
    std::copy_n(some, n, to);
  }
}

// kLanes numbers to those that elements of type T can be.
template <typename T, typename Real>
void round_lanes(Real* row) {
  if constexpr (!std::is_same_v<T, Real>) {
    T some[kLanes];
    narrow_lanes(row, some);
    widen_lanes(some, row);
  }
}

// K numbers for each of kLanes elements, or for all of them where they are of one channel.
template <typename Real, size_t kNumber, bool kMany>
struct LaneFactors {
  Real values[kNumber][kMany ? kLanes : 1];

  LaneFactors(const std::array<const Real*, kNumber>& from, int64_t first) {
    for (size_t k = 0; k < kNumber; ++k) {
      if constexpr (kMany) copy_lanes(from[k] + first, values[k]);
      else values[k][0] = *from[k];
    }
  }

  Real at(size_t k, int lane) const { return values[k][kMany ? lane : 0]; }
};

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

// What the loops of the losses over labels have in common. For `each_level.h`.
#include "conversion_loops.h"

// Before a loop of a few iterations that is to become a vector before anything else becomes of it.
#if defined(__GNUC__) && !defined(__clang__)
#define AUGLOCAL_AS_A_LOOP _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define AUGLOCAL_AS_A_LOOP
#endif

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Elements that lie `stride` apart as numbers side by side: in `buffer`, unless they are so already.
template <typename T, typename Real>
const Real* numbers(const T* from, int64_t stride, int64_t count, Real* buffer) {
  if constexpr (std::is_same_v<T, Real>)
    if (stride == 1) return from;
  load(from, stride, count, buffer);
  return buffer;
}

// The sum of kCount numbers, the two halves of which are added.
template <int kCount, typename Real>
Real folded(const Real* all) {
  if constexpr (kCount == 1) {
    return all[0];
  } else {
    Real half[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) half[i] = all[i] + all[i + kCount / 2];
    return folded<kCount / 2>(half);
  }
}

// The sums of pair(i), two numbers, for i below `count`. Some are added side by side, at every level as many;
// up to 64 of them in Real, these in double.
template <typename Real, typename Pair>
SumPair pair_sums(int64_t count, const Pair& pair) {
  constexpr int kSide = 16;
  SumPair total;
  for (int64_t begin = 0; begin < count; begin += 64 * kSide) {
    const int64_t end = std::min<int64_t>(count, begin + 64 * kSide);
    Real first[kSide] = {}, second[kSide] = {};
    int64_t i = begin;
    for (; i + kSide <= end; i += kSide) {
      AUGLOCAL_AS_A_LOOP
      for (int side = 0; side < kSide; ++side) {
        const auto [a, b] = pair(i + side);
        first[side] += a;
        second[side] += b;
      }
    }
    // The last few by themselves: added to some of the sums they would keep these in memory.
    Real last_first = 0, last_second = 0;
    for (; i < end; ++i) {
      const auto [a, b] = pair(i);
      last_first += a;
      last_second += b;
    }
    total.first += folded<kSide>(first) + last_first;
    total.second += folded<kSide>(second) + last_second;
  }
  return total;
}

// The sum of value(i).
template <typename Real, typename Value>
double sum_of(int64_t count, const Value& value) {
  return pair_sums<Real>(count, [&](int64_t i) { return std::pair<Real, Real>(value(i), 0); }).first;
}

template <typename Real>
Real inner_product(const Real* a, const Real* b, int64_t count) {
  return static_cast<Real>(sum_of<Real>(count, [&](int64_t i) { return a[i] * b[i]; }));
}

// The largest of value(i) that is a number, or minus infinity.
template <typename Real, typename Value>
Real largest_of(int64_t count, const Value& value) {
  constexpr int kSide = 16;
  Real largest[kSide];
  std::fill(largest, largest + kSide, -std::numeric_limits<Real>::infinity());
  const auto compare = [&](int side, int64_t i) {
    const Real found = value(i);
    largest[side] = found > largest[side] ? found : largest[side];
  };
  int64_t i = 0;
  for (; i + kSide <= count; i += kSide) {
    AUGLOCAL_AS_A_LOOP
    for (int side = 0; side < kSide; ++side) compare(side, i + side);
  }
  for (int side = 0; i < count; ++i, ++side) compare(side, i);
  return *std::max_element(largest, largest + kSide);
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

#undef AUGLOCAL_AS_A_LOOP

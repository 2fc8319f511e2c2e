// The planes of a map, and the rows of one whose channels lie side by side, as numbers. For `each_level.h`.
#include "loss_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Calls f(i, count, numbers) for the planes [begin, end) of a map: with `count` of them from the i-th on, one
// after the other. Small planes that lie together are converted several at a time.
template <typename Real, typename T, typename F>
void for_each_planes(const FeatureMap& map, int64_t begin, int64_t end, const F& f) {
  const T* data = map.tensor.const_data_ptr<T>();
  const bool copied = map.stride_p != 1 || !std::is_same_v<T, Real>;
  const bool together = map.stride_p == 1 && map.stride_c == map.positions;
  const int64_t most = together ? std::max<int64_t>(1, 1024 / map.positions) : 1;
  std::vector<Real> buffer(copied ? most * map.positions : 0);
  for (int64_t i = begin; i < end;) {
    const int64_t n = i / map.channels, c = i % map.channels;
    const int64_t count = std::min({most, end - i, map.channels - c});
    const T* first = data + n * map.stride_n + c * map.stride_c;
    f(i, count, numbers(first, map.stride_p, count * map.positions, buffer.data()));
    i += count;
  }
}

constexpr int64_t kTogether = 4;  // rows that are added before their sum goes to memory

// Calls f(count, sum) for the rows of a task of `Stripes`, kTogether or one at a time, each of `count`
// elements: sum(i, g) is the sum over these rows of g(element i). `buffer` has room for kTogether * size.
template <typename Real, typename T, typename F>
void for_each_rows(const T* first, int64_t stride_p, int64_t positions, int64_t width, int64_t repeats,
                   int64_t size, Real* buffer, const F& f) {
  const auto row = [&](int64_t p, int64_t count, int64_t place) {
    return numbers(first + p * stride_p, 1, count, buffer + place * size);
  };
  const int64_t length = repeats * width;
  int64_t p = 0;
  for (; p + kTogether * repeats <= positions; p += kTogether * repeats) {
    const Real* __restrict__ a = row(p, length, 0);
    const Real* __restrict__ b = row(p + repeats, length, 1);
    const Real* __restrict__ c = row(p + 2 * repeats, length, 2);
    const Real* __restrict__ d = row(p + 3 * repeats, length, 3);
    f(length, [=](int64_t i, const auto& g) { return (g(a[i]) + g(b[i])) + (g(c[i]) + g(d[i])); });
  }
  for (; p < positions; p += repeats) {
    const int64_t count = std::min(repeats, positions - p) * width;
    const Real* __restrict__ a = row(p, count, 0);
    f(count, [=](int64_t i, const auto& g) { return g(a[i]); });
  }
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

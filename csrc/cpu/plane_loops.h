// The planes of a map as numbers. For `each_level.h`.
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

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

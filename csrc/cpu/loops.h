// What the loops of every op's CPU provider have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace auglocal {

constexpr int64_t kGrain = 32768;  // elements worth a thread

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kGrain / elements_per_item);
}

// Calls f(std::true_type) or f(std::false_type).
template <typename F>
void with(bool flag, const F& f) {
  if (flag) f(std::true_type());
  else f(std::false_type());
}

}  // namespace auglocal

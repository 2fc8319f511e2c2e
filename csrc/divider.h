// Division by a number known at launch, as one multiplication: what a kernel finds its place in a map with.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace auglocal {

struct Divider {
  int64_t divisor = 1;
  uint32_t magic = 1, shift = 0;

  Divider() = default;

  // With s = ceil(log2 d) and m = floor(2^32 (2^s - d) / d) + 1, floor(n / d) = (floor(m n / 2^32) + n) / 2^s
  // for all n below 2^31 (Granlund and Montgomery, Division by invariant integers using multiplication,
  // 1994).
  explicit Divider(int64_t d) : divisor(d) {
    while (shift < 31 && (int64_t(1) << shift) < d) ++shift;
    const uint64_t power = uint64_t(1) << shift, wide = static_cast<uint64_t>(d);
    magic = power < wide ? 0 : static_cast<uint32_t>((power - wide) * (uint64_t(1) << 32) / wide + 1);
  }

  AUGLOCAL_HOST_DEVICE int64_t divide(int64_t n) const {
    return n >> 31 != 0 ? n / divisor : divide(static_cast<int>(n));
  }

  AUGLOCAL_HOST_DEVICE int divide(int n) const {
    const uint32_t narrow = static_cast<uint32_t>(n);
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(narrow) * magic) >> 32);
    return static_cast<int>((high + narrow) >> shift);
  }
};

}  // namespace auglocal

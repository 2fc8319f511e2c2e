// exp without a call or a branch, for the host and for the device, so that loops over it become vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace auglocal {

// exp(-a) for a >= 0. In float32: with n the integer next to -a / ln 2, 2^n times the Taylor series of the
// rest, whose error is 5e-9 of it. Beyond 87, where float32 ends, it is 0; a NaN stays one.
AUGLOCAL_HOST_DEVICE float exp_minus(float a) {
  constexpr float kRound = 12582912;                             // 1.5 * 2^23: sums with it are integers
  constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln 2, of which n times the first is exact
  const float x = a > 87 ? -87.0f : -a;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * kHigh) - n * kLow;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1;
  series = series * r + 1;
  // The low bits of `shifted` are n, and 2^n is a number with n + 127 in its exponent bits alone.
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return a > 87 ? 0.0f : series * power;
}

AUGLOCAL_HOST_DEVICE double exp_minus(double a) {
  return std::exp(-a);
}

}  // namespace auglocal

// Elements in memory to the numbers they are computed in and back, without branches, so that loops vectorise.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace auglocal {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// a where the condition holds, else b: by a mask, since the compiler makes branches of too many choices.
inline uint32_t chosen(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

inline float chosen(bool condition, float a, float b) {
  return float_of(chosen(condition, bits_of(a), bits_of(b)));
}

inline double chosen(bool condition, double a, double b) {
  return condition ? a : b;
}

constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u;
constexpr uint32_t kBias = 112u << 23;  // what float's exponents are larger by than those of half

inline double widened(double value) {
  return value;
}
inline float widened(float value) {
  return value;
}
inline float widened(c10::BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.x) << 16);
}

inline float widened(c10::Half value) {
  const uint32_t magnitude = value.x & 0x7fffu, sign = static_cast<uint32_t>(value.x & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + kBias;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = chosen(magnitude < 0x400u, subnormal, normal);
  return float_of(sign | chosen(magnitude < 0x7c00u, finite, normal + kBias));
}

// Rounded to the nearest, of two equally near ones to the even one.
template <typename T, typename Real>
T narrowed(Real value) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const uint32_t bits = bits_of(value == value ? value : float_of(0x7fc00000u));
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return T(static_cast<unsigned short>(rounded >> 16), T::from_bits());
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    const uint32_t bits = bits_of(value), magnitude = bits & ~kSign;
    const uint32_t normal = (magnitude - kBias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // 0.5 has the unit 2^-24 of half's subnormal numbers in its last place.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = chosen(magnitude < 0x38800000u, subnormal, normal);
    const uint32_t large = chosen(magnitude > kInfinity, 0x7e00u, 0x7c00u);
    const uint32_t rounded = chosen(magnitude < 0x477ff000u, finite, large);
    return T(static_cast<unsigned short>(rounded | ((bits & kSign) >> 16)), T::from_bits());
  } else {
    return value;
  }
}

}  // namespace auglocal

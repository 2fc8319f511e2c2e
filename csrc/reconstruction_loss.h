// The arithmetic of reconstruction_loss, one element at a time, for the host and for the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace auglocal {

// A pixel in [0, 1], made of the network's normalised input; a NaN stays one.
template <typename Real>
AUGLOCAL_HOST_DEVICE Real restored(Real input, Real mean, Real std) {
  const Real pixel = input * std + mean;
  return pixel < 0 ? Real(0) : pixel > 1 ? Real(1) : pixel;
}

// exp(-a) for a >= 0. In float32 without a call or a branch, so that loops over it become vectors: with n the
// integer next to -a / ln 2, 2^n times the Taylor series of the rest, whose error is 5e-9 of it. Beyond 87,
// where float32 ends, it stays at exp(-87); a NaN stays one.
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
  return series * power;
}

AUGLOCAL_HOST_DEVICE double exp_minus(double a) {
  return std::exp(-a);
}

// log(1 + e) for 0 <= e <= 1. In float32 as 2 artanh(e / (2 + e)), whose series then ends after seven terms
// with an error of 2e-8 of it, also where e is tiny.
AUGLOCAL_HOST_DEVICE float log_one_plus(float e) {
  const float s = e / (2 + e), square = s * s;
  float series = 2.0f / 13;
  series = series * square + 2.0f / 11;
  series = series * square + 2.0f / 9;
  series = series * square + 2.0f / 7;
  series = series * square + 2.0f / 5;
  series = series * square + 2.0f / 3;
  return s * (series * square + 2);
}

AUGLOCAL_HOST_DEVICE double log_one_plus(double e) {
  return std::log1p(e);
}

// Binary cross-entropy of one pixel, and its derivative sigmoid(logit) - pixel.
template <typename Real>
struct PixelLoss {
  Real loss, gradient;
};

// With e = exp(-|l|) and m the distance of the pixel from the end of [0, 1] that the sign of the logit l
// points to: loss = |l| m + log(1 + e) and |gradient| = |m - e / (1 + e)|. Nothing overflows, and where the
// pixel lies at that end both keep their digits however sure the logit is.
template <typename Real>
AUGLOCAL_HOST_DEVICE PixelLoss<Real> pixel_loss(Real logit, Real pixel) {
  const Real size = std::abs(logit), e = exp_minus(size), wrong = e / (1 + e);
  const Real distance = logit < 0 ? pixel : 1 - pixel;
  return {size * distance + log_one_plus(e), logit < 0 ? wrong - pixel : distance - wrong};
}

// The dense order in which elements are walked through: images, then rows of `inner` elements, either the
// positions of a channel or, in channels-last maps, the channels of a position.
struct DenseOrder {
  int64_t outer, inner;  // their product is the elements of an image
  bool channels_last;
};

// A map in that order, in elements; any stride may be 0.
struct OrderedStrides {
  int64_t n, outer, inner;
};

}  // namespace auglocal

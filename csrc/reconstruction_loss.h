// The arithmetic of reconstruction_loss, one element at a time, for the host and for the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "host_device.h"

namespace auglocal {

// A pixel in [0, 1], made of the network's normalised input; a NaN stays one.
template <typename Real>
AUGLOCAL_HOST_DEVICE Real restored(Real input, Real mean, Real std) {
  const Real pixel = input * std + mean;
  return pixel < 0 ? Real(0) : pixel > 1 ? Real(1) : pixel;
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

// The arithmetic of similarity_loss, one element at a time, for the host and for the device.
//
// Rows of features are centred and divided by their length + eps, once; the similarity of two images is the
// product of their rows. Moments and Shifted, of which a channel's mean and deviation are made, are
// batch_norm_act's, and which labels count is pooled_cross_entropy's.
#pragma once

#include <cmath>
#include <cstdint>

#include "batch_norm_act.h"
#include "host_device.h"
#include "pooled_cross_entropy.h"

namespace auglocal {

constexpr double kLengthEps = 1e-8;

// Similarity of the one-hot rows of two images of one class, and of two of different ones: 1 and -1 / (K -
// 1), but for eps. A centred one-hot row has the length sqrt(1 - 1 / K); with K = 1 it is zero, and so is
// the similarity.
template <typename Real>
struct Wanted {
  Real same, different;
};

template <typename Real>
Wanted<Real> wanted(int64_t classes) {
  const double count = static_cast<double>(classes), squared = (count - 1) / count;
  const double length = std::sqrt(squared) + kLengthEps, scale = 1 / (length * length);
  const double different = -scale / count;
  return {static_cast<Real>(squared * scale), static_cast<Real>(different < -1 ? -1 : different)};
}

// One pair of images: its squared difference, and the difference as far as the clamp lets a gradient pass.
template <typename Real>
struct Pair {
  Real square, gradient;
};

template <typename Real>
AUGLOCAL_HOST_DEVICE Pair<Real> pair(Real similarity, Real wanted) {
  // A NaN stays one.
  const Real clamped = similarity < -1 ? Real(-1) : similarity > 1 ? Real(1) : similarity;
  const Real difference = clamped - wanted;
  return {difference * difference, clamped == similarity ? difference : Real(0)};
}

// Standard deviation of a channel's positions.
template <typename Real>
AUGLOCAL_HOST_DEVICE Real deviation(const Moments<Real>& all) {
  return std::sqrt(all.squares / (all.count - 1));
}

// What turns the gradient g of a row u = c / (|c| + eps) into that of c: g along - u across.
template <typename Real>
struct RowGradient {
  Real along, across;
};

// `dot` is the product of u and g, `scale` what g lacks: 4 / V^2, one 2 for the square, another because every
// pair stands in two places.
template <typename Real>
AUGLOCAL_HOST_DEVICE RowGradient<Real> row_gradient(Real length, Real dot, Real scale) {
  return {scale / (length + static_cast<Real>(kLengthEps)), length > 0 ? scale * dot / length : Real(0)};
}

// dloss/df of a standard deviation f over P positions as what dz is (z - mean) times; 0 where f is, which has
// no derivative there.
template <typename Real>
AUGLOCAL_HOST_DEVICE Real deviation_factor(Real gradient, Real deviation, int64_t positions) {
  return deviation > 0 ? gradient / (deviation * static_cast<Real>(positions - 1)) : Real(0);
}

}  // namespace auglocal

// The arithmetic of supervised_contrast, one element at a time, for the host and for the device.
//
// With products s_ia = z_i z_a, temperature t and m_i the largest of them that counts, a shifted logit is
// (s_ia - m_i) / t. G is what a row's loss makes of it: softmax minus the share of each positive; the
// gradient of z is (G z + G^T z) / (t |A|) with |A| anchors, which are known after the last row.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace auglocal {

constexpr int64_t kContrastRows = 256;  // of the matrix of pairs that exist at a time

constexpr double kLeastNorm = 1e-12;

// A NaN stays one.
template <typename Real>
AUGLOCAL_HOST_DEVICE Real divisor_of(Real norm) {
  return norm < static_cast<Real>(kLeastNorm) ? static_cast<Real>(kLeastNorm) : norm;
}

// Images of any label but the ignored one stand in the sums.
AUGLOCAL_HOST_DEVICE bool stands(int64_t label, int64_t ignore_index) {
  return label != ignore_index;
}

template <typename Real>
AUGLOCAL_HOST_DEVICE Real shifted_logit(Real product, Real largest, Real temperature) {
  return (product - largest) / temperature;
}

// Sums over the images that stand beside that of the row.
template <typename Real>
struct ContrastSums {
  Real exponentials = 0;  // of their shifted logits
  Real positives = 0;     // shifted logits of those with the row's label
  int64_t count = 0;      // of those with the row's label; without one the row is no anchor
};

// mean_p -log p_p
template <typename Real>
AUGLOCAL_HOST_DEVICE Real contrast_loss(const ContrastSums<Real>& sums) {
  return std::log(sums.exponentials) - sums.positives / static_cast<Real>(sums.count);
}

// G of an image that stands
template <typename Real>
AUGLOCAL_HOST_DEVICE Real contrast_gradient(Real exponential, bool positive, const ContrastSums<Real>& sums) {
  const Real probability = exponential / sums.exponentials;
  return positive ? probability - 1 / static_cast<Real>(sums.count) : probability;
}

// Through the normalisation: `inner` is z dz of the row, `scale` is 1 / (t |A|).
template <typename Real>
AUGLOCAL_HOST_DEVICE Real feature_gradient(Real dz, Real z, Real inner, Real norm, Real scale) {
  const bool moves = !(norm < static_cast<Real>(kLeastNorm));  // whether z depends on the norm
  return scale * ((moves ? dz - z * inner : dz) / divisor_of(norm));
}

// Without an anchor the loss is 0, not NaN.
AUGLOCAL_HOST_DEVICE int64_t at_least_one(int64_t anchors) {
  return anchors > 1 ? anchors : 1;
}

}  // namespace auglocal

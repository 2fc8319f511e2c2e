// The arithmetic of pooled_cross_entropy, one element at a time, for the host and for the device.
//
// The sum over the P positions is kept instead of their mean, because both uses of the mean can absorb the
// 1/P where it costs nothing: logits = (sums W^T) / P + b, and with d = dlogits / P the gradients are d W (of
// the pooled feature, per position), d^T sums (of W) and P sum_n d (of b).
#pragma once

#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "host_device.h"

namespace auglocal {

// Whether a label counts: a class, and not the ignored one. A label out of range is treated as ignored.
AUGLOCAL_HOST_DEVICE bool counts(int64_t label, int64_t classes, int64_t ignore_index) {
  return label >= 0 && label < classes && label != ignore_index;
}

// Largest logit of a row and where it stands; the first of equal ones, so that the order of merging is of no
// account.
template <typename Real>
struct Best {
  Real value;
  int64_t index;
};

template <typename Real>
AUGLOCAL_HOST_DEVICE Best<Real> better(Best<Real> a, Best<Real> b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

// What the loss of a row needs beside the logit of its label; logits are shifted by the row's largest.
template <typename Real>
struct RowSums {
  Real exponentials = 0;  // sum_k exp(shifted_k)
  Real shifted = 0;       // sum_k shifted_k
};

template <typename Real>
AUGLOCAL_HOST_DEVICE void add(RowSums<Real>& sums, Real shifted) {
  sums.exponentials += exp_minus(-shifted);
  sums.shifted += shifted;
}

template <typename Real>
AUGLOCAL_HOST_DEVICE Real logit(Real product, int64_t positions, Real bias) {
  return product / static_cast<Real>(positions) + bias;
}

// (1 - e) (-log p_y) + e / K sum_k (-log p_k)
template <typename Real>
AUGLOCAL_HOST_DEVICE Real row_loss(const RowSums<Real>& sums, Real shifted_label, int64_t classes,
                                   Real smoothing) {
  const Real log_sum = std::log(sums.exponentials);
  const Real label = (1 - smoothing) * (log_sum - shifted_label);
  // Without smoothing an infinite logit of another class must not turn the loss into a NaN.
  return smoothing == 0 ? label : label + smoothing * (log_sum - sums.shifted / static_cast<Real>(classes));
}

// scale * (p_k - (1 - e) [k = y] - e / K), with p_y - 1 taken first, which is exact where p_y is near 1
template <typename Real>
AUGLOCAL_HOST_DEVICE Real row_gradient(const RowSums<Real>& sums, Real shifted, bool is_label,
                                       int64_t classes, Real smoothing, Real scale) {
  const Real probability = exp_minus(-shifted) / sums.exponentials;
  const Real share = smoothing / static_cast<Real>(classes);
  return scale * (is_label ? (probability - 1) + (smoothing - share) : probability - share);
}

}  // namespace auglocal

// The arithmetic of layer_norm, one element at a time, for the host and for the device. RMSNorm is the same
// with a mean of 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace auglocal {

// The statistics of a row.
template <typename Real>
struct RowNorm {
  Real mean, rstd;  // rstd = 1 / sqrt(variance + eps)

  AUGLOCAL_HOST_DEVICE Real normalised(Real x) const { return (x - mean) * rstd; }
};

// Of a row with `count` elements, by the sums of their differences from `origin` and of the squares of these.
// The origin is the mean as a first sum has it, off by a few digits where it is large; 0 for RMSNorm, whose
// `differences` are 0 too.
template <typename Real>
AUGLOCAL_HOST_DEVICE RowNorm<Real> row_norm(Real origin, Real differences, Real squares, int64_t count,
                                            Real eps) {
  const Real shift = differences / static_cast<Real>(count);
  const Real variance = squares / static_cast<Real>(count) - shift * shift;
  return {origin + shift, 1 / std::sqrt((variance < 0 ? 0 : variance) + eps)};
}

template <typename Real>
AUGLOCAL_HOST_DEVICE Real affine(Real normalised, Real weight, Real bias) {
  return normalised * weight + bias;
}

// What reaches x through the statistics of its row, with g = grad weight and xhat the normalised x.
template <typename Real>
struct RowMeans {
  Real g, g_xhat;  // g: 0 for RMSNorm, whose statistics have no mean
};

// rstd (g - mean(g) - xhat mean(g xhat))
template <typename Real>
AUGLOCAL_HOST_DEVICE Real input_gradient(const RowNorm<Real>& row, const RowMeans<Real>& means, Real g,
                                         Real xhat) {
  return row.rstd * ((g - means.g) - xhat * means.g_xhat);
}

}  // namespace auglocal

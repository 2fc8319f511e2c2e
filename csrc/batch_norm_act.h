// The arithmetic of batch_norm_act, one element at a time, for the host and for the device.
//
// Forward and backward make the normalised value by the same function, so that both see the same mask.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace auglocal {

// Some values of one channel: how many, their mean as a difference from an origin common to the channel, and
// the sum of squared differences from their mean.
template <typename Real>
struct Moments {
  Real count, mean, squares;
};

template <typename Real>
AUGLOCAL_HOST_DEVICE Moments<Real> merged(const Moments<Real>& a, const Moments<Real>& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const Real count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * (a.count * share)};
}

// Sums over values that are shifted by one of them. Two levels, a shift for each thread or run of values and
// an origin for the channel, keep the variance right where the mean is huge, and also where the origin or a
// shift is a value far from all the others.
template <typename Real>
struct Shifted {
  Real sum, squares;
};

template <typename Real>
AUGLOCAL_HOST_DEVICE void add(Shifted<Real>& sums, Real difference) {
  sums.sum += difference;
  sums.squares += difference * difference;
}

template <typename Real>
AUGLOCAL_HOST_DEVICE Moments<Real> moments(const Shifted<Real>& sums, Real count, Real shift, Real origin) {
  const Real squares = sums.squares - sums.sum * (sums.sum / count);
  // Rounding must not make a variance negative; a NaN stays one.
  return {count, (shift - origin) + sums.sum / count, squares < 0 ? Real(0) : squares};
}

// What the statistics of a channel are used for in training.
template <typename Real>
struct Update {
  Real momentum, eps;
};

template <typename Real>
AUGLOCAL_HOST_DEVICE Real updated(Real running, Real value, const Update<Real>& update) {
  return (1 - update.momentum) * running + update.momentum * value;
}

template <typename Real>
AUGLOCAL_HOST_DEVICE Real unbiased(Real var, Real count) {
  return var * (count / (count - 1));
}

template <typename Real>
AUGLOCAL_HOST_DEVICE Real reciprocal_deviation(Real var, const Update<Real>& update) {
  return 1 / std::sqrt(var + update.eps);
}

// What normalises a channel: z = (x - mean) scale + bias with scale = rstd weight.
template <typename Real>
struct Channel {
  Real mean, scale, bias;
};

template <typename Real>
AUGLOCAL_HOST_DEVICE Real normalised(const Channel<Real>& channel, Real x) {
  return (x - channel.mean) * channel.scale + channel.bias;
}

// value act'(z) for an activation of the given slope left of zero: 1 none, 0 ReLU, else leaky ReLU. With
// value = z it is the activation itself. As in torch a NaN passes ReLU, which multiplies nothing by zero, and
// falls left in leaky ReLU.
template <typename Real>
AUGLOCAL_HOST_DEVICE Real activated(Real value, Real z, Real slope) {
  const Real left = value * slope;  // outside the choice, which the compiler can then vectorise
  if (slope == 0) return z <= 0 ? Real(0) : value;
  return z > 0 ? value : left;
}

enum class Activation { kNone, kRelu, kLeaky };

// The same where the activation is known when this is compiled.
template <Activation kActivation, typename Real>
AUGLOCAL_HOST_DEVICE Real activated_by(Real value, Real z, Real slope) {
  if constexpr (kActivation == Activation::kNone) return value;
  else if constexpr (kActivation == Activation::kRelu) return z <= 0 ? Real(0) : value;
  else return z > 0 ? value : value * slope;
}

// What makes the gradient of x from g = grad act'(z): scale (g - mean_g - (x - mean) inner).
template <typename Real>
struct Backward {
  Real mean_g, inner;  // sum_g / M and rstd sum_g_xhat / M; both 0 where the statistics are constants
};

template <typename Real>
AUGLOCAL_HOST_DEVICE Real input_gradient(const Channel<Real>& channel, const Backward<Real>& backward, Real g,
                                         Real x) {
  // With constant statistics an infinite x leaves the gradient finite: nothing is multiplied by zero.
  const Real through_var = (x - channel.mean) * backward.inner;
  return channel.scale * ((g - backward.mean_g) - (backward.inner == 0 ? Real(0) : through_var));
}

// The same where it is known whether the statistics are constants.
template <bool kConstant, typename Real>
AUGLOCAL_HOST_DEVICE Real input_gradient_by(const Channel<Real>& channel, const Backward<Real>& backward,
                                            Real g, Real x) {
  if constexpr (kConstant) return channel.scale * g;
  else return channel.scale * ((g - backward.mean_g) - (x - channel.mean) * backward.inner);
}

}  // namespace auglocal

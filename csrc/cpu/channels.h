// BatchNorm's factors of each channel, as the loops of the CPU providers read them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "level.h"

namespace auglocal {

// The channels' factors as arrays, with zeros up to whole lanes.
template <typename Real>
struct Channels {
  std::vector<Real> mean, scale, bias;

  // All (width,); weight and bias may be undefined.
  Channels(const torch::stable::Tensor& means, const torch::stable::Tensor& rstds,
           const torch::stable::Tensor& weights, const torch::stable::Tensor& biases, int64_t width)
      : mean(whole_lanes(width)), scale(mean), bias(mean) {
    const Real *m = means.const_data_ptr<Real>(), *r = rstds.const_data_ptr<Real>();
    const Real* w = weights.defined() ? weights.const_data_ptr<Real>() : nullptr;
    const Real* b = biases.defined() ? biases.const_data_ptr<Real>() : nullptr;
    for (int64_t c = 0; c < width; ++c) {
      mean[c] = m[c];
      scale[c] = w ? r[c] * w[c] : r[c];
      bias[c] = b ? b[c] : Real(0);
    }
  }

  // Those from channel c on.
  std::array<const Real*, 3> pointers(int64_t c = 0) const {
    return {mean.data() + c, scale.data() + c, bias.data() + c};
  }
};

// What `Channels` is for backward, with mean_g and inner of `Backward`: both 0 where the sums are undefined,
// which are of `count` values.
template <typename Real>
struct BackwardChannels {
  Channels<Real> channels;
  std::vector<Real> mean_g, inner;

  BackwardChannels(Channels<Real> factors, const Real* rstd, const Real* sum_g, const Real* sum_g_xhat,
                   int64_t width, int64_t count)
      : channels(std::move(factors)), mean_g(channels.mean.size(), 0), inner(mean_g) {
    if (!sum_g || !sum_g_xhat) return;
    for (int64_t c = 0; c < width; ++c) {
      mean_g[c] = sum_g[c] / static_cast<Real>(count);
      inner[c] = rstd[c] * (sum_g_xhat[c] / static_cast<Real>(count));
    }
  }

  std::array<const Real*, 5> pointers(int64_t c = 0) const {
    const auto [mean, scale, bias] = channels.pointers(c);
    return {mean, scale, bias, mean_g.data() + c, inner.data() + c};
  }
};

}  // namespace auglocal

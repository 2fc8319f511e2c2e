// BatchNorm's factors of each channel, as the loops of the CPU providers read them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../batch_norm_act.h"

namespace auglocal {

// The channels' factors as arrays, which loops along the channels read as vectors.
template <typename Real>
struct Channels {
  std::vector<Real> mean, scale, bias;

  // All (width,); weight and bias may be undefined.
  Channels(const torch::stable::Tensor& means, const torch::stable::Tensor& rstds,
           const torch::stable::Tensor& weights, const torch::stable::Tensor& biases, int64_t width) {
    mean.assign(means.const_data_ptr<Real>(), means.const_data_ptr<Real>() + width);
    scale.assign(rstds.const_data_ptr<Real>(), rstds.const_data_ptr<Real>() + width);
    for (int64_t c = 0; weights.defined() && c < width; ++c) scale[c] *= weights.const_data_ptr<Real>()[c];
    bias.resize(width, 0);
    if (biases.defined()) std::copy_n(biases.const_data_ptr<Real>(), width, bias.begin());
  }
};

template <typename Real>
struct ChannelPointers {
  const Real* __restrict__ mean, * __restrict__ scale, * __restrict__ bias;

  ChannelPointers(const Channels<Real>& channels, int64_t first)
      : mean(channels.mean.data() + first),
        scale(channels.scale.data() + first),
        bias(channels.bias.data() + first) {}
  Channel<Real> operator[](int64_t c) const { return {mean[c], scale[c], bias[c]}; }
};

}  // namespace auglocal

// BatchNorm's factors of each channel, as the loops of the CPU providers read them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../batch_norm_act.h"

namespace auglocal {

template <typename Real>
struct ChannelPointers {
  const Real* __restrict__ mean;
  const Real* __restrict__ scale;
  const Real* __restrict__ bias;

  Channel<Real> operator[](int64_t c) const { return {mean[c], scale[c], bias[c]}; }
};

// The channels' factors as arrays, which loops along the channels read as vectors.
template <typename Real>
struct Channels {
  std::vector<Real> mean, scale, bias;

  Channels() = default;

  // All (width,); weight and bias may be undefined. The arrays are `repeats` times as long.
  Channels(const torch::stable::Tensor& means, const torch::stable::Tensor& rstds,
           const torch::stable::Tensor& weights, const torch::stable::Tensor& biases, int64_t width,
           int64_t repeats = 1)
      : mean(width * repeats), scale(width * repeats), bias(width * repeats) {
    const Real *m = means.const_data_ptr<Real>(), *r = rstds.const_data_ptr<Real>();
    const Real* w = weights.defined() ? weights.const_data_ptr<Real>() : nullptr;
    const Real* b = biases.defined() ? biases.const_data_ptr<Real>() : nullptr;
    for (int64_t i = 0, c = 0; i < width * repeats; ++i, c = c + 1 == width ? 0 : c + 1) {
      mean[i] = m[c];
      scale[i] = w ? r[c] * w[c] : r[c];
      bias[i] = b ? b[c] : Real(0);
    }
  }

  void resize(int64_t size) {
    for (auto* each : {&mean, &scale, &bias}) each->resize(size);
  }

  // Those from channel c on.
  ChannelPointers<Real> at(int64_t c) const { return {mean.data() + c, scale.data() + c, bias.data() + c}; }

  // Makes `count` elements from `first` on those of channel c of `channels`.
  void fill(int64_t first, int64_t count, const Channels& channels, int64_t c) {
    std::fill_n(mean.begin() + first, count, channels.mean[c]);
    std::fill_n(scale.begin() + first, count, channels.scale[c]);
    std::fill_n(bias.begin() + first, count, channels.bias[c]);
  }
};

}  // namespace auglocal

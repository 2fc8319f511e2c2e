// What a kernel is told about each channel, and how a thread takes in that of its own.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../batch_norm_act.h"
#include "kernel.h"

namespace auglocal {

// Each (C,), and on 16 bytes.
struct Vectors {
  const float *mean, *rstd;
  const float *weight, *bias;       // or null
  const float *sum_g, *sum_g_xhat;  // null where the statistics are constants
  float count;                      // values of a channel
};

// The factors of kCount consecutive channels.
template <int kCount>
struct Factors {
  Channel<float> channels[kCount];

  __device__ __forceinline__ Factors(const Vectors& vectors, int64_t first) {
    float mean[kCount], scale[kCount], weight[kCount], bias[kCount] = {};
    load_floats(mean, vectors.mean + first);
    load_floats(scale, vectors.rstd + first);
    if (vectors.bias) load_floats(bias, vectors.bias + first);
    if (vectors.weight) {
      load_floats(weight, vectors.weight + first);
#pragma unroll
      for (int v = 0; v < kCount; ++v) scale[v] *= weight[v];
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v) channels[v] = {mean[v], scale[v], bias[v]};
  }

  __device__ __forceinline__ const Channel<float>& operator[](int v) const {
    return channels[kCount == 1 ? 0 : v];
  }
};

// The part of the statistics in the gradients of kCount consecutive channels.
template <int kCount>
struct ThroughStatistics {
  Backward<float> channels[kCount];

  __device__ __forceinline__ ThroughStatistics(const Vectors& vectors, int64_t first) {
    float sum[kCount] = {}, sum_xhat[kCount] = {}, rstd[kCount] = {};
    if (vectors.sum_g) {
      load_floats(sum, vectors.sum_g + first);
      load_floats(sum_xhat, vectors.sum_g_xhat + first);
      load_floats(rstd, vectors.rstd + first);
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      channels[v] = {sum[v] / vectors.count, rstd[v] * (sum_xhat[v] / vectors.count)};
  }

  __device__ __forceinline__ const Backward<float>& operator[](int v) const {
    return channels[kCount == 1 ? 0 : v];
  }
};

// The data of a vector that may be undefined. A view that does not begin on 16 bytes is copied, and kept by
// `vector`.
inline const float* on_16_bytes(torch::stable::Tensor& vector) {
  if (!vector.defined()) return nullptr;
  if (reinterpret_cast<uintptr_t>(vector.const_data_ptr()) % 16 != 0) vector = torch::stable::clone(vector);
  return vector.const_data_ptr<float>();
}

template <typename Problem>
Vectors vectors_of(Problem& problem) {
  return {on_16_bytes(problem.mean),
          on_16_bytes(problem.rstd),
          on_16_bytes(problem.weight),
          on_16_bytes(problem.bias),
          nullptr,
          nullptr,
          static_cast<float>(problem.count())};
}

}  // namespace auglocal

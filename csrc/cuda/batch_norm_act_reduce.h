// How the reductions of batch_norm_act end: what a thread has found becomes the block's, and that of all
// blocks the result.
#pragma once

#include <cstdint>

#include "../batch_norm_act.h"
#include "batch_norm_act_walk.h"
#include "channel_sums.h"

namespace auglocal {

// Merges over all blocks; returns the channel of which this thread then has the result, or -1.
template <int kVector, bool kChannels, typename V>
__device__ __forceinline__ int64_t merge_all(V& all, const V (&found)[kVector], const Params& params) {
  const Walk& walk = params.walk;
  const int64_t tile = blockIdx.x % walk.tiles, split = blockIdx.x / walk.tiles;
  const int width = kChannels ? walk.lanes * kVector : 1;
  if constexpr (kChannels) {
    all = merge_columns<kVector>(found, width);
  } else {
    V own[1] = {found[0]};
#pragma unroll
    for (int v = 1; v < kVector; ++v) own[0] = merged(own[0], found[v]);
    all = merge_columns<1>(own, width);
  }
  const bool last = merge_splits(all, params.partials, tile, split, tile * width, width);
  const int64_t channel = tile * width + threadIdx.x;
  return last && threadIdx.x < width && channel < walk.channels ? channel : -1;
}

// From the sums of `count` vectors, which are shifted by `shift`.
template <typename T, int kVector, bool kChannels>
__device__ __forceinline__ void finish_stats(const Shifted<float> (&sums)[kVector],
                                             const float (&shift)[kVector], int count, int64_t channel,
                                             const Params& params) {
  const int64_t stride = kChannels ? params.x.stride : params.x.stride_outer;
  const T* x = static_cast<const T*>(params.x.data);  // its first value is the origin of a channel
  Moments<float> found[kVector] = {}, all;
  if (count > 0) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float origin = static_cast<float>(x[(channel + (kChannels ? v : 0)) * stride]);
      found[v] = moments(sums[v], static_cast<float>(count), shift[v], origin);
    }
  }
  const int64_t c = merge_all<kVector, kChannels>(all, found, params);
  if (c < 0) return;
  const float mean = static_cast<float>(x[c * stride]) + all.mean, var = all.squares / all.count;
  params.first[c] = mean;
  params.second[c] = params.updates ? reciprocal_deviation(var, params.update) : var;
  if (params.running_mean) params.running_mean[c] = updated(params.running_mean[c], mean, params.update);
  if (params.running_var)
    params.running_var[c] = updated(params.running_var[c], unbiased(var, all.count), params.update);
  if (params.batches && c == 0) ++*params.batches;
}

template <int kVector, bool kChannels>
__device__ __forceinline__ void finish_reduce(const Sums (&found)[kVector], const Params& params) {
  Sums all;
  const int64_t c = merge_all<kVector, kChannels>(all, found, params);
  if (c < 0) return;
  params.first[c] = all.g;
  params.second[c] = all.g_difference * params.vectors.rstd[c];
}

}  // namespace auglocal

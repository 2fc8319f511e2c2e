// pooled_cross_entropy on CUDA: pool + count labels, library product, rows, library products, finish.
// The library's matmul is used for the products, so their float32 precision is the user's choice
// (torch.backends.cuda.matmul, TF32 off by default) as it is for torch.nn.functional.linear.
#include "../pooled_cross_entropy.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cmath>

#include "../pooled_cross_entropy_host.h"
#include "kernel.h"

namespace auglocal {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct PoolParams {
  const void* x;                         // (N, C, P)
  int64_t images, channels, positions;   // N, C, P
  int64_t stride_n, stride_c, stride_p;  // in elements
  float* sums;                           // (N, C)
  int lanes;              // threads side by side along the contiguous dimension, a power of two
  const int64_t* target;  // (N,)
  int64_t classes, ignore_index;
  bool mean;
  float* divisor;  // (), number of labels that count, or 1 for a sum
};

// The last block of a pooling launch counts labels: nobody needs the count before the launch after it.
__device__ void count_labels(const PoolParams& params) {
  int64_t count = 0;
  for (int64_t n = threadIdx.x; n < params.images; n += kThreads)
    count += counts(params.target[n], params.classes, params.ignore_index);
  count = block_sum(count);
  if (threadIdx.x == 0) *params.divisor = params.mean ? static_cast<float>(count) : 1.0f;
}

// `lanes` threads per (n, c): positions side by side. With kVector == 1 any stride.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) pool_positions_kernel(const PoolParams params) {
  if (blockIdx.x == gridDim.x - 1) return count_labels(params);
  const int lane = threadIdx.x % params.lanes;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / params.lanes) + threadIdx.x / params.lanes;
  const bool inside = row < params.images * params.channels;
  float sum = 0;
  if (inside) {
    const int64_t n = row / params.channels, c = row % params.channels;
    const T* x = static_cast<const T*>(params.x) + n * params.stride_n + c * params.stride_c;
    for (int64_t p = static_cast<int64_t>(lane) * kVector; p < params.positions;
         p += params.lanes * kVector) {
      float values[kVector];
      load<T, kVector>(values, x + p * params.stride_p);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum += values[v];
    }
  }
  for (int offset = params.lanes / 2; offset > 0; offset /= 2)
    sum += __shfl_down_sync(kAllLanes, sum, offset, params.lanes);
  if (inside && lane == 0) params.sums[row] = sum;
}

// One block per (n, tile of lanes * kVector channels): channels side by side, positions dealt to the rows of
// threads.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) pool_channels_kernel(const PoolParams params) {
  if (blockIdx.x == gridDim.x - 1) return count_labels(params);
  __shared__ float partial[kThreads * kVector];  // (rows, lanes * kVector)
  const int tile = params.lanes * kVector, rows = kThreads / params.lanes;
  const int64_t tiles = (params.channels + tile - 1) / tile;
  const int64_t n = blockIdx.x / tiles, first = blockIdx.x % tiles * tile;
  const int lane = threadIdx.x % params.lanes, row = threadIdx.x / params.lanes;
  const int64_t c = first + lane * kVector;
  float sums[kVector] = {};
  if (c < params.channels) {
    const T* x = static_cast<const T*>(params.x) + n * params.stride_n + c * params.stride_c;
    for (int64_t p = row; p < params.positions; p += rows) {
      float values[kVector];
      load<T, kVector>(values, x + p * params.stride_p);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[v] += values[v];
    }
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) partial[row * tile + lane * kVector + v] = sums[v];
  __syncthreads();
  for (int i = threadIdx.x; i < tile && first + i < params.channels; i += kThreads) {
    float sum = 0;
    for (int r = 0; r < rows; ++r) sum += partial[r * tile + i];
    params.sums[n * params.channels + first + i] = sum;
  }
}

struct RowParams {
  float* logits;          // (N, K), products on entry
  const float* bias;      // (K,) or null
  const int64_t* target;  // (N,)
  const float* divisor;   // ()
  float* d;               // (N, K) dlogits / P, or null
  float* losses;          // (N,)
  int64_t* hits;          // (N,)
  int64_t images, classes, positions, ignore_index;
  float smoothing;
};

// One warp per row. The butterflies leave the same bits in every lane.
__global__ void __launch_bounds__(kThreads) rows_kernel(const RowParams params) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= params.images) return;
  float* logits = params.logits + n * params.classes;
  float* d = params.d ? params.d + n * params.classes : nullptr;
  const int64_t label = params.target[n];

  Best<float> best{-INFINITY, 0};
  for (int64_t k = lane; k < params.classes; k += kWarp) {
    const float value = logit(logits[k], params.positions, params.bias ? params.bias[k] : 0.0f);
    logits[k] = value;
    best = better(best, Best<float>{value, k});
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    best = better(best, Best<float>{__shfl_xor_sync(kAllLanes, best.value, offset),
                                    static_cast<int64_t>(__shfl_xor_sync(
                                        kAllLanes, static_cast<long long>(best.index), offset))});
  if (!counts(label, params.classes, params.ignore_index)) {
    for (int64_t k = lane; d && k < params.classes; k += kWarp) d[k] = 0;
    if (lane == 0) {
      params.losses[n] = 0;
      params.hits[n] = 0;
    }
    return;
  }

  RowSums<float> sums;
  for (int64_t k = lane; k < params.classes; k += kWarp) add(sums, logits[k] - best.value);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sums.exponentials += __shfl_xor_sync(kAllLanes, sums.exponentials, offset);
    sums.shifted += __shfl_xor_sync(kAllLanes, sums.shifted, offset);
  }
  const float scale = 1.0f / (*params.divisor * static_cast<float>(params.positions));
  for (int64_t k = lane; d && k < params.classes; k += kWarp)
    d[k] = row_gradient(sums, logits[k] - best.value, k == label, params.classes, params.smoothing, scale);
  __syncwarp();  // the label's logit was written by another lane
  if (lane == 0) {
    params.losses[n] = row_loss(sums, logits[label] - best.value, params.classes, params.smoothing);
    params.hits[n] = best.index == label;
  }
}

struct FinishParams {
  const float* losses;   // (N,)
  const int64_t* hits;   // (N,)
  const float* divisor;  // ()
  const float* d;        // (N, K)
  float* loss;           // ()
  int64_t* correct;      // ()
  float* grad_bias;      // (K,)
  int64_t images, classes, positions;
};

// Block 0 sums losses and hits; each further block sums kWarp columns of d into the gradient of the bias.
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishParams params) {
  if (blockIdx.x == 0) {
    float loss = 0;
    int64_t correct = 0;
    for (int64_t n = threadIdx.x; n < params.images; n += kThreads) {
      loss += params.losses[n];
      correct += params.hits[n];
    }
    loss = block_sum(loss);
    correct = block_sum(correct);
    if (threadIdx.x == 0) {
      *params.loss = loss / *params.divisor;
      *params.correct = correct;
    }
    return;
  }
  __shared__ float partial[kThreads];  // (rows, kWarp)
  constexpr int kRows = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t k = (static_cast<int64_t>(blockIdx.x) - 1) * kWarp + lane;
  float sum = 0;
  for (int64_t n = row; k < params.classes && n < params.images; n += kRows)
    sum += params.d[n * params.classes + k];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (row == 0 && k < params.classes) {
    for (int r = 1; r < kRows; ++r) sum += partial[r * kWarp + lane];
    params.grad_bias[k] = sum * static_cast<float>(params.positions);
  }
}

template <typename T, int kVector>
void launch_pool(PoolParams params, bool channels_last, cudaStream_t stream) {
  if (channels_last) {
    params.lanes = power_of_two(ceil_div(params.channels, kVector), kWarp);
    const int64_t tiles = ceil_div(params.channels, static_cast<int64_t>(params.lanes) * kVector);
    pool_channels_kernel<T, kVector><<<blocks(params.images * tiles + 1), kThreads, 0, stream>>>(params);
  } else {
    params.lanes = power_of_two(ceil_div(params.positions, kVector), kWarp);
    const int64_t groups = ceil_div(params.images * params.channels, kThreads / params.lanes);
    pool_positions_kernel<T, kVector><<<blocks(groups + 1), kThreads, 0, stream>>>(params);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Vectors need the contiguous dimension, and every step in the others, to keep the alignment of the first
// element.
template <typename T>
void pool(const PoolParams& params, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool channels_last = params.stride_c == 1 && params.positions > 1;
  const int64_t inner = channels_last ? params.channels : params.positions;
  const int64_t inner_stride = channels_last ? params.stride_c : params.stride_p;
  const int64_t outer_stride = channels_last ? params.stride_p : params.stride_c;
  const bool aligned = inner_stride == 1 && inner % kVector == 0 && outer_stride % kVector == 0 &&
                       params.stride_n % kVector == 0 && reinterpret_cast<uintptr_t>(params.x) % 16 == 0;
  if (aligned) launch_pool<T, kVector>(params, channels_last, stream);
  else launch_pool<T, 1>(params, channels_last, stream);
}

Outputs forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target, int64_t ignore_index,
                double smoothing, bool mean, bool need_x, bool need_weight, bool need_bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const PooledProblem problem =
      make_problem(x, weight, bias, target, ignore_index, smoothing, mean, need_x, need_weight, need_bias);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  const FeatureMap& map = problem.map;
  const int64_t images = map.images, classes = problem.classes;
  const int64_t* labels = problem.target.const_data_ptr<int64_t>();

  Tensor sums = problem.empty({images, map.channels}), divisor = problem.empty({});
  const PoolParams pooling{map.tensor.const_data_ptr(),
                           images,
                           map.channels,
                           map.positions,
                           map.stride_n,
                           map.stride_c,
                           map.stride_p,
                           sums.mutable_data_ptr<float>(),
                           0,
                           labels,
                           classes,
                           ignore_index,
                           mean,
                           divisor.mutable_data_ptr<float>()};
  THO_DISPATCH_V2(x.scalar_type(), "pooled_cross_entropy", AT_WRAP([&] { pool<scalar_t>(pooling, stream); }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);

  Tensor logits = torch::stable::matmul(sums, torch::stable::transpose(problem.weight, 0, 1));
  Tensor d = problem.empty({problem.need_any() ? images : 0, classes}), losses = problem.empty({images});
  Tensor hits = torch::stable::new_empty(problem.target, {images});
  const RowParams rows{logits.mutable_data_ptr<float>(),
                       problem.bias.defined() ? problem.bias.const_data_ptr<float>() : nullptr,
                       labels,
                       divisor.const_data_ptr<float>(),
                       problem.need_any() ? d.mutable_data_ptr<float>() : nullptr,
                       losses.mutable_data_ptr<float>(),
                       hits.mutable_data_ptr<int64_t>(),
                       images,
                       classes,
                       map.positions,
                       ignore_index,
                       static_cast<float>(smoothing)};
  rows_kernel<<<blocks(ceil_div(images * kWarp, kThreads)), kThreads, 0, stream>>>(rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  Tensor loss = problem.empty({}), correct = torch::stable::new_empty(problem.target, {});
  Tensor grad_bias = problem.empty({problem.need_bias ? classes : 0});
  const FinishParams finish{losses.const_data_ptr<float>(),
                            hits.const_data_ptr<int64_t>(),
                            divisor.const_data_ptr<float>(),
                            problem.need_any() ? d.const_data_ptr<float>() : nullptr,
                            loss.mutable_data_ptr<float>(),
                            correct.mutable_data_ptr<int64_t>(),
                            problem.need_bias ? grad_bias.mutable_data_ptr<float>() : nullptr,
                            images,
                            classes,
                            map.positions};
  finish_kernel<<<blocks(1 + (problem.need_bias ? ceil_div(classes, kWarp) : 0)), kThreads, 0, stream>>>(
      finish);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  auto [grad_pooled, grad_weight] = products(problem, d, sums);
  return {loss, logits, correct, grad_pooled, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("pooled_cross_entropy.cuda", TORCH_BOX(&forward));
}

}  // namespace auglocal

// supervised_contrast on CUDA: normalise; for blocks of rows a library product, rows, library products, add;
// total and the gradient through the normalisation. The library's matmul is used for the products, so their
// float32 precision is the user's choice (torch.backends.cuda.matmul, TF32 off by default).
#include "../supervised_contrast.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <cmath>

#include "../supervised_contrast_host.h"
#include "kernel.h"

namespace auglocal {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the same bits.
__device__ float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

struct Sum {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

struct Largest {
  __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};

// One value of all threads of a block, combined in a fixed order; every thread gets it.
template <typename V, typename Combine>
__device__ V block_all(V value, Combine combine) {
  __shared__ V partial[kThreads];
  __syncthreads();  // an earlier result of the same type may still be read
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] = combine(partial[threadIdx.x], partial[threadIdx.x + half]);
    __syncthreads();
  }
  return partial[0];
}

struct NormaliseParams {
  const void* features;        // (N, D)
  int64_t stride_n, stride_d;  // in elements
  int64_t images, width;       // N, D
  float* z;                    // (N, D)
  float* norms;                // (N,)
};

// One warp per row.
template <typename T>
__global__ void __launch_bounds__(kThreads) normalise_kernel(const NormaliseParams params) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= params.images) return;
  const T* features = static_cast<const T*>(params.features) + n * params.stride_n;
  float squares = 0;
  for (int64_t d = lane; d < params.width; d += kWarp) {
    const float value = static_cast<float>(features[d * params.stride_d]);
    squares += value * value;
  }
  const float norm = std::sqrt(warp_sum(squares)), divisor = divisor_of(norm);
  for (int64_t d = lane; d < params.width; d += kWarp)
    params.z[n * params.width + d] = static_cast<float>(features[d * params.stride_d]) / divisor;
  if (lane == 0) params.norms[n] = norm;
}

struct RowParams {
  float* pairs;           // (rows, N), products on entry, then G
  const int64_t* target;  // (N,)
  float* losses;          // (N,)
  int64_t* anchors;       // (N,), 1 where the image is one
  int64_t images, first, ignore_index;
  float temperature;
  bool need_grad;
};

// One block per row. A thread meets the same elements in every pass, so it waits for nobody's writes.
__global__ void __launch_bounds__(kThreads, 6) rows_kernel(const RowParams params) {
  const int64_t image = params.first + blockIdx.x, label = params.target[image];
  float* pairs = params.pairs + static_cast<int64_t>(blockIdx.x) * params.images;

  ContrastSums<float> sums;
  float largest = -INFINITY;
  for (int64_t a = threadIdx.x; a < params.images; a += kThreads) {
    const int64_t other = params.target[a];
    if (a == image || !stands(other, params.ignore_index)) continue;
    sums.count += other == label;
    largest = Largest()(largest, pairs[a]);
  }
  sums.count = block_all(sums.count, Sum());
  if (!stands(label, params.ignore_index) || sums.count == 0) {
    for (int64_t a = threadIdx.x; params.need_grad && a < params.images; a += kThreads) pairs[a] = 0;
    if (threadIdx.x == 0) {
      params.losses[image] = 0;
      params.anchors[image] = 0;
    }
    return;
  }

  largest = block_all(largest, Largest());
  for (int64_t a = threadIdx.x; a < params.images; a += kThreads) {
    const int64_t other = params.target[a];
    if (a == image || !stands(other, params.ignore_index)) continue;
    const float shifted = shifted_logit(pairs[a], largest, params.temperature);
    sums.exponentials += std::exp(shifted);
    if (other == label) sums.positives += shifted;
  }
  sums.exponentials = block_all(sums.exponentials, Sum());
  sums.positives = block_all(sums.positives, Sum());
  for (int64_t a = threadIdx.x; params.need_grad && a < params.images; a += kThreads) {
    const int64_t other = params.target[a];
    const bool left_out = a == image || !stands(other, params.ignore_index);
    // Made anew, which costs less than to write it and read it again.
    const float exponential = std::exp(shifted_logit(pairs[a], largest, params.temperature));
    pairs[a] = left_out ? 0.0f : contrast_gradient(exponential, other == label, sums);
  }
  if (threadIdx.x == 0) {
    params.losses[image] = contrast_loss(sums);
    params.anchors[image] = 1;
  }
}

struct AddParams {
  float* dz;                             // (N, D)
  const float* down;                     // (N, D), G^T z_block
  const float* across;                   // (rows, D), G z, for the rows from `first`
  int64_t width, first, rows, elements;  // D, ..., N D
};

__global__ void __launch_bounds__(kThreads) add_kernel(const AddParams params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.elements) return;
  const int64_t own = i - params.first * params.width;
  const bool inside = own >= 0 && own < params.rows * params.width;
  const float sum = params.down[i] + (inside ? params.across[own] : 0.0f);
  params.dz[i] = params.first == 0 ? sum : params.dz[i] + sum;
}

struct TotalParams {
  const float* losses;     // (N,)
  const int64_t* anchors;  // (N,)
  float* loss;             // ()
  float* scale;            // (), 1 / (t |A|)
  int64_t images;
  float temperature;
};

// One block.
__global__ void __launch_bounds__(kThreads) total_kernel(const TotalParams params) {
  float loss = 0;
  int64_t anchors = 0;
  for (int64_t n = threadIdx.x; n < params.images; n += kThreads) {
    loss += params.losses[n];
    anchors += params.anchors[n];
  }
  loss = block_all(loss, Sum());
  anchors = at_least_one(block_all(anchors, Sum()));
  if (threadIdx.x == 0) {
    *params.loss = loss / static_cast<float>(anchors);
    *params.scale = 1.0f / (params.temperature * static_cast<float>(anchors));
  }
}

struct GradParams {
  float* dz;           // (N, D), times t |A| on entry, then the gradient of the features
  const float* z;      // (N, D)
  const float* norms;  // (N,)
  const float* scale;  // ()
  int64_t images, width;
};

// One warp per row.
__global__ void __launch_bounds__(kThreads) grad_kernel(const GradParams params) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= params.images) return;
  float* dz = params.dz + n * params.width;
  const float* z = params.z + n * params.width;
  float inner = 0;
  for (int64_t d = lane; d < params.width; d += kWarp) inner += dz[d] * z[d];
  inner = warp_sum(inner);
  for (int64_t d = lane; d < params.width; d += kWarp)
    dz[d] = feature_gradient(dz[d], z[d], inner, params.norms[n], *params.scale);
}

// Blocks for one warp per row.
unsigned warps(int64_t rows) {
  return blocks(ceil_div(rows * kWarp, kThreads));
}

template <typename T>
void normalise(const NormaliseParams& params, cudaStream_t stream) {
  normalise_kernel<T><<<warps(params.images), kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

ContrastOutputs forward(Tensor features, Tensor target, double temperature, int64_t ignore_index,
                        bool need_grad) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device());
  const ContrastProblem problem = make_contrast(features, target, temperature, ignore_index, need_grad);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(features.get_device(), &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  const int64_t images = problem.images, width = problem.width;

  Tensor z = problem.empty({images, width}), norms = problem.empty({images});
  const NormaliseParams normalising{features.const_data_ptr(),
                                    features.stride(0),
                                    features.stride(1),
                                    images,
                                    width,
                                    z.mutable_data_ptr<float>(),
                                    norms.mutable_data_ptr<float>()};
  THO_DISPATCH_V2(features.scalar_type(), "supervised_contrast",
                  AT_WRAP([&] { normalise<scalar_t>(normalising, stream); }), ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);

  Tensor losses = problem.empty({images}), anchors = torch::stable::new_empty(problem.target, {images});
  Tensor dz = need_grad ? problem.empty({images, width}) : problem.empty({0});
  walk_pairs(
      problem, z,
      [&](const PairRows& pairs) {
        const RowParams rows{pairs.matrix.mutable_data_ptr<float>(),
                             problem.target.const_data_ptr<int64_t>(),
                             losses.mutable_data_ptr<float>(),
                             anchors.mutable_data_ptr<int64_t>(),
                             images,
                             pairs.first,
                             ignore_index,
                             static_cast<float>(temperature),
                             need_grad};
        rows_kernel<<<blocks(pairs.count), kThreads, 0, stream>>>(rows);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      },
      [&](const Tensor& down, const Tensor& across, const PairRows& pairs) {
        const AddParams add{dz.mutable_data_ptr<float>(),
                            down.const_data_ptr<float>(),
                            across.const_data_ptr<float>(),
                            width,
                            pairs.first,
                            pairs.count,
                            images * width};
        add_kernel<<<blocks(ceil_div(images * width, kThreads)), kThreads, 0, stream>>>(add);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });

  Tensor loss = problem.empty({}), scale = problem.empty({});
  const TotalParams total{losses.const_data_ptr<float>(),
                          anchors.const_data_ptr<int64_t>(),
                          loss.mutable_data_ptr<float>(),
                          scale.mutable_data_ptr<float>(),
                          images,
                          static_cast<float>(temperature)};
  total_kernel<<<blocks(1), kThreads, 0, stream>>>(total);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!need_grad) return {loss, dz};

  const GradParams grad{dz.mutable_data_ptr<float>(),
                        z.const_data_ptr<float>(),
                        norms.const_data_ptr<float>(),
                        scale.const_data_ptr<float>(),
                        images,
                        width};
  grad_kernel<<<warps(images), kThreads, 0, stream>>>(grad);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("supervised_contrast.cuda", TORCH_BOX(&forward));
}

}  // namespace auglocal

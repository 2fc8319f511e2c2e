// similarity_loss on CUDA: statistics, rows, then for blocks of rows a library product, pairs, a library
// product and their gradients; backward is one pass over the map.
// The library's matmul is used for the products, so their float32 precision is the user's choice
// (torch.backends.cuda.matmul, TF32 off by default) as it is for torch.matmul.
#include "../similarity_loss.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <cmath>

#include "../similarity_loss_host.h"
#include "kernel.h"

namespace auglocal {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kPairs = int64_t(1) << 20;  // whose similarities are made at a time: 4 MiB

struct Map {
  void* data;
  int64_t stride_n, stride_c, stride_p;  // in elements
};

struct MapParams {
  Map z, out;                           // (N, C, P); out: dz
  int64_t images, channels, positions;  // N, C, P
  int lanes;                            // threads side by side along the inner dimension, a power of two
  float *mean, *deviation;              // (N, C); the means are read by the backward pass
  const float *factor, *grad;           // (N, C), ()
};

// A thread's way through a map. Along the positions `lanes` threads share one (n, c); along the channels a
// block has one image and a tile of channels, and its rows of threads are dealt the positions.
template <int kVector, bool kChannels>
struct Place {
  int64_t n, c;         // image, first channel
  int64_t first, step;  // positions
  bool inside;

  __device__ explicit Place(const MapParams& params) {
    const int lane = threadIdx.x % params.lanes, group = threadIdx.x / params.lanes;
    if constexpr (kChannels) {
      const int64_t tile = static_cast<int64_t>(params.lanes) * kVector;
      const int64_t tiles = (params.channels + tile - 1) / tile;
      n = blockIdx.x / tiles;
      c = blockIdx.x % tiles * tile + static_cast<int64_t>(lane) * kVector;
      inside = c < params.channels;
      first = group;
      step = kThreads / params.lanes;
    } else {
      const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / params.lanes) + group;
      inside = row < params.images * params.channels;
      n = row / params.channels;
      c = row % params.channels;
      first = static_cast<int64_t>(lane) * kVector;
      step = static_cast<int64_t>(params.lanes) * kVector;
    }
  }

  template <typename T>
  __device__ __forceinline__ T* at(const Map& map, int64_t p) const {
    return static_cast<T*>(map.data) + n * map.stride_n + c * map.stride_c + p * map.stride_p;
  }
};

__device__ void store_statistics(const MapParams& params, int64_t row, float origin,
                                 const Moments<float>& all) {
  params.mean[row] = origin + all.mean;
  params.deviation[row] = deviation(all);
}

// Each thread's sums are of differences to the first value it met, and are merged in a fixed order.
template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const MapParams params) {
  constexpr int kOwn = kChannels ? kVector : 1;
  __shared__ Moments<float> partial[kThreads * kOwn];
  const Place<kVector, kChannels> place(params);
  float shift[kVector] = {};
  Shifted<float> sums[kVector] = {};
  int count = 0;
  if (place.inside) {
    if (place.first < params.positions) load<T, kVector>(shift, place.template at<T>(params.z, place.first));
    for (int64_t p = place.first; p < params.positions; p += place.step, ++count) {
      float values[kVector];
      load<T, kVector>(values, place.template at<T>(params.z, p));
#pragma unroll
      for (int v = 0; v < kVector; ++v) add(sums[v], values[v] - shift[v]);
    }
  }
  Moments<float> found[kOwn] = {};
  if (count > 0) {
    const T* origin = place.template at<T>(params.z, 0);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int own = kChannels ? v : 0;
      const Moments<float> part = moments(sums[v], static_cast<float>(count), shift[v],
                                          static_cast<float>(origin[own * params.z.stride_c]));
      found[own] = merged(found[own], part);
    }
  }
#pragma unroll
  for (int v = 0; v < kOwn; ++v) partial[threadIdx.x * kOwn + v] = found[v];
  __syncthreads();
  if constexpr (kChannels) {
    const int tile = params.lanes * kVector;
    for (int half = kThreads * kVector / 2; half >= tile; half /= 2) {
      for (int i = threadIdx.x; i < half; i += kThreads) partial[i] = merged(partial[i], partial[i + half]);
      __syncthreads();
    }
    if (!place.inside || threadIdx.x >= params.lanes) return;
    const T* origin = place.template at<T>(params.z, 0);
    for (int v = 0; v < kVector; ++v)
      store_statistics(params, place.n * params.channels + place.c + v,
                       static_cast<float>(origin[v * params.z.stride_c]), partial[threadIdx.x * kVector + v]);
  } else {
    const int lane = threadIdx.x % params.lanes;
    for (int half = params.lanes / 2; half > 0; half /= 2) {
      if (lane < half) partial[threadIdx.x] = merged(partial[threadIdx.x], partial[threadIdx.x + half]);
      __syncthreads();
    }
    if (!place.inside || lane != 0) return;
    store_statistics(params, place.n * params.channels + place.c,
                     static_cast<float>(*place.template at<T>(params.z, 0)), partial[threadIdx.x]);
  }
}

// dz = grad_loss (z - mean) factor
template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) input_grad_kernel(const MapParams params) {
  constexpr int kOwn = kChannels ? kVector : 1;
  const Place<kVector, kChannels> place(params);
  if (!place.inside) return;
  const int64_t row = place.n * params.channels + place.c;
  float mean[kOwn], scale[kOwn];
#pragma unroll
  for (int v = 0; v < kOwn; ++v) {
    mean[v] = params.mean[row + v];
    scale[v] = *params.grad * params.factor[row + v];
  }
  for (int64_t p = place.first; p < params.positions; p += place.step) {
    float values[kVector];
    load<T, kVector>(values, place.template at<T>(params.z, p));
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      values[v] = (values[v] - mean[kChannels ? v : 0]) * scale[kChannels ? v : 0];
    store<T, kVector>(place.template at<T>(params.out, p), values);
  }
}

// The same bits in every lane.
__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

struct RowParams {
  int64_t images, channels, positions;  // N, C, P
  const int64_t* target;                // (N,)
  int64_t classes, ignore_index;
  const float* features;  // (N, C), deviations or vectors
  float *unit, *length;   // (N, C), (N,)
  float* count;           // (), V
  bool is_map;

  int64_t first, rows;      // of the block
  const float* products;    // (rows, C), gradients of the rows of unit length but for 4 / V^2
  float* factor;            // (N, C)
  float *similar, *losses;  // (rows, N), (N,)
  Wanted<float> wanted;
  float* loss;  // ()

  __device__ bool counted(int64_t n) const { return counts(target[n], classes, ignore_index); }
};

// One warp per row; the last block counts labels, which nobody needs before a later launch.
__global__ void __launch_bounds__(kThreads) normalise_kernel(const RowParams params) {
  if (blockIdx.x == gridDim.x - 1) {
    float count = 0;
    for (int64_t n = threadIdx.x; n < params.images; n += kThreads) count += params.counted(n);
    count = block_sum(count);
    if (threadIdx.x == 0) *params.count = count;
    return;
  }
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= params.images) return;
  const float* in = params.features + n * params.channels;
  float* out = params.unit + n * params.channels;
  float sum = 0, squares = 0;
  for (int64_t c = lane; c < params.channels; c += kWarp) sum += in[c];
  const float mean = warp_sum(sum) / static_cast<float>(params.channels);
  for (int64_t c = lane; c < params.channels; c += kWarp) squares += (in[c] - mean) * (in[c] - mean);
  const float length = std::sqrt(warp_sum(squares));
  const bool counted = params.counted(n);
  for (int64_t c = lane; c < params.channels; c += kWarp)
    out[c] = counted ? (in[c] - mean) / (length + static_cast<float>(kLengthEps)) : 0.0f;
  if (lane == 0) params.length[n] = length;
}

// One block per row of similarities; the differences take their place.
__global__ void __launch_bounds__(kThreads) pairs_kernel(const RowParams params) {
  const int64_t n = params.first + blockIdx.x, label = params.target[n];
  float* row = params.similar + static_cast<int64_t>(blockIdx.x) * params.images;
  const bool counted = params.counted(n);
  float sum = 0;
  for (int64_t j = threadIdx.x; j < params.images; j += kThreads) {
    Pair<float> found{0, 0};
    if (counted && params.counted(j))
      found = pair(row[j], params.target[j] == label ? params.wanted.same : params.wanted.different);
    sum += found.square;
    row[j] = found.gradient;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) params.losses[n] = sum;
}

// One warp per row of products: the factors of dz, or for vectors dz itself.
__global__ void __launch_bounds__(kThreads) gradient_kernel(const RowParams params) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t n = params.first + row;
  const int lane = threadIdx.x % kWarp;
  if (row >= params.rows) return;
  const float *g = params.products + row * params.channels, *unit = params.unit + n * params.channels;
  float* out = params.factor + n * params.channels;
  if (!params.counted(n)) {
    for (int64_t c = lane; c < params.channels; c += kWarp) out[c] = 0;
    return;
  }
  float dot = 0, sum = 0;
  for (int64_t c = lane; c < params.channels; c += kWarp) dot += unit[c] * g[c];
  const RowGradient<float> gradient =
      row_gradient(params.length[n], warp_sum(dot), 4 / (*params.count * *params.count));
  for (int64_t c = lane; c < params.channels; c += kWarp)
    sum += gradient.along * g[c] - gradient.across * unit[c];
  const float mean = warp_sum(sum) / static_cast<float>(params.channels);
  for (int64_t c = lane; c < params.channels; c += kWarp) {
    const float value = gradient.along * g[c] - gradient.across * unit[c] - mean;
    out[c] = params.is_map
                 ? deviation_factor(value, params.features[n * params.channels + c], params.positions)
                 : value;
  }
}

__global__ void __launch_bounds__(kThreads) total_kernel(const RowParams params) {
  float sum = 0;
  for (int64_t n = threadIdx.x; n < params.images; n += kThreads) sum += params.losses[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *params.loss = sum / *params.count / *params.count;
}

enum class Pass { kStatistics, kInputGrad };

template <Pass kPass, typename T, int kVector, bool kChannels>
void launch(MapParams params, cudaStream_t stream) {
  const int64_t inner = ceil_div(kChannels ? params.channels : params.positions, kVector);
  // A large map is read by the whole block, so that the sums stay short.
  params.lanes = power_of_two(inner, !kChannels && inner > kThreads ? kThreads : kWarp);
  const int64_t groups = kThreads / params.lanes;
  const unsigned grid = blocks(kChannels ? params.images * ceil_div(inner, params.lanes)
                                         : ceil_div(params.images * params.channels, groups));
  if constexpr (kPass == Pass::kStatistics)
    statistics_kernel<T, kVector, kChannels><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kInputGrad)
    input_grad_kernel<T, kVector, kChannels><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Vectors need the inner dimension to lie together, and every step in the others to keep the alignment of the
// first element.
template <typename T>
bool aligned(const Map& map, const MapParams& params, bool channels) {
  constexpr int64_t kVector = 16 / sizeof(T);
  return !map.data || ((channels ? map.stride_c : map.stride_p) == 1 &&
                       (channels ? params.channels : params.positions) % kVector == 0 &&
                       (channels ? map.stride_p : map.stride_c) % kVector == 0 &&
                       map.stride_n % kVector == 0 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0);
}

template <Pass kPass, typename T>
void run(const MapParams& params, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool channels = params.z.stride_c == 1 && params.z.stride_p != 1;
  const bool vectors = aligned<T>(params.z, params, channels) && aligned<T>(params.out, params, channels);
  if (vectors && channels) launch<kPass, T, kVector, true>(params, stream);
  else if (vectors) launch<kPass, T, kVector, false>(params, stream);
  else if (channels) launch<kPass, T, 1, true>(params, stream);
  else launch<kPass, T, 1, false>(params, stream);
}

// Calls f with an element of z's dtype.
template <typename F>
void dispatch(const Tensor& z, const F& f) {
  THO_DISPATCH_V2(z.scalar_type(), "similarity_loss", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
}

Map map_of(const FeatureMap& map) {
  return {const_cast<void*>(map.tensor.const_data_ptr()), map.stride_n, map.stride_c, map.stride_p};
}

MapParams map_params(const FeatureMap& z) {
  MapParams params{};
  params.z = map_of(z);
  params.images = z.images;
  params.channels = z.channels;
  params.positions = z.positions;
  return params;
}

cudaStream_t current_stream(const Tensor& z) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(z.get_device(), &current));
  return static_cast<cudaStream_t>(current);
}

unsigned warps(int64_t rows) {
  return blocks(ceil_div(rows * kWarp, kThreads));
}

Outputs forward(Tensor z, Tensor target, int64_t classes, int64_t ignore_index, bool need_grad) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device());
  const cudaStream_t stream = current_stream(z);
  const SimilarityProblem problem = make_problem(z, target, classes, ignore_index, need_grad);
  const int64_t images = problem.z.images;
  Tensor mean = problem.per_channel(problem.is_map);
  Tensor features = problem.is_map ? problem.per_channel() : problem.vectors();
  if (problem.is_map) {
    MapParams params = map_params(problem.z);
    params.mean = mean.mutable_data_ptr<float>();
    params.deviation = features.mutable_data_ptr<float>();
    dispatch(z, [&](auto element) { run<Pass::kStatistics, decltype(element)>(params, stream); });
  }

  Tensor unit = problem.per_channel(), length = problem.empty({images}), count = problem.empty({});
  Tensor factor = problem.per_channel(need_grad), losses = problem.empty({images}), loss = problem.empty({});
  RowParams rows{};
  rows.images = images;
  rows.channels = problem.z.channels;
  rows.positions = problem.z.positions;
  rows.target = problem.target.const_data_ptr<int64_t>();
  rows.classes = classes;
  rows.ignore_index = ignore_index;
  rows.features = features.const_data_ptr<float>();
  rows.unit = unit.mutable_data_ptr<float>();
  rows.length = length.mutable_data_ptr<float>();
  rows.count = count.mutable_data_ptr<float>();
  rows.is_map = problem.is_map;
  rows.factor = need_grad ? factor.mutable_data_ptr<float>() : nullptr;
  rows.losses = losses.mutable_data_ptr<float>();
  rows.wanted = wanted<float>(classes);
  rows.loss = loss.mutable_data_ptr<float>();
  normalise_kernel<<<warps(images) + 1, kThreads, 0, stream>>>(rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const auto pairs = [&](int64_t first, int64_t height, const Tensor& similar) {
    rows.first = first;
    rows.similar = similar.mutable_data_ptr<float>();
    pairs_kernel<<<blocks(height), kThreads, 0, stream>>>(rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const auto gradient = [&](int64_t first, int64_t height, const Tensor& products) {
    rows.first = first;
    rows.rows = height;
    rows.products = products.const_data_ptr<float>();
    gradient_kernel<<<warps(height), kThreads, 0, stream>>>(rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  for_each_block(problem, unit, kPairs, pairs, gradient);
  total_kernel<<<1, kThreads, 0, stream>>>(rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, need_grad ? mean : problem.empty({0}), factor};
}

Tensor similarity_loss_input_grad(Tensor z, Tensor mean, Tensor factor, Tensor grad_loss) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device());
  const cudaStream_t stream = current_stream(z);
  const InputGradProblem problem = make_input_grad_problem(z, mean, factor, grad_loss);
  Tensor grad_z = empty_map(z);
  MapParams params = map_params(problem.z);
  params.out = map_of(feature_map(grad_z));
  params.mean = const_cast<float*>(problem.mean.const_data_ptr<float>());
  params.factor = problem.factor.const_data_ptr<float>();
  params.grad = problem.grad.const_data_ptr<float>();
  dispatch(z, [&](auto element) { run<Pass::kInputGrad, decltype(element)>(params, stream); });
  return grad_z;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("similarity_loss.cuda", TORCH_BOX(&forward));
  m.impl("similarity_loss_input_grad.cuda", TORCH_BOX(&similarity_loss_input_grad));
}

}  // namespace auglocal

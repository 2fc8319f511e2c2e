// batch_norm_act_max_pool on CUDA: forward one thread per result (or per vector of its channels), backward a
// reduction over the results, whose indices lead to their elements of x, and one thread per vector of x that
// gathers from the windows around it.
//
// No map but x is read more than a few times over, and what neighbours read again lies in the caches.
#include "../batch_norm_act_max_pool.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../batch_norm_act_max_pool_host.h"
#include "../divider.h"
#include "kernel.h"

namespace auglocal {
namespace {

// Blocks of a reduction: they fill any GPU several times over. The same on all of them, and so are the bits.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kMostSteps = 512;  // of a thread that adds up in float32

// Where a thread's elements are: a flat number in the order (N, H, W, C) or (N, C, H, W), taken apart.
struct Order {
  Divider inner, middle, outer;
  int64_t count;
  bool channels;
};

struct Place {
  int64_t n, c;
  int h, w;
};

struct Params {
  const void* x;     // (N, C, H, W)
  void* out;         // y (N, C, H', W'), or the gradient of x
  uint8_t* indices;  // (N, C, H', W')
  const void* grad;  // (N, C, H', W')
  Strides x_strides, out_strides, indices_strides, grad_strides;
  const float *mean, *rstd, *weight, *bias;  // (C,); weight and bias may be null
  const float *sum_g, *sum_g_xhat;           // (C,) or null
  float slope, count;                        // N H W
  int64_t images, channels;
  int height, width, pooled_height, pooled_width;
  PoolWindow window;
  Order order;
};

__device__ __forceinline__ int64_t offset(const Strides& strides, int64_t n, int64_t c, int64_t h,
                                          int64_t w) {
  return n * strides.n + c * strides.c + h * strides.h + w * strides.w;
}

// kVector counts channels in the first order and columns in the second one.
template <int kVector>
__device__ __forceinline__ Place place(const Order& order, int64_t i) {
  const int64_t a = order.inner.divide(i), b = order.middle.divide(a), n = order.outer.divide(b);
  const int64_t first = (i - a * order.inner.divisor) * kVector, second = a - b * order.middle.divisor,
                third = b - n * order.outer.divisor;
  if (order.channels) return {n, first, static_cast<int>(third), static_cast<int>(second)};
  return {n, third, static_cast<int>(second), static_cast<int>(first)};
}

__device__ __forceinline__ Channel<float> channel_of(const Params& params, int64_t c) {
  return {params.mean[c], params.weight ? params.rstd[c] * params.weight[c] : params.rstd[c],
          params.bias ? params.bias[c] : 0.0f};
}

// The window of the ImageNet stem is known when this is compiled: loops unroll and divisions are shifts.
template <bool kStem>
__device__ __forceinline__ PoolWindow window_of(const Params& params) {
  if constexpr (kStem) return {3, 3, 2, 2, params.window.padding_h, params.window.padding_w};
  else return params.window;
}

template <typename T, int kVector, bool kStem>
__global__ void __launch_bounds__(kThreads) apply_kernel(const Params params) {
  constexpr int kColumns = kStem ? 3 : 1;  // loaded before the first of them is looked at
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.order.count) return;
  const Place at = place<kVector>(params.order, i);
  const PoolWindow window = window_of<kStem>(params);
  const int top = at.h * window.stride_h - window.padding_h, left = at.w * window.stride_w - window.padding_w;
  const T* x = static_cast<const T*>(params.x) + offset(params.x_strides, at.n, at.c, 0, 0);
  const int origin = (top < 0 ? -top : 0) * window.kernel_w + (left < 0 ? -left : 0);

  Channel<float> channels[kVector];
  float largest[kVector];
  int found[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    channels[v] = channel_of(params, at.c + v);
    largest[v] = -INFINITY;
    found[v] = origin;
  }
#pragma unroll(kStem ? 3 : 1)
  for (int row = 0; row < window.kernel_h; ++row) {
    const int h = top + row;
    const bool row_inside = h >= 0 && h < params.height;
    for (int first = 0; first < window.kernel_w; first += kColumns) {
      float values[kColumns][kVector];
      bool inside[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int w = left + first + j;
        inside[j] = row_inside && w >= 0 && w < params.width;
        if (inside[j]) load<T, kVector>(values[j], x + offset(params.x_strides, 0, 0, h, w));
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (!inside[j]) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float value = pooled_value<T>(channels[v], values[j][v], params.slope);
          if (takes_over(value, largest[v])) {
            largest[v] = value;
            found[v] = row * window.kernel_w + first + j;
          }
        }
      }
    }
  }
  store<T, kVector>(static_cast<T*>(params.out) + offset(params.out_strides, at.n, at.c, at.h, at.w),
                    largest);
  Pack<uint8_t, kVector> pack;
#pragma unroll
  for (int v = 0; v < kVector; ++v) pack.values[v] = static_cast<uint8_t>(found[v]);
  uint8_t* indices = params.indices + offset(params.indices_strides, at.n, at.c, at.h, at.w);
  *reinterpret_cast<Pack<uint8_t, kVector>*>(indices) = pack;
}

// Sums of g and of g (x - mean).
struct Sums {
  float g, g_difference;
};

__device__ __forceinline__ void add(Sums& sums, const Sums& other) {
  sums.g += other.g;
  sums.g_difference += other.g_difference;
}

// Adds up the values of the threads that are `width` apart, always in the same order; partial[0 ... width)
// holds the result. kThreads is a multiple of `width`, which is a power of two.
__device__ void add_rows(Sums (&partial)[kThreads], int width) {
  __syncthreads();
  for (int half = kThreads / 2; half >= width; half /= 2) {
    if (threadIdx.x < half) add(partial[threadIdx.x], partial[threadIdx.x + half]);
    __syncthreads();
  }
}

struct ReduceParams {
  Params map;
  Divider columns;    // W'
  Divider positions;  // H' W'
  int64_t count;      // results of a channel, N H' W'
  int64_t chunk;      // of them that a block adds up
  int64_t tiles;      // blocks side by side
  int lanes;          // channels of a block, a power of two
  Sums* partial;      // (splits, C)
};

// A block adds up `chunk` results of `lanes` channels. Results side by side in memory are those of
// neighbouring threads: channels in channels-last maps, and positions, of one channel, in others.
template <typename T, bool kStem>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const ReduceParams params) {
  __shared__ Sums partial[kThreads];
  const Params& map = params.map;
  const PoolWindow window = window_of<kStem>(map);
  const int lane = threadIdx.x % params.lanes, rows = kThreads / params.lanes;
  const int64_t tile = blockIdx.x % params.tiles, split = blockIdx.x / params.tiles;
  const int64_t c = tile * params.lanes + lane;
  const int64_t begin = split * params.chunk + threadIdx.x / params.lanes;
  const int64_t end = (split + 1) * params.chunk < params.count ? (split + 1) * params.chunk : params.count;
  Sums sums{0, 0};
  if (c < map.channels) {
    const Channel<float> channel = channel_of(map, c);
    for (int64_t m = begin; m < end; m += rows) {
      const int64_t n = params.positions.divide(m), p = m - n * params.positions.divisor;
      const int64_t oh = params.columns.divide(p), ow = p - oh * params.columns.divisor;
      const unsigned index = map.indices[offset(map.indices_strides, n, c, oh, ow)];
      const unsigned kernel_w = window.kernel_w, row = index / kernel_w, column = index - row * kernel_w;
      const float x = static_cast<float>(static_cast<const T*>(
          map.x)[offset(map.x_strides, n, c, oh * window.stride_h - window.padding_h + row,
                        ow * window.stride_w - window.padding_w + column)]);
      const float grad =
          static_cast<float>(static_cast<const T*>(map.grad)[offset(map.grad_strides, n, c, oh, ow)]);
      const float g = activated(grad, normalised(channel, x), map.slope);
      add(sums, Sums{g, g * (x - channel.mean)});
    }
  }
  partial[threadIdx.x] = sums;
  add_rows(partial, params.lanes);
  if (threadIdx.x < params.lanes && c < map.channels)
    params.partial[split * map.channels + c] = partial[threadIdx.x];
}

struct FinishParams {
  const Sums* partial;  // (splits, C)
  int64_t splits, channels;
  const float* rstd;          // (C,)
  float *sum_g, *sum_g_xhat;  // (C,)
};

// One block per channel.
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishParams params) {
  __shared__ Sums partial[kThreads];
  const int64_t c = blockIdx.x;
  Sums sums{0, 0};
  for (int64_t split = threadIdx.x; split < params.splits; split += kThreads)
    add(sums, params.partial[split * params.channels + c]);
  partial[threadIdx.x] = sums;
  add_rows(partial, 1);
  if (threadIdx.x != 0) return;
  params.sum_g[c] = partial[0].g;
  params.sum_g_xhat[c] = partial[0].g_difference * params.rstd[c];
}

// What each element of a vector gets from its windows, in the order of the windows: kVector channels of one
// position, or kVector columns of one channel.
template <typename T, int kVector, bool kChannels, bool kStem>
__device__ __forceinline__ void gather(float (&g)[kVector], const Params& params, const Place& at) {
  constexpr int kColumns = kChannels ? 1 : kVector, kWide = kChannels ? kVector : 1;
  const PoolWindow window = window_of<kStem>(params);
  const int last_row = last_window(at.h, window.stride_h, window.padding_h, params.pooled_height);
  const int first_column = first_window(at.w, window.kernel_w, window.stride_w, window.padding_w);
  const int last_column =
      last_window(at.w + kColumns - 1, window.stride_w, window.padding_w, params.pooled_width);
  for (int oh = first_window(at.h, window.kernel_h, window.stride_h, window.padding_h); oh <= last_row;
       ++oh) {
    const int before = (at.h - (oh * window.stride_h - window.padding_h)) * window.kernel_w;
    for (int ow = first_column; ow <= last_column; ++ow) {
      const Pack<uint8_t, kWide> found = *reinterpret_cast<const Pack<uint8_t, kWide>*>(
          params.indices + offset(params.indices_strides, at.n, at.c, oh, ow));
      float grad[kWide];
      load<T, kWide>(grad,
                     static_cast<const T*>(params.grad) + offset(params.grad_strides, at.n, at.c, oh, ow));
      const int shift = ow * window.stride_w - window.padding_w - at.w;  // first column of the window
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        // In the window's row of this element, its column; outside of it where the window does not cover it.
        const int column = static_cast<int>(found.values[kChannels ? v : 0]) - before;
        const bool here = column >= 0 && column < window.kernel_w && shift + column == (kChannels ? 0 : v);
        g[v] += here ? grad[kChannels ? v : 0] : 0.0f;
      }
    }
  }
}

template <typename T, int kVector, bool kChannels, bool kStem>
__global__ void __launch_bounds__(kThreads) input_grad_kernel(const Params params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.order.count) return;
  const Place at = place<kVector>(params.order, i);
  float x[kVector], g[kVector] = {};
  load<T, kVector>(x, static_cast<const T*>(params.x) + offset(params.x_strides, at.n, at.c, at.h, at.w));
  gather<T, kVector, kChannels, kStem>(g, params, at);
  Channel<float> channel = channel_of(params, at.c);
  Backward<float> backward{0, 0};
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if (kChannels || v == 0) {
      const int64_t c = at.c + v;
      channel = channel_of(params, c);
      if (params.sum_g)
        backward = {params.sum_g[c] / params.count, params.rstd[c] * (params.sum_g_xhat[c] / params.count)};
    }
    g[v] = activated(g[v], normalised(channel, x[v]), params.slope);
    x[v] = input_gradient(channel, backward, g[v], x[v]);
  }
  store<T, kVector>(static_cast<T*>(params.out) + offset(params.out_strides, at.n, at.c, at.h, at.w), x);
}

cudaStream_t current_stream(const Tensor& x) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &current));
  return static_cast<cudaStream_t>(current);
}

const float* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

// A map whose elements along its inner dimension can be moved `vector` at a time.
bool aligned(const void* first, const Strides& strides, bool channels, int64_t vector, int64_t bytes) {
  const int64_t inner = channels ? strides.c : strides.w, other = channels ? strides.w : strides.c;
  return inner == 1 && other % vector == 0 && strides.h % vector == 0 && strides.n % vector == 0 &&
         reinterpret_cast<uintptr_t>(first) % bytes == 0;
}

Order order_of(const MaxPoolProblem& problem, int64_t height, int64_t width, int64_t vector) {
  const bool channels = problem.channels_last;
  const int64_t inner = (channels ? problem.channels : width) / vector;
  return {Divider(inner), Divider(channels ? width : height), Divider(channels ? height : problem.channels),
          problem.images * (channels ? height * width : height * problem.channels) * inner, channels};
}

Params make_params(const MaxPoolProblem& problem, const Tensor& indices) {
  Params params{};
  params.x = problem.x.const_data_ptr();
  params.x_strides = strides_of(problem.x);
  params.indices = const_cast<uint8_t*>(indices.const_data_ptr<uint8_t>());
  params.indices_strides = strides_of(indices);
  params.mean = data(problem.mean);
  params.rstd = data(problem.rstd);
  params.weight = data(problem.weight);
  params.bias = data(problem.bias);
  params.slope = static_cast<float>(problem.slope);
  params.count = static_cast<float>(problem.count());
  params.images = problem.images;
  params.channels = problem.channels;
  params.height = problem.height;
  params.width = problem.width;
  params.pooled_height = problem.pooled_height;
  params.pooled_width = problem.pooled_width;
  params.window = problem.window;
  return params;
}

void set_grad(Params& params, const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices) {
  problem.check_pooled(grad, problem.x.scalar_type(), "grad");
  problem.check_pooled(indices, ScalarType::Byte, "indices");
  params.grad = grad.const_data_ptr();
  params.grad_strides = strides_of(grad);
}

void set_out(Params& params, Tensor& out) {
  params.out = out.mutable_data_ptr();
  params.out_strides = strides_of(out);
}

bool is_stem(const PoolWindow& window) {
  return window.kernel_h == 3 && window.kernel_w == 3 && window.stride_h == 2 && window.stride_w == 2;
}

// Calls f with an element of x's dtype and with whether the window is that of the stem.
template <typename F>
void dispatch(const MaxPoolProblem& problem, const F& f) {
  THO_DISPATCH_V2(problem.x.scalar_type(), "batch_norm_act_max_pool", AT_WRAP([&] {
                    if (is_stem(problem.window)) f(scalar_t(), std::true_type());
                    else f(scalar_t(), std::false_type());
                  }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

template <typename T, int kVector, bool kStem>
void launch_apply(Params& params, const MaxPoolProblem& problem, cudaStream_t stream) {
  params.order = order_of(problem, problem.pooled_height, problem.pooled_width, kVector);
  const unsigned grid = blocks(ceil_div(params.order.count, kThreads));
  apply_kernel<T, kVector, kStem><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int kVector, bool kChannels, bool kStem>
void launch_input_grad(Params& params, const MaxPoolProblem& problem, cudaStream_t stream) {
  params.order = order_of(problem, problem.height, problem.width, kVector);
  const unsigned grid = blocks(ceil_div(params.order.count, kThreads));
  input_grad_kernel<T, kVector, kChannels, kStem><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

TwoTensors batch_norm_act_max_pool_apply(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                                         std::optional<Tensor> bias, double slope, int64_t kernel_h,
                                         int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                         int64_t padding_h, int64_t padding_w) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  Tensor y = problem.empty_pooled(x.scalar_type()), indices = problem.empty_pooled(ScalarType::Byte);
  Params params = make_params(problem, indices);
  set_out(params, y);
  dispatch(problem, [&](auto element, auto stem) {
    using T = decltype(element);
    constexpr int kVector = 16 / sizeof(T);
    // The results are new memory, aligned as x is.
    if (problem.channels_last && problem.channels % kVector == 0 &&
        aligned(params.x, params.x_strides, true, kVector, 16))
      launch_apply<T, kVector, stem>(params, problem, stream);
    else launch_apply<T, 1, stem>(params, problem, stream);
  });
  return {y, indices};
}

TwoTensors batch_norm_act_max_pool_reduce(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          std::optional<Tensor> weight, std::optional<Tensor> bias,
                                          double slope, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                          int64_t stride_w, int64_t padding_h, int64_t padding_w) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  const int64_t positions = static_cast<int64_t>(problem.pooled_height) * problem.pooled_width;
  ReduceParams params{};
  params.map = make_params(problem, indices);
  set_grad(params.map, problem, grad, indices);
  params.columns = Divider(problem.pooled_width);
  params.positions = Divider(positions);
  params.count = problem.images * positions;
  params.lanes = problem.channels_last ? power_of_two(problem.channels, kWarp) : 1;
  params.tiles = ceil_div(problem.channels, params.lanes);
  const int64_t rows = kThreads / params.lanes, steps = ceil_div(params.count, rows);
  const int64_t wanted =
      std::max(ceil_div(steps, kMostSteps), std::min(ceil_div(kBlocks, params.tiles), ceil_div(steps, 4)));
  params.chunk = ceil_div(steps, wanted) * rows;
  const int64_t splits = ceil_div(params.count, params.chunk);

  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  Tensor partial = torch::stable::new_empty(sum_g, {splits, problem.channels, 2});
  params.partial = reinterpret_cast<Sums*>(partial.mutable_data_ptr<float>());
  const unsigned grid = blocks(params.tiles * splits);
  dispatch(problem, [&](auto element, auto stem) {
    reduce_kernel<decltype(element), stem><<<grid, kThreads, 0, stream>>>(params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const FinishParams finish{params.partial,
                            splits,
                            problem.channels,
                            params.map.rstd,
                            sum_g.mutable_data_ptr<float>(),
                            sum_g_xhat.mutable_data_ptr<float>()};
  finish_kernel<<<blocks(problem.channels), kThreads, 0, stream>>>(finish);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sum_g, sum_g_xhat};
}

Tensor batch_norm_act_max_pool_input_grad(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          std::optional<Tensor> weight, std::optional<Tensor> bias,
                                          double slope, std::optional<Tensor> sum_g,
                                          std::optional<Tensor> sum_g_xhat, int64_t kernel_h,
                                          int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                          int64_t padding_h, int64_t padding_w) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  const Tensor sum = vector(sum_g, x, "sum_g"), sum_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  Tensor grad_x = empty_map(x);
  Params params = make_params(problem, indices);
  set_grad(params, problem, grad, indices);
  set_out(params, grad_x);
  if (sum.defined() && sum_xhat.defined()) {
    params.sum_g = data(sum);
    params.sum_g_xhat = data(sum_xhat);
  }
  dispatch(problem, [&](auto element, auto stem) {
    using T = decltype(element);
    constexpr int kVector = 16 / sizeof(T);
    const bool channels = problem.channels_last;
    const int64_t inner = channels ? problem.channels : problem.width;
    const bool maps = inner % kVector == 0 && aligned(params.x, params.x_strides, channels, kVector, 16) &&
                      aligned(params.out, params.out_strides, channels, kVector, 16);
    // Columns are gathered one by one, channels in vectors.
    const bool pooled = aligned(params.grad, params.grad_strides, true, kVector, 16) &&
                        aligned(params.indices, params.indices_strides, true, kVector, kVector);
    if (maps && channels && pooled) launch_input_grad<T, kVector, true, stem>(params, problem, stream);
    else if (maps && !channels) launch_input_grad<T, kVector, false, stem>(params, problem, stream);
    else launch_input_grad<T, 1, true, stem>(params, problem, stream);
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("batch_norm_act_max_pool_apply.cuda", TORCH_BOX(&batch_norm_act_max_pool_apply));
  m.impl("batch_norm_act_max_pool_reduce.cuda", TORCH_BOX(&batch_norm_act_max_pool_reduce));
  m.impl("batch_norm_act_max_pool_input_grad.cuda", TORCH_BOX(&batch_norm_act_max_pool_input_grad));
}

}  // namespace auglocal

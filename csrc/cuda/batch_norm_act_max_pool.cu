// batch_norm_act_max_pool on CUDA: forward one thread per result (or per vector of its channels), backward a
// reduction over the results, whose indices lead to their elements of x, and one thread per vector of x that
// gathers from the windows around it.
//
// No map but x is read more than a few times over, and what neighbours read again lies in the caches. Where
// an element lies is worked out in 32 bits, but for maps that are too large for them.
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
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "../batch_norm_act_max_pool_host.h"
#include "../divider.h"
#include "channel_factors.h"
#include "channel_sums.h"
#include "kernel.h"

namespace auglocal {
namespace {

// Blocks of a reduction: they fill any GPU several times over. The same on all of them, and so are the bits.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kLeastSteps = 8;   // of a thread, before a second block shares its work
constexpr int64_t kMostSteps = 512;  // of a thread that adds up in float32

// Where a thread's elements are: a flat number in the order (N, H, W, C) or (N, C, H, W), taken apart.
struct Order {
  Divider inner, middle, outer;
  int64_t count;
  bool channels;
};

// What is known of a launch when a kernel is compiled. With the window and the ReLU of the ImageNet stem
// loops unroll and divisions are shifts; a huge map has offsets of more than 32 bits.
enum class Form { kStem, kAny, kHuge };

template <Form kForm>
using Index = std::conditional_t<kForm == Form::kHuge, int64_t, int>;

template <typename I>
struct Place {
  I n, c;
  int h, w;
};

struct Params {
  const void* x;     // (N, C, H, W)
  void* out;         // y (N, C, H', W'), or the gradient of x
  uint8_t* indices;  // (N, C, H', W')
  const void* grad;  // (N, C, H', W')
  Strides x_strides, out_strides, indices_strides, grad_strides;
  Vectors vectors;
  float slope;
  int64_t images, channels;
  int height, width, pooled_height, pooled_width;
  PoolWindow window;
  Order order;
};

template <typename I>
__device__ __forceinline__ I offset(const Strides& strides, I n, I c, I h, I w) {
  return n * static_cast<I>(strides.n) + c * static_cast<I>(strides.c) + h * static_cast<I>(strides.h) +
         w * static_cast<I>(strides.w);
}

// kVector counts channels in the first order and columns in the second one.
template <int kVector, typename I>
__device__ __forceinline__ Place<I> place(const Order& order, I i) {
  const I a = order.inner.divide(i), b = order.middle.divide(a), n = order.outer.divide(b);
  const I first = (i - a * static_cast<I>(order.inner.divisor)) * kVector,
          second = a - b * static_cast<I>(order.middle.divisor),
          third = b - n * static_cast<I>(order.outer.divisor);
  if (order.channels) return {n, first, static_cast<int>(third), static_cast<int>(second)};
  return {n, third, static_cast<int>(second), static_cast<int>(first)};
}

template <Form kForm>
__device__ __forceinline__ PoolWindow window_of(const Params& params) {
  if constexpr (kForm == Form::kStem) return {3, 3, 2, 2, params.window.padding_h, params.window.padding_w};
  else return params.window;
}

template <Form kForm>
__device__ __forceinline__ float slope_of(const Params& params) {
  return kForm == Form::kStem ? 0.0f : params.slope;
}

template <typename T, int kVector, Form kForm>
__global__ void __launch_bounds__(kThreads) apply_kernel(const Params params) {
  using I = Index<kForm>;
  constexpr bool kStem = kForm == Form::kStem;
  constexpr int kColumns = kStem ? 3 : 1;  // loaded before the first of them is looked at
  const I i = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.order.count) return;
  const Place<I> at = place<kVector>(params.order, i);
  const PoolWindow window = window_of<kForm>(params);
  const int top = at.h * window.stride_h - window.padding_h, left = at.w * window.stride_w - window.padding_w;
  const T* x = static_cast<const T*>(params.x) + offset<I>(params.x_strides, at.n, at.c, 0, 0);
  const int origin = (top < 0 ? -top : 0) * window.kernel_w + (left < 0 ? -left : 0);

  const Factors<kVector> factors(params.vectors, at.c);
  float largest[kVector];
  int found[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    largest[v] = -INFINITY;
    found[v] = origin;
  }
#pragma unroll 1
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
        if (inside[j]) load<T, kVector>(values[j], x + offset<I>(params.x_strides, 0, 0, h, w));
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (!inside[j]) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float value = pooled_value<T>(factors[v], values[j][v], slope_of<kForm>(params));
          if (takes_over(value, largest[v])) {
            largest[v] = value;
            found[v] = row * window.kernel_w + first + j;
          }
        }
      }
    }
  }
  store<T, kVector>(static_cast<T*>(params.out) + offset<I>(params.out_strides, at.n, at.c, at.h, at.w),
                    largest);
  Pack<uint8_t, kVector> pack;
#pragma unroll
  for (int v = 0; v < kVector; ++v) pack.values[v] = static_cast<uint8_t>(found[v]);
  store_pack(params.indices + offset<I>(params.indices_strides, at.n, at.c, at.h, at.w), pack);
}

struct ReduceParams {
  Params map;
  Divider columns;            // W'
  Divider positions;          // H' W'
  int64_t count;              // results of a channel, N H' W'
  int64_t chunk;              // of them that a block adds up
  int64_t tiles;              // blocks side by side
  int lanes;                  // channels of a block, a power of two
  Partials partials;          // of Sums
  float *sum_g, *sum_g_xhat;  // (C,)
};

// A block adds up `chunk` results of `lanes` channels. Results side by side in memory are those of
// neighbouring threads: channels in channels-last maps, and positions, of one channel, in others.
template <typename T, Form kForm>
__global__ void __launch_bounds__(kThreads, kForm == Form::kHuge ? 4 : 6)
    reduce_kernel(const ReduceParams params) {
  using I = Index<kForm>;
  const Params& map = params.map;
  const PoolWindow window = window_of<kForm>(map);
  const int lane = threadIdx.x % params.lanes, rows = kThreads / params.lanes;
  const int64_t tile = blockIdx.x % params.tiles, split = blockIdx.x / params.tiles;
  const I c = static_cast<I>(tile * params.lanes + lane);
  const I begin = static_cast<I>(split * params.chunk + threadIdx.x / params.lanes);
  const I end =
      static_cast<I>((split + 1) * params.chunk < params.count ? (split + 1) * params.chunk : params.count);
  Sums sums[1] = {};
  if (c < map.channels) {
    const Channel<float> channel = Factors<1>(map.vectors, c)[0];
    for (I m = begin; m < end; m += rows) {
      const I n = params.positions.divide(m), p = m - n * static_cast<I>(params.positions.divisor);
      const I oh = params.columns.divide(p), ow = p - oh * static_cast<I>(params.columns.divisor);
      const unsigned index = map.indices[offset<I>(map.indices_strides, n, c, oh, ow)];
      const unsigned kernel_w = window.kernel_w, row = index / kernel_w, column = index - row * kernel_w;
      const float x = static_cast<float>(static_cast<const T*>(map.x)[offset<I>(
          map.x_strides, n, c, oh * window.stride_h - window.padding_h + static_cast<int>(row),
          ow * window.stride_w - window.padding_w + static_cast<int>(column))]);
      const float grad =
          static_cast<float>(static_cast<const T*>(map.grad)[offset<I>(map.grad_strides, n, c, oh, ow)]);
      const float g = activated(grad, normalised(channel, x), slope_of<kForm>(map));
      sums[0] = merged(sums[0], Sums{g, g * (x - channel.mean)});
    }
  }
  Sums all = merge_columns<1>(sums, params.lanes);
  const bool last = merge_splits(all, params.partials, tile, split, tile * params.lanes, params.lanes);
  if (!last || threadIdx.x >= params.lanes || c >= map.channels) return;
  params.sum_g[c] = all.g;
  params.sum_g_xhat[c] = all.g_difference * map.vectors.rstd[c];
}

// What each element of a vector gets from its windows, in the order of the windows: kVector channels of one
// position, or kVector columns of one channel.
template <typename T, int kVector, bool kChannels, Form kForm>
__device__ __forceinline__ void gather(float (&g)[kVector], const Params& params,
                                       const Place<Index<kForm>>& at) {
  using I = Index<kForm>;
  constexpr int kColumns = kChannels ? 1 : kVector, kWide = kChannels ? kVector : 1;
  const PoolWindow window = window_of<kForm>(params);
  const int last_row = last_window(at.h, window.stride_h, window.padding_h, params.pooled_height);
  const int first_column = first_window(at.w, window.kernel_w, window.stride_w, window.padding_w);
  const int last_column =
      last_window(at.w + kColumns - 1, window.stride_w, window.padding_w, params.pooled_width);
  for (int oh = first_window(at.h, window.kernel_h, window.stride_h, window.padding_h); oh <= last_row;
       ++oh) {
    const int before = (at.h - (oh * window.stride_h - window.padding_h)) * window.kernel_w;
    for (int ow = first_column; ow <= last_column; ++ow) {
      const Pack<uint8_t, kWide> found =
          load_pack<uint8_t, kWide>(params.indices + offset<I>(params.indices_strides, at.n, at.c, oh, ow));
      float grad[kWide];
      load<T, kWide>(grad,
                     static_cast<const T*>(params.grad) + offset<I>(params.grad_strides, at.n, at.c, oh, ow));
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

template <typename T, int kVector, bool kChannels, Form kForm>
__global__ void __launch_bounds__(kThreads, kForm == Form::kHuge ? 2 : 3)
    input_grad_kernel(const Params params) {
  using I = Index<kForm>;
  const I i = static_cast<I>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.order.count) return;
  const Place<I> at = place<kVector>(params.order, i);
  float x[kVector], g[kVector] = {};
  load<T, kVector>(x, static_cast<const T*>(params.x) + offset<I>(params.x_strides, at.n, at.c, at.h, at.w));
  gather<T, kVector, kChannels, kForm>(g, params, at);
  const Factors<kChannels ? kVector : 1> factors(params.vectors, at.c);
  const ThroughStatistics<kChannels ? kVector : 1> through(params.vectors, at.c);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    g[v] = activated(g[v], normalised(factors[v], x[v]), slope_of<kForm>(params));
    x[v] = input_gradient(factors[v], through[v], g[v], x[v]);
  }
  store<T, kVector>(static_cast<T*>(params.out) + offset<I>(params.out_strides, at.n, at.c, at.h, at.w), x);
}

cudaStream_t current_stream(const Tensor& x) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &current));
  return static_cast<cudaStream_t>(current);
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

Params make_params(MaxPoolProblem& problem, const Tensor& indices) {
  Params params{};
  params.x = problem.x.const_data_ptr();
  params.x_strides = strides_of(problem.x);
  params.indices = const_cast<uint8_t*>(indices.const_data_ptr<uint8_t>());
  params.indices_strides = strides_of(indices);
  params.vectors = vectors_of(problem);
  params.slope = static_cast<float>(problem.slope);
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

// Whether offsets, and the numbers of the threads, those beyond the last element too, fit into an int.
bool fits(const Tensor& map) {
  int64_t last = map.numel();
  for (int64_t dim = 0, offset = 0; dim < map.dim(); ++dim) {
    offset += (map.size(dim) - 1) * map.stride(dim);
    last = std::max(last, offset);
  }
  return last < std::numeric_limits<int>::max() - kThreads;
}

bool is_stem(const PoolWindow& window, double slope) {
  return slope == 0 && window.kernel_h == 3 && window.kernel_w == 3 && window.stride_h == 2 &&
         window.stride_w == 2;
}

template <Form kForm>
using FormConstant = std::integral_constant<Form, kForm>;

// Calls f with an element of x's dtype and with the form of a launch over x and the maps of the pooled size.
template <typename F>
void dispatch(const MaxPoolProblem& problem, std::initializer_list<Tensor> pooled, const F& f) {
  bool narrow = fits(problem.x);
  for (const Tensor& map : pooled) narrow = narrow && fits(map);
  THO_DISPATCH_V2(problem.x.scalar_type(), "batch_norm_act_max_pool", AT_WRAP([&] {
                    if (!narrow) f(scalar_t(), FormConstant<Form::kHuge>());
                    else if (is_stem(problem.window, problem.slope))
                      f(scalar_t(), FormConstant<Form::kStem>());
                    else f(scalar_t(), FormConstant<Form::kAny>());
                  }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

template <typename T, int kVector, Form kForm>
void launch_apply(Params& params, const MaxPoolProblem& problem, cudaStream_t stream) {
  params.order = order_of(problem, problem.pooled_height, problem.pooled_width, kVector);
  const unsigned grid = blocks(ceil_div(params.order.count, kThreads));
  apply_kernel<T, kVector, kForm><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int kVector, bool kChannels, Form kForm>
void launch_input_grad(Params& params, const MaxPoolProblem& problem, cudaStream_t stream) {
  params.order = order_of(problem, problem.height, problem.width, kVector);
  const unsigned grid = blocks(ceil_div(params.order.count, kThreads));
  input_grad_kernel<T, kVector, kChannels, kForm><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

TwoTensors batch_norm_act_max_pool_apply(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                                         std::optional<Tensor> bias, double slope, int64_t kernel_h,
                                         int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                         int64_t padding_h, int64_t padding_w) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                 stride_h, stride_w, padding_h, padding_w);
  Tensor y = problem.empty_pooled(x.scalar_type()), indices = problem.empty_pooled(ScalarType::Byte);
  Params params = make_params(problem, indices);
  set_out(params, y);
  dispatch(problem, {y, indices}, [&](auto element, auto form) {
    using T = decltype(element);
    constexpr int kVector = 16 / sizeof(T);
    // The results are new memory, aligned as x is.
    if (problem.channels_last && problem.channels % kVector == 0 &&
        aligned(params.x, params.x_strides, true, kVector, 16))
      launch_apply<T, kVector, form>(params, problem, stream);
    else launch_apply<T, 1, form>(params, problem, stream);
  });
  return {y, indices};
}

TwoTensors batch_norm_act_max_pool_reduce(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          std::optional<Tensor> weight, std::optional<Tensor> bias,
                                          double slope, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                          int64_t stride_w, int64_t padding_h, int64_t padding_w) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
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
  const int64_t wanted = std::max(ceil_div(steps, kMostSteps),
                                  std::min(ceil_div(kBlocks, params.tiles), ceil_div(steps, kLeastSteps)));
  params.chunk = ceil_div(steps, wanted) * rows;
  const int64_t splits = ceil_div(params.count, params.chunk);

  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  params.sum_g = sum_g.mutable_data_ptr<float>();
  params.sum_g_xhat = sum_g_xhat.mutable_data_ptr<float>();
  params.partials = partials_of(params.tiles, splits, problem.channels, stream);
  Tensor found = memory::new_empty(sum_g, {splits + params.partials.groups, problem.channels, 2});
  params.partials.found = found.mutable_data_ptr<float>();
  const unsigned grid = blocks(params.tiles * splits);
  dispatch(problem, {grad, indices}, [&](auto element, auto form) {
    reduce_kernel<decltype(element), form><<<grid, kThreads, 0, stream>>>(params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
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
  MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                 stride_h, stride_w, padding_h, padding_w);
  Tensor sum = vector(sum_g, x, "sum_g"), sum_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  Tensor grad_x = empty_map(x);
  Params params = make_params(problem, indices);
  set_grad(params, problem, grad, indices);
  set_out(params, grad_x);
  if (sum.defined() && sum_xhat.defined()) {
    params.vectors.sum_g = on_16_bytes(sum);
    params.vectors.sum_g_xhat = on_16_bytes(sum_xhat);
  }
  dispatch(problem, {grad, indices, grad_x}, [&](auto element, auto form) {
    using T = decltype(element);
    constexpr int kVector = 16 / sizeof(T);
    const bool channels = problem.channels_last;
    const int64_t inner = channels ? problem.channels : problem.width;
    const bool maps = inner % kVector == 0 && aligned(params.x, params.x_strides, channels, kVector, 16) &&
                      aligned(params.out, params.out_strides, channels, kVector, 16);
    // Columns are gathered one by one, channels in vectors.
    const bool pooled = aligned(params.grad, params.grad_strides, true, kVector, 16) &&
                        aligned(params.indices, params.indices_strides, true, kVector, kVector);
    if (maps && channels && pooled) launch_input_grad<T, kVector, true, form>(params, problem, stream);
    else if (maps && !channels) launch_input_grad<T, kVector, false, form>(params, problem, stream);
    else launch_input_grad<T, 1, true, form>(params, problem, stream);
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

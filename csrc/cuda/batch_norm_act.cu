// batch_norm_act on CUDA: two reductions over (N, P), each partial sums and then their merge in a fixed
// order, and two passes element by element.
//
// All four walk a map in the same way. Along the positions a block has one channel and a chunk of images,
// along the channels a tile of channels and a chunk of rows (n, p); either way a thread keeps its channels,
// and with them its factors in registers, for all elements it meets.
#include "../batch_norm_act.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <type_traits>

#include "../batch_norm_act_host.h"
#include "kernel.h"

namespace auglocal {
namespace {

// Blocks of a launch that fill any GPU several times over. The same on all of them, and so are the bits of a
// sum.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kLeastSteps = 4;   // of a thread, before a second block shares its work
constexpr int64_t kMostSteps = 512;  // of a thread that adds up in float32, where there are images enough
constexpr int64_t kWideMap = 8;      // vectors of a map, in blocks, from which a block reads one at a time

struct Map {
  void* data;  // null: not there
  int64_t stride_n, stride_outer, stride;
};

struct Walk {
  int64_t images, channels, positions;
  int64_t chunk;  // images or rows of a block
  int64_t tiles;  // blocks side by side: channels, or tiles of them
  int64_t splits;
  int lanes;  // threads side by side along the positions or along the channels, a power of two
};

// One thread's way through its chunk.
template <int kVector, bool kChannels>
struct Walker {
  int64_t n, outer, inner;  // image, then position and first channel, or channel and first position
  int64_t row, end;
  int64_t step_n, step_p, positions, first;
  int step;

  __device__ explicit Walker(const Walk& walk) {
    const int lane = threadIdx.x % walk.lanes, group = threadIdx.x / walk.lanes;
    const int64_t tile = blockIdx.x % walk.tiles, split = blockIdx.x / walk.tiles;
    const int64_t rows = kChannels ? walk.images * walk.positions : walk.images;
    positions = walk.positions;
    row = split * walk.chunk + group;
    end = (split + 1) * walk.chunk < rows ? (split + 1) * walk.chunk : rows;
    if constexpr (kChannels) {
      inner = (tile * walk.lanes + lane) * kVector;
      if (inner >= walk.channels) end = row;
      n = row / positions;
      outer = row % positions;
      step = static_cast<int>(kThreads / walk.lanes);
      step_n = step / positions;
      step_p = step % positions;
    } else {
      first = static_cast<int64_t>(lane) * kVector;
      if (first >= positions) end = row;
      n = row;
      outer = tile;
      inner = first;
      step = walk.lanes * kVector;
      step_n = kThreads / walk.lanes;
    }
  }

  __device__ __forceinline__ bool more() const { return row < end; }

  __device__ __forceinline__ void next() {
    if constexpr (kChannels) {
      row += step;
      n += step_n;
      outer += step_p;
      if (outer >= positions) {
        outer -= positions;
        ++n;
      }
    } else {
      inner += step;
      if (inner >= positions) {
        inner = first;
        n += step_n;
        row = n;
      }
    }
  }

  // First channel of the thread.
  __device__ __forceinline__ int64_t channel() const { return kChannels ? inner : outer; }

  template <typename T>
  __device__ __forceinline__ T* at(const Map& map) const {
    return static_cast<T*>(map.data) + n * map.stride_n + outer * map.stride_outer + inner * map.stride;
  }

  // A map that is the same for all positions is read once for the whole vector.
  template <typename T>
  __device__ __forceinline__ void read(float (&out)[kVector], const Map& map) const {
    const T* x = at<const T>(map);
    if (!kChannels && kVector > 1 && map.stride == 0) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) out[v] = static_cast<float>(*x);
    } else {
      load<T, kVector>(out, x);
    }
  }
};

struct Params {
  Map x, residual, grad;
  Map out, out_residual;                     // y, or the gradients of x and of the residual
  const float *mean, *rstd, *weight, *bias;  // (C,); weight and bias may be null
  const float *sum_g, *sum_g_xhat;           // (C,) or null
  float slope;
  Walk walk;
  void* partial;  // (splits, C) of Moments or Sums
};

template <int kVector, bool kChannels>
struct Factors {
  static constexpr int kCount = kChannels ? kVector : 1;  // channels of a thread
  Channel<float> channels[kCount];

  __device__ __forceinline__ Factors(const Params& params, int64_t first) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int64_t c = first + v;
      if (c >= params.walk.channels) continue;  // a thread beside the last channel
      channels[v] = {params.mean[c], params.weight ? params.rstd[c] * params.weight[c] : params.rstd[c],
                     params.bias ? params.bias[c] : 0.0f};
    }
  }

  __device__ __forceinline__ const Channel<float>& operator[](int v) const {
    return channels[kChannels ? v : 0];
  }
};

// x and g = grad act'(z) of one vector.
template <typename T, int kVector, bool kChannels>
__device__ __forceinline__ void read_masked(float (&x)[kVector], float (&g)[kVector],
                                            const Walker<kVector, kChannels>& walker, const Params& params,
                                            const Factors<kVector, kChannels>& factors) {
  float r[kVector] = {};
  walker.template read<T>(x, params.x);
  walker.template read<T>(g, params.grad);
  if (params.slope == 1) return;
  if (params.residual.data) walker.template read<T>(r, params.residual);
#pragma unroll
  for (int v = 0; v < kVector; ++v) g[v] = activated(g[v], normalised(factors[v], x[v]) + r[v], params.slope);
}

template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) apply_kernel(const Params params) {
  Walker<kVector, kChannels> walker(params.walk);
  const Factors<kVector, kChannels> factors(params, walker.channel());
  for (; walker.more(); walker.next()) {
    float z[kVector], r[kVector] = {};
    walker.template read<T>(z, params.x);
    if (params.residual.data) walker.template read<T>(r, params.residual);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      z[v] = normalised(factors[v], z[v]) + r[v];
      if (params.slope != 1) z[v] = activated(z[v], z[v], params.slope);
    }
    store<T, kVector>(walker.template at<T>(params.out), z);
  }
}

template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) input_grad_kernel(const Params params) {
  Walker<kVector, kChannels> walker(params.walk);
  const Factors<kVector, kChannels> factors(params, walker.channel());
  constexpr int kCount = Factors<kVector, kChannels>::kCount;
  Backward<float> backward[kCount];
  const float count = static_cast<float>(params.walk.images * params.walk.positions);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int64_t c = walker.channel() + v;
    backward[v] = {0, 0};
    if (params.sum_g && c < params.walk.channels)
      backward[v] = {params.sum_g[c] / count, params.rstd[c] * (params.sum_g_xhat[c] / count)};
  }
  for (; walker.more(); walker.next()) {
    float x[kVector], g[kVector];
    read_masked<T>(x, g, walker, params, factors);
    if (params.out_residual.data) store<T, kVector>(walker.template at<T>(params.out_residual), g);
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      x[v] = input_gradient(factors[v], backward[kChannels ? v : 0], g[v], x[v]);
    store<T, kVector>(walker.template at<T>(params.out), x);
  }
}

struct Sums {
  float g, g_difference;  // of g and of g (x - mean)
};

__device__ __forceinline__ Sums merged(const Sums& a, const Sums& b) {
  return {a.g + b.g, a.g_difference + b.g_difference};
}

// Merges the values of threads with the same channels, always in the same order: kValues a thread, `tile` of
// them in a row of threads. They end in partial[0 ... tile).
template <int kValues, typename V>
__device__ V* merge_rows(const V (&values)[kValues], int tile) {
  __shared__ V partial[kThreads * kValues];
#pragma unroll
  for (int v = 0; v < kValues; ++v) partial[threadIdx.x * kValues + v] = values[v];
  __syncthreads();
  for (int half = kThreads * kValues / 2; half >= tile; half /= 2) {
    for (int i = threadIdx.x; i < half; i += kThreads) partial[i] = merged(partial[i], partial[i + half]);
    __syncthreads();
  }
  return partial;
}

// What a block has found about its channels, into (splits, C).
template <bool kChannels, int kVector, typename V>
__device__ void store_partial(V (&values)[kVector], const Walk& walk, void* partial) {
  const int64_t tile = blockIdx.x % walk.tiles, split = blockIdx.x / walk.tiles;
  V* out = static_cast<V*>(partial) + split * walk.channels;
  if constexpr (kChannels) {
    const int width = walk.lanes * kVector;
    const V* found = merge_rows<kVector>(values, width);
    for (int i = threadIdx.x; i < width && tile * width + i < walk.channels; i += kThreads)
      out[tile * width + i] = found[i];
  } else {
    V all[1] = {values[0]};
#pragma unroll
    for (int v = 1; v < kVector; ++v) all[0] = merged(all[0], values[v]);
    const V* found = merge_rows<1>(all, 1);
    if (threadIdx.x == 0) out[tile] = found[0];
  }
}

template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) stats_kernel(const Params params) {
  Walker<kVector, kChannels> walker(params.walk);
  const int64_t channel = walker.channel(),
                channel_stride = kChannels ? params.x.stride : params.x.stride_outer;
  float shift[kVector] = {};
  Shifted<float> sums[kVector] = {};
  if (walker.more()) walker.template read<T>(shift, params.x);
  int count = 0;
  for (; walker.more(); walker.next(), ++count) {
    float x[kVector];
    walker.template read<T>(x, params.x);
#pragma unroll
    for (int v = 0; v < kVector; ++v) add(sums[v], x[v] - shift[v]);
  }
  Moments<float> found[kVector] = {};
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if (count == 0) continue;
    const T* origin = static_cast<const T*>(params.x.data) + (channel + (kChannels ? v : 0)) * channel_stride;
    found[v] = moments(sums[v], static_cast<float>(count), shift[v], static_cast<float>(*origin));
  }
  store_partial<kChannels, kVector>(found, params.walk, params.partial);
}

template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Params params) {
  Walker<kVector, kChannels> walker(params.walk);
  const Factors<kVector, kChannels> factors(params, walker.channel());
  Sums found[kVector] = {};
  for (; walker.more(); walker.next()) {
    float x[kVector], g[kVector];
    read_masked<T>(x, g, walker, params, factors);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      found[v].g += g[v];
      found[v].g_difference += g[v] * (x[v] - factors[v].mean);
    }
  }
  store_partial<kChannels, kVector>(found, params.walk, params.partial);
}

struct FinishParams {
  const void* partial;  // (splits, C) of Moments or Sums
  int64_t splits, channels;
  const void* x;  // element (0, c, 0) is the origin of channel c
  int64_t stride_c;
  const float* rstd;
  float *first, *second;  // (C,): mean and var, or mean and rstd, or sum_g and sum_g_xhat
  bool updates;           // make rstd, and update the running statistics that are there
  Update<float> update;
  float *running_mean, *running_var;  // (C,) or null
};

// One block per channel merges its splits.
template <typename V>
__device__ V merge_splits(const FinishParams& params) {
  V all[1] = {};
  for (int64_t split = threadIdx.x; split < params.splits; split += kThreads)
    all[0] = merged(all[0], static_cast<const V*>(params.partial)[split * params.channels + blockIdx.x]);
  return merge_rows<1>(all, 1)[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_stats_kernel(const FinishParams params) {
  const int64_t c = blockIdx.x;
  const Moments<float> all = merge_splits<Moments<float>>(params);
  if (threadIdx.x != 0) return;
  const float mean = static_cast<float>(static_cast<const T*>(params.x)[c * params.stride_c]) + all.mean;
  const float var = all.squares / all.count;
  params.first[c] = mean;
  params.second[c] = params.updates ? reciprocal_deviation(var, params.update) : var;
  if (params.running_mean) params.running_mean[c] = updated(params.running_mean[c], mean, params.update);
  if (params.running_var)
    params.running_var[c] = updated(params.running_var[c], unbiased(var, all.count), params.update);
}

__global__ void __launch_bounds__(kThreads) finish_reduce_kernel(const FinishParams params) {
  const int64_t c = blockIdx.x;
  const Sums all = merge_splits<Sums>(params);
  if (threadIdx.x != 0) return;
  params.first[c] = all.g;
  params.second[c] = all.g_difference * params.rstd[c];
}

Map map_of(const FeatureMap& map, bool channels) {
  return {const_cast<void*>(map.tensor.const_data_ptr()), map.stride_n,
          channels ? map.stride_p : map.stride_c, channels ? map.stride_c : map.stride_p};
}

Map map_of(const std::optional<FeatureMap>& map, bool channels) {
  return map ? map_of(*map, channels) : Map{nullptr, 0, 0, 1};
}

// Vectors need the inner dimension to lie together, or along the positions to be one value, and every step in
// the others to keep the alignment of the first element.
template <typename T>
bool aligned(const Map& map, const Walk& walk, bool channels) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const int64_t outer = channels ? walk.positions : walk.channels,
                inner = channels ? walk.channels : walk.positions;
  if (!map.data || (!channels && map.stride == 0)) return true;
  return map.stride == 1 && inner % kVector == 0 && (outer == 1 || map.stride_outer % kVector == 0) &&
         (walk.images == 1 || map.stride_n % kVector == 0) && reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
}

// How the blocks share the map; `reduces` where a thread adds up what it meets.
void share(Walk& walk, bool channels, int vector, bool reduces) {
  const int64_t inner = channels ? walk.channels : walk.positions;
  const int64_t rows = channels ? walk.images * walk.positions : walk.images;
  // A large map is read by the whole block, so that a few images are enough for many short sums.
  const bool large = !channels && inner >= int64_t(kThreads) * kWideMap * vector;
  walk.lanes = power_of_two(ceil_div(inner, vector), large ? kThreads : kWarp);
  const int64_t width = static_cast<int64_t>(walk.lanes) * vector, groups = kThreads / walk.lanes;
  walk.tiles = channels ? ceil_div(inner, width) : walk.channels;
  const int64_t steps_a_row = channels ? 1 : ceil_div(inner, width),
                steps = ceil_div(rows, groups) * steps_a_row;
  int64_t splits = std::min(ceil_div(kBlocks, walk.tiles), ceil_div(steps, kLeastSteps));
  if (reduces) splits = std::max(splits, ceil_div(steps, kMostSteps));
  walk.chunk = ceil_div(ceil_div(rows, groups), splits) * groups;
  walk.splits = ceil_div(rows, walk.chunk);
}

cudaStream_t current_stream(const Tensor& x) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &current));
  return static_cast<cudaStream_t>(current);
}

enum class Pass { kStats, kApply, kReduce, kInputGrad };

template <Pass kPass, typename T, int kVector, bool kChannels>
void launch(const Params& params, cudaStream_t stream) {
  const unsigned grid = blocks(params.walk.tiles * params.walk.splits);
  if constexpr (kPass == Pass::kStats)
    stats_kernel<T, kVector, kChannels><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kApply)
    apply_kernel<T, kVector, kChannels><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kReduce)
    reduce_kernel<T, kVector, kChannels><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kInputGrad)
    input_grad_kernel<T, kVector, kChannels><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Runs a pass over the map; the partial results of a reduction are made here and returned.
template <Pass kPass, typename T>
Tensor run(Params& params, bool channels, const Tensor& like, cudaStream_t stream) {
  constexpr bool kReduces = kPass == Pass::kStats || kPass == Pass::kReduce;
  constexpr int kVector = 16 / sizeof(T);
  bool vectors = true;
  for (const Map* map : {&params.x, &params.residual, &params.grad, &params.out, &params.out_residual})
    vectors = vectors && aligned<T>(*map, params.walk, channels);
  share(params.walk, channels, vectors ? kVector : 1, kReduces);
  Tensor partial;
  if constexpr (kReduces) {
    constexpr int64_t kFloats =
        (kPass == Pass::kStats ? sizeof(Moments<float>) : sizeof(Sums)) / sizeof(float);
    partial = torch::stable::new_empty(like, {params.walk.splits * params.walk.channels * kFloats});
    params.partial = partial.mutable_data_ptr<float>();
  }
  if (vectors && channels) launch<kPass, T, kVector, true>(params, stream);
  else if (vectors) launch<kPass, T, kVector, false>(params, stream);
  else if (channels) launch<kPass, T, 1, true>(params, stream);
  else launch<kPass, T, 1, false>(params, stream);
  return partial;
}

const float* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

Walk walk_over(const FeatureMap& map) {
  return {map.images, map.channels, map.positions, 0, 0, 0, 0};
}

Params make_params(const BatchNormProblem& problem, const std::optional<FeatureMap>& out) {
  const bool channels = along_channels(problem.x);
  Params params{};
  params.x = map_of(problem.x, channels);
  params.residual = map_of(problem.residual, channels);
  params.grad = map_of(problem.grad, channels);
  params.out = map_of(out, channels);
  params.out_residual = map_of(std::nullopt, channels);
  params.mean = data(problem.mean);
  params.rstd = data(problem.rstd);
  params.weight = data(problem.weight);
  params.bias = data(problem.bias);
  params.slope = static_cast<float>(problem.slope);
  params.walk = walk_over(problem.x);
  return params;
}

// Calls f with an element of x's dtype.
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  THO_DISPATCH_V2(x.scalar_type(), "batch_norm_act", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
}

// mean and var of x, or as `finish` says mean and rstd.
TwoTensors statistics(const Tensor& x, FinishParams finish) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const FeatureMap map = checked_map(x);
  Tensor first = per_channel(x), second = per_channel(x), partial;
  Params params{};
  const bool channels = along_channels(map);
  params.x = map_of(map, channels);
  params.walk = walk_over(map);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    partial = run<Pass::kStats, T>(params, channels, first, stream);
    finish.partial = params.partial;
    finish.splits = params.walk.splits;
    finish.channels = map.channels;
    finish.x = map.tensor.const_data_ptr();
    finish.stride_c = map.stride_c;
    finish.first = first.mutable_data_ptr<float>();
    finish.second = second.mutable_data_ptr<float>();
    finish_stats_kernel<T><<<blocks(map.channels), kThreads, 0, stream>>>(finish);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {first, second};
}

TwoTensors batch_norm_stats(Tensor x) {
  return statistics(x, FinishParams{});
}

TwoTensors batch_norm_factors_(Tensor x, std::optional<Tensor> running_mean,
                               std::optional<Tensor> running_var, double momentum, double eps) {
  check_running(running_mean, x);
  check_running(running_var, x);
  FinishParams finish{};
  finish.updates = true;
  finish.update = {static_cast<float>(momentum), static_cast<float>(eps)};
  finish.running_mean = running_mean ? running_mean->mutable_data_ptr<float>() : nullptr;
  finish.running_var = running_var ? running_var->mutable_data_ptr<float>() : nullptr;
  return statistics(x, finish);
}

Tensor batch_norm_act_apply(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                            std::optional<Tensor> bias, std::optional<Tensor> residual, double slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const BatchNormProblem problem = make_problem({}, x, mean, rstd, weight, bias, residual, slope);
  Tensor y = empty_map(x);
  Params params = make_params(problem, feature_map(y));
  dispatch(x, [&](auto element) {
    run<Pass::kApply, decltype(element)>(params, along_channels(problem.x), mean, stream);
  });
  return y;
}

TwoTensors batch_norm_act_reduce(Tensor grad, Tensor x, Tensor mean, Tensor rstd,
                                 std::optional<Tensor> weight, std::optional<Tensor> bias,
                                 std::optional<Tensor> residual, double slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x), partial;
  Params params = make_params(problem, std::nullopt);
  dispatch(x, [&](auto element) {
    partial = run<Pass::kReduce, decltype(element)>(params, along_channels(problem.x), sum_g, stream);
  });
  FinishParams finish{};
  finish.partial = params.partial;
  finish.splits = params.walk.splits;
  finish.channels = problem.x.channels;
  finish.rstd = params.rstd;
  finish.first = sum_g.mutable_data_ptr<float>();
  finish.second = sum_g_xhat.mutable_data_ptr<float>();
  finish_reduce_kernel<<<blocks(problem.x.channels), kThreads, 0, stream>>>(finish);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sum_g, sum_g_xhat};
}

TwoTensors batch_norm_act_input_grad(Tensor grad, Tensor x, Tensor mean, Tensor rstd,
                                     std::optional<Tensor> weight, std::optional<Tensor> bias,
                                     std::optional<Tensor> residual, double slope,
                                     std::optional<Tensor> sum_g, std::optional<Tensor> sum_g_xhat,
                                     bool need_residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  const Tensor sum = vector(sum_g, x, "sum_g"), sum_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  Tensor grad_x = empty_map(x),
         grad_residual = need_residual ? empty_map(x) : torch::stable::new_empty(x, {0});
  Params params = make_params(problem, feature_map(grad_x));
  if (need_residual) params.out_residual = map_of(feature_map(grad_residual), along_channels(problem.x));
  if (sum.defined() && sum_xhat.defined()) {
    params.sum_g = data(sum);
    params.sum_g_xhat = data(sum_xhat);
  }
  dispatch(x, [&](auto element) {
    run<Pass::kInputGrad, decltype(element)>(params, along_channels(problem.x), mean, stream);
  });
  return {grad_x, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("batch_norm_stats.cuda", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_factors_.cuda", TORCH_BOX(&batch_norm_factors_));
  m.impl("batch_norm_act_apply.cuda", TORCH_BOX(&batch_norm_act_apply));
  m.impl("batch_norm_act_reduce.cuda", TORCH_BOX(&batch_norm_act_reduce));
  m.impl("batch_norm_act_input_grad.cuda", TORCH_BOX(&batch_norm_act_input_grad));
}

}  // namespace auglocal

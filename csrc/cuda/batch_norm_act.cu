// batch_norm_act on CUDA: two reductions over (N, P), whose partial sums the last blocks merge in a fixed
// order, and two passes element by element. Here are the kernels for maps of any strides, and what the host
// does.
#include "../batch_norm_act.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <type_traits>

#include "../batch_norm_act_host.h"
#include "batch_norm_act_reduce.h"
#include "batch_norm_act_rows.h"
#include "batch_norm_act_walk.h"
#include "kernel.h"

namespace auglocal {
namespace {

// Blocks of a launch that fill any GPU several times over. The same on all of them, and so are the bits of a
// sum. A thread takes as many steps as that leaves it, within limits: few blocks are then a small map's, many
// a huge one's.
struct Sharing {
  int64_t blocks, least_steps, most_steps;
};
constexpr Sharing kReduces{2048, 8, 512};  // most: of a thread that adds up in float32
constexpr Sharing kMaps{4096, 4, 16};
constexpr int64_t kWideMap = 8;  // vectors of a map, in blocks, from which a block reads one at a time
constexpr int kLine = 8;  // vectors in a cache line: a reduction's tile of channels, so that sums are few

// x and g = grad act'(z) of one vector.
template <typename T, int kVector, bool kChannels>
__device__ __forceinline__ void read_masked(float (&x)[kVector], float (&g)[kVector],
                                            const Walker<kVector, kChannels>& walker, const Params& params,
                                            const Factors<kChannels ? kVector : 1>& factors) {
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
  const Factors<kChannels ? kVector : 1> factors(params.vectors, walker.channel);
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
  const Factors<kChannels ? kVector : 1> factors(params.vectors, walker.channel);
  const ThroughStatistics<kChannels ? kVector : 1> through(params.vectors, walker.channel);
  for (; walker.more(); walker.next()) {
    float x[kVector], g[kVector];
    read_masked<T>(x, g, walker, params, factors);
    if (params.out_residual.data) store<T, kVector>(walker.template at<T>(params.out_residual), g);
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = input_gradient(factors[v], through[v], g[v], x[v]);
    store<T, kVector>(walker.template at<T>(params.out), x);
  }
}

template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) stats_kernel(const Params params) {
  Walker<kVector, kChannels> walker(params.walk);
  float shift[kVector] = {};
  Shifted<float> sums[kVector] = {};
  if (walker.more()) load<T, kVector>(shift, walker.template at<const T>(params.x));
  int count = 0;
  const auto take = [&](const Pack<T, kVector>& vector) {
    ++count;
#pragma unroll
    for (int v = 0; v < kVector; ++v) add(sums[v], element(vector, v) - shift[v]);
  };
  while (walker.more()) {
    // Two are asked for before the first is used.
    const Pack<T, kVector> vector = load_pack<T, kVector>(walker.template at<const T>(params.x));
    walker.next();
    if (walker.more()) {
      const Pack<T, kVector> second = load_pack<T, kVector>(walker.template at<const T>(params.x));
      walker.next();
      take(vector);
      take(second);
    } else {
      take(vector);
    }
  }
  finish_stats<T, kVector, kChannels>(sums, shift, count, walker.channel, params);
}

template <typename T, int kVector, bool kChannels>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Params params) {
  Walker<kVector, kChannels> walker(params.walk);
  const Factors<kChannels ? kVector : 1> factors(params.vectors, walker.channel);
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
  finish_reduce<kVector, kChannels>(found, params);
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

// Whether the rows (n, p) of every map have one common step, which then takes the place of that of the
// positions; a row of the gradient may also stand for all positions of its image.
bool collapse(Params& params) {
  // Rows and steps are counted in an int, some steps beyond the last row too.
  constexpr int64_t kMost = std::numeric_limits<int>::max(), kAhead = 4 * kThreads;
  const Walk& walk = params.walk;
  const int64_t rows = walk.images * walk.positions;
  Map* maps[] = {&params.x, &params.residual, &params.grad, &params.out, &params.out_residual};
  int64_t steps[std::size(maps)] = {}, repeats = 1;
  for (size_t i = 0; i < std::size(maps) && rows > 1; ++i) {
    const Map& map = *maps[i];
    if (!map.data) continue;
    steps[i] = walk.positions == 1 ? map.stride_n : map.stride_outer;
    if (walk.images > 1 && walk.positions > 1 && map.stride_n != walk.positions * map.stride_outer) {
      if (&map != &params.grad || map.stride_outer != 0) return false;
      steps[i] = map.stride_n;
      repeats = walk.positions;
    }
    if (steps[i] >= kMost / kAhead) return false;
  }
  if (rows >= kMost - kAhead) return false;
  for (size_t i = 0; i < std::size(maps); ++i) maps[i]->stride_outer = steps[i];
  params.grad_rows = Divider(repeats);
  return true;
}

// How the blocks share the map; `reduces` where a thread adds up what it meets.
void share(Walk& walk, bool channels, int vector, bool reduces) {
  const Sharing& sharing = reduces ? kReduces : kMaps;
  const int64_t inner = channels ? walk.channels : walk.positions;
  const int64_t rows = channels ? walk.images * walk.positions : walk.images;
  // A large map is read by the whole block, so that a few images are enough for many short sums.
  const bool large = !channels && inner >= int64_t(kThreads) * kWideMap * vector;
  const bool lines = channels && reduces && vector > 1;
  walk.lanes = power_of_two(ceil_div(inner, vector), large ? kThreads : lines ? kLine : kWarp);
  const int64_t width = static_cast<int64_t>(walk.lanes) * vector, groups = kThreads / walk.lanes;
  walk.tiles = channels ? ceil_div(inner, width) : walk.channels;
  const int64_t steps_a_row = channels ? 1 : ceil_div(inner, width),
                steps = ceil_div(rows, groups) * steps_a_row;
  const int64_t splits =
      std::max(std::min(ceil_div(sharing.blocks, walk.tiles), ceil_div(steps, sharing.least_steps)),
               ceil_div(steps, sharing.most_steps));
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

template <Pass kPass, typename T, Activation kActivation, bool kResidual>
void launch_rows(const Params& params, cudaStream_t stream) {
  const unsigned grid = blocks(params.walk.tiles * params.walk.splits);
  if constexpr (kPass == Pass::kStats) stats_rows_kernel<T><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kApply)
    apply_rows_kernel<T, kActivation, kResidual><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kReduce)
    reduce_rows_kernel<T, kActivation, kResidual><<<grid, kThreads, 0, stream>>>(params);
  if constexpr (kPass == Pass::kInputGrad)
    input_grad_rows_kernel<T, kActivation, kResidual><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <Pass kPass, typename T>
void launch_rows(const Params& params, cudaStream_t stream) {
  constexpr Activation kNone = Activation::kNone, kRelu = Activation::kRelu, kLeaky = Activation::kLeaky;
  const bool residual = params.residual.data;
  if constexpr (kPass == Pass::kStats) {
    launch_rows<kPass, T, kNone, false>(params, stream);
  } else if (params.slope == 1) {
    // Without an activation the backward passes read no residual.
    if constexpr (kPass == Pass::kApply) {
      if (residual) return launch_rows<kPass, T, kNone, true>(params, stream);
    }
    launch_rows<kPass, T, kNone, false>(params, stream);
  } else if (params.slope == 0) {
    if (residual) launch_rows<kPass, T, kRelu, true>(params, stream);
    else launch_rows<kPass, T, kRelu, false>(params, stream);
  } else {
    if (residual) launch_rows<kPass, T, kLeaky, true>(params, stream);
    else launch_rows<kPass, T, kLeaky, false>(params, stream);
  }
}

// Runs a pass over the map.
template <Pass kPass, typename T>
void run(Params& params, bool channels, const Tensor& like, cudaStream_t stream) {
  constexpr bool kReduces = kPass == Pass::kStats || kPass == Pass::kReduce;
  constexpr int kVector = 16 / sizeof(T);
  bool vectors = true;
  for (const Map* map : {&params.x, &params.residual, &params.grad, &params.out, &params.out_residual})
    vectors = vectors && aligned<T>(*map, params.walk, channels);
  // Statistics of one value for all positions of an image are nobody's hot path.
  if (kPass == Pass::kStats && !channels && params.x.stride == 0) vectors = false;
  share(params.walk, channels, vectors ? kVector : 1, kReduces);
  Tensor found;  // given back when the launch is in the stream, as is all memory that only the stream reads
  if constexpr (kReduces) {
    constexpr int64_t kFloats =
        (kPass == Pass::kStats ? sizeof(Moments<float>) : sizeof(Sums)) / sizeof(float);
    Partials& partials = params.partials;
    partials = partials_of(params.walk.tiles, params.walk.splits, params.walk.channels, stream);
    found = memory::new_empty(like, {(partials.splits + partials.groups) * params.walk.channels * kFloats});
    partials.found = found.mutable_data_ptr<float>();
  }
  // A gradient of the residual without the residual is written by the general kernels.
  const bool rows =
      vectors && channels && (params.residual.data || !params.out_residual.data) && collapse(params);
  if (rows) launch_rows<kPass, T>(params, stream);
  else if (vectors && channels) launch<kPass, T, kVector, true>(params, stream);
  else if (vectors) launch<kPass, T, kVector, false>(params, stream);
  else if (channels) launch<kPass, T, 1, true>(params, stream);
  else launch<kPass, T, 1, false>(params, stream);
}

Walk walk_over(const FeatureMap& map) {
  return {map.images, map.channels, map.positions, 0, 0, 0, 0};
}

Params make_params(BatchNormProblem& problem, const std::optional<FeatureMap>& out) {
  const bool channels = along_channels(problem.x);
  Params params{};
  params.x = map_of(problem.x, channels);
  params.residual = map_of(problem.residual, channels);
  params.grad = map_of(problem.grad, channels);
  params.out = map_of(out, channels);
  params.out_residual = map_of(std::nullopt, channels);
  params.vectors = vectors_of(problem);
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

// mean and var of x, or as `params` says mean and rstd.
TwoTensors statistics(const Tensor& x, Params params) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const FeatureMap map = checked_map(x);
  Tensor first = per_channel(x), second = per_channel(x);
  const bool channels = along_channels(map);
  params.x = map_of(map, channels);
  params.walk = walk_over(map);
  params.first = first.mutable_data_ptr<float>();
  params.second = second.mutable_data_ptr<float>();
  dispatch(x, [&](auto element) { run<Pass::kStats, decltype(element)>(params, channels, first, stream); });
  return {first, second};
}

TwoTensors sums_of(const Tensor& x, BatchNormProblem& problem, cudaStream_t stream) {
  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  Params params = make_params(problem, std::nullopt);
  params.first = sum_g.mutable_data_ptr<float>();
  params.second = sum_g_xhat.mutable_data_ptr<float>();
  dispatch(x, [&](auto element) {
    run<Pass::kReduce, decltype(element)>(params, along_channels(problem.x), sum_g, stream);
  });
  return {sum_g, sum_g_xhat};
}

TwoTensors gradients_of(const Tensor& x, BatchNormProblem& problem, const OptionalTensor& sum_g,
                        const OptionalTensor& sum_g_xhat, bool need_residual, cudaStream_t stream) {
  Tensor sum = vector(sum_g, x, "sum_g"), sum_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  Tensor grad_x = empty_map(x), grad_residual = needed_map(x, need_residual);
  Params params = make_params(problem, feature_map(grad_x));
  if (need_residual) params.out_residual = map_of(feature_map(grad_residual), along_channels(problem.x));
  if (sum.defined() && sum_xhat.defined()) {
    params.vectors.sum_g = on_16_bytes(sum);
    params.vectors.sum_g_xhat = on_16_bytes(sum_xhat);
  }
  dispatch(x, [&](auto element) {
    run<Pass::kInputGrad, decltype(element)>(params, along_channels(problem.x), problem.mean, stream);
  });
  return {grad_x, grad_residual};
}

TwoTensors batch_norm_stats(const Tensor& x) {
  return statistics(x, Params{});
}

TwoTensors batch_norm_factors_(const Tensor& x, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               double momentum, double eps) {
  check_running(running_mean, x);
  check_running(running_var, x);
  Params params{};
  params.updates = true;
  params.update = {static_cast<float>(momentum), static_cast<float>(eps)};
  params.running_mean = running_mean ? running_mean->mutable_data_ptr<float>() : nullptr;
  params.running_var = running_var ? running_var->mutable_data_ptr<float>() : nullptr;
  params.batches = batch_count(num_batches_tracked);
  return statistics(x, params);
}

Tensor batch_norm_act_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, double slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  BatchNormProblem problem = make_problem({}, x, mean, rstd, weight, bias, residual, slope);
  Tensor y = empty_map(x);
  Params params = make_params(problem, feature_map(y));
  dispatch(x, [&](auto element) {
    run<Pass::kApply, decltype(element)>(params, along_channels(problem.x), mean, stream);
  });
  return y;
}

TwoTensors batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, double slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  return sums_of(x, problem, current_stream(x));
}

TwoTensors batch_norm_act_input_grad(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& rstd, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual, double slope,
                                     const OptionalTensor& sum_g, const OptionalTensor& sum_g_xhat,
                                     bool need_residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  return gradients_of(x, problem, sum_g, sum_g_xhat, need_residual, current_stream(x));
}

ThreeTensors batch_norm_act_forward_(const Tensor& x, const OptionalTensor& running_mean,
                                     const OptionalTensor& running_var,
                                     const OptionalTensor& num_batches_tracked, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual,
                                     double momentum, double eps, double slope) {
  auto [mean, rstd] = batch_norm_factors_(x, running_mean, running_var, num_batches_tracked, momentum, eps);
  return {batch_norm_act_apply(x, mean, rstd, weight, bias, residual, slope), mean, rstd};
}

FourTensors batch_norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                    const Tensor& rstd, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual, double slope,
                                    bool training, bool need_x, bool need_vectors, bool need_residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  return make_gradients(
      x, training, need_x, need_vectors, need_residual, [&] { return sums_of(x, problem, stream); },
      [&](const auto&... arguments) { return gradients_of(x, problem, arguments..., stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("batch_norm_stats.cuda", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_factors_.cuda", TORCH_BOX(&batch_norm_factors_));
  m.impl("batch_norm_act_apply.cuda", TORCH_BOX(&batch_norm_act_apply));
  m.impl("batch_norm_act_reduce.cuda", TORCH_BOX(&batch_norm_act_reduce));
  m.impl("batch_norm_act_input_grad.cuda", TORCH_BOX(&batch_norm_act_input_grad));
  m.impl("batch_norm_act_forward_.cuda", TORCH_BOX(&batch_norm_act_forward_));
  m.impl("batch_norm_act_backward.cuda", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace auglocal

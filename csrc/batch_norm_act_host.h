// What the cpu and the cuda provider of batch_norm_act share on the host: arguments, checks and outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "feature_map.h"

namespace auglocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor per_channel(const Tensor& x, bool needed = true) {
  return memory::new_empty(x, {needed ? x.size(1) : 0}, accumulation(x));
}

// Memory for a map like x; without elements where it is not needed.
inline Tensor needed_map(const Tensor& x, bool needed) {
  return needed ? empty_map(x) : memory::new_empty(x, {0});
}

// Whether a kernel runs along the channels, which lie together in channels-last maps and are all there is in
// (N, C), or along the positions.
inline bool along_channels(const FeatureMap& map) {
  return map.positions == 1 || (map.stride_c == 1 && map.stride_p != 1);
}

inline FeatureMap checked_map(const Tensor& x) {
  FeatureMap map = feature_map(x);
  STD_TORCH_CHECK(map.images > 0 && map.channels > 0 && map.positions > 0,
                  "expected a feature map with elements");
  return map;
}

// A running statistic, which is written to.
inline void check_running(const OptionalTensor& running, const Tensor& x) {
  STD_TORCH_CHECK(!running || (running->dim() == 1 && running->size(0) == x.size(1) &&
                               running->scalar_type() == accumulation(x) && running->is_contiguous()),
                  "expected running statistics (C,) in the accumulation dtype for ", x.size(1), " channels");
}

// BatchNorm's count of the batches it has seen, which is written to.
inline int64_t* batch_count(const OptionalTensor& count) {
  STD_TORCH_CHECK(!count || (count->scalar_type() == ScalarType::Long && count->numel() == 1),
                  "expected num_batches_tracked, one number in int64");
  return count ? count->mutable_data_ptr<int64_t>() : nullptr;
}

// The tensors that every pass but the statistics reads; per-channel ones in the accumulation dtype.
struct BatchNormProblem {
  FeatureMap x;
  std::optional<FeatureMap> residual;  // none where it is not read
  std::optional<FeatureMap> grad;      // none in the forward pass
  Tensor mean, rstd, weight, bias;     // (C,); weight and bias may be undefined
  double slope;

  int64_t count() const { return x.images * x.positions; }
};

inline FeatureMap matching_map(const Tensor& tensor, const Tensor& x, const char* name) {
  FeatureMap map = feature_map(tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && map.images == x.size(0) &&
                      map.channels == x.size(1) && tensor.numel() == x.numel(),
                  "expected ", name, " in the shape and the dtype of x");
  return map;
}

inline Tensor vector(const OptionalTensor& tensor, const Tensor& x, const char* name) {
  if (!tensor) return Tensor();
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == x.size(1), "expected ", name, " (C,) for ",
                  x.size(1), " channels");
  if (tensor->scalar_type() == accumulation(x) && tensor->is_contiguous()) return *tensor;
  return torch::stable::contiguous(torch::stable::to(*tensor, accumulation(x)));
}

inline BatchNormProblem make_problem(const OptionalTensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& rstd, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual,
                                     double slope) {
  BatchNormProblem problem{checked_map(x),
                           {},
                           {},
                           vector(mean, x, "mean"),
                           vector(rstd, x, "rstd"),
                           vector(weight, x, "weight"),
                           vector(bias, x, "bias"),
                           slope};
  if (grad) problem.grad = matching_map(*grad, x, "grad");
  // Backward reads the residual for the mask alone.
  if (residual && !(grad && slope == 1)) problem.residual = matching_map(*residual, x, "residual");
  return problem;
}

// What backward makes, of a provider's passes reduce() and input_grad(sum_g, sum_g_xhat, need_residual).
template <typename Reduce, typename InputGrad>
FourTensors make_gradients(const Tensor& x, bool training, bool need_x, bool need_vectors, bool need_residual,
                           const Reduce& reduce, const InputGrad& input_grad) {
  const bool through_statistics = training && need_x, sums = through_statistics || need_vectors;
  const auto [sum_g, sum_g_xhat] = sums ? reduce() : TwoTensors(per_channel(x, false), per_channel(x, false));
  if (!need_x && !need_residual) return {needed_map(x, false), needed_map(x, false), sum_g, sum_g_xhat};
  // Where the residual's gradient alone is needed, that of x is made the cheapest way.
  const OptionalTensor none;
  const auto [grad_x, grad_residual] = through_statistics ? input_grad(sum_g, sum_g_xhat, need_residual)
                                                          : input_grad(none, none, need_residual);
  return {grad_x, grad_residual, sum_g, sum_g_xhat};
}

}  // namespace auglocal

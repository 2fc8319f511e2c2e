// What the cpu and the cuda provider of pooled_cross_entropy share on the host: arguments, checks and
// outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "feature_map.h"
#include "memory.h"

namespace auglocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// loss (), logits (N, K), correct () int64, grad_pooled (N, C), grad_weight (K, C), grad_bias (K,)
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct PooledProblem {
  FeatureMap map;
  ScalarType accumulate;
  Tensor weight;  // (K, C) in the accumulation dtype, or as it came
  Tensor bias;    // (K,) in the accumulation dtype, or undefined
  Tensor target;  // (N,) int64, contiguous
  int64_t classes, ignore_index;
  double smoothing;
  bool mean, need_x, need_weight, need_bias;

  bool need_any() const { return need_x || need_weight || need_bias; }

  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size) const {
    return memory::new_empty(weight, size, accumulate);
  }
};

inline PooledProblem make_problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const Tensor& target, int64_t ignore_index, double smoothing, bool mean,
                                  bool need_x, bool need_weight, bool need_bias, bool widen = true) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  const ScalarType accumulate = wide ? ScalarType::Double : ScalarType::Float;
  FeatureMap map = feature_map(x);
  STD_TORCH_CHECK(map.images > 0 && map.channels > 0 && map.positions > 0,
                  "expected a feature map with elements");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == map.channels && weight.size(0) > 0,
                  "expected weight (K, C) for ", map.channels, " channels");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "expected bias (K,)");
  STD_TORCH_CHECK(
      target.dim() == 1 && target.size(0) == map.images && target.scalar_type() == ScalarType::Long,
      "expected target (N,) in int64 for ", map.images, " images");
  return {map,
          accumulate,
          memory::packed(weight, widen ? accumulate : weight.scalar_type()),
          bias ? memory::packed(*bias, accumulate) : Tensor(),
          memory::packed(target, ScalarType::Long),
          weight.size(0),
          ignore_index,
          smoothing,
          mean,
          need_x,
          need_weight,
          need_bias && bias.has_value()};
}

// The gradients that are matrix products of d (N, K): of the pooled feature and of the weight, each where
// needed.
inline std::tuple<Tensor, Tensor> products(const PooledProblem& problem, const Tensor& d,
                                           const Tensor& sums) {
  return {problem.need_x ? torch::stable::matmul(d, problem.weight) : problem.empty({0}),
          problem.need_weight ? torch::stable::matmul(torch::stable::transpose(d, 0, 1), sums)
                              : problem.empty({0})};
}

}  // namespace auglocal

// What the cpu and the cuda provider of similarity_loss share on the host: arguments, checks, and the walk
// over blocks of rows of the similarity matrix.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "feature_map.h"
#include "memory.h"

namespace auglocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// loss (), mean (N, C), factor (N, C); without elements where they are not needed
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

struct SimilarityProblem {
  FeatureMap z;
  Tensor target;  // (N,) int64, contiguous
  int64_t classes, ignore_index;
  bool is_map, need_grad;
  ScalarType accumulate;

  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size) const {
    return memory::new_empty(z.tensor, size, accumulate);
  }

  Tensor per_channel(bool made = true) const { return made ? empty({z.images, z.channels}) : empty({0}); }

  // Vectors in the accumulation dtype: their own features.
  Tensor vectors() const { return memory::packed(torch::stable::flatten(z.tensor, 1, -1), accumulate); }
};

inline SimilarityProblem make_problem(const Tensor& z, const Tensor& target, int64_t classes,
                                      int64_t ignore_index, bool need_grad) {
  const bool wide = z.scalar_type() == ScalarType::Double;
  FeatureMap map = feature_map(z);
  STD_TORCH_CHECK(map.images > 0 && map.channels > 0 && map.positions > 0,
                  "expected a feature map with elements");
  STD_TORCH_CHECK(z.dim() == 2 || map.positions > 1, "expected at least two positions");
  STD_TORCH_CHECK(
      target.dim() == 1 && target.size(0) == map.images && target.scalar_type() == ScalarType::Long,
      "expected target (N,) in int64 for ", map.images, " images");
  STD_TORCH_CHECK(classes > 0, "expected at least one class");
  return {map,       memory::packed(target, ScalarType::Long),     classes, ignore_index, z.dim() > 2,
          need_grad, wide ? ScalarType::Double : ScalarType::Float};
}

// Calls pairs(first row, rows, similarities (rows, N)) for blocks of at most `most` pairs, and where the
// gradient is needed gradient(first row, rows, (rows, C)) with the product of what `pairs` left there and
// `unit`.
template <typename Pairs, typename Gradient>
void for_each_block(const SimilarityProblem& problem, const Tensor& unit, int64_t most, const Pairs& pairs,
                    const Gradient& gradient) {
  const int64_t images = problem.z.images, rows = std::max<int64_t>(1, most / images);
  const Tensor transposed = torch::stable::transpose(unit, 0, 1);
  for (int64_t first = 0; first < images; first += rows) {
    const int64_t count = std::min(rows, images - first);
    Tensor block = unit;
    block = torch::stable::narrow(block, 0, first, count);
    Tensor similar = torch::stable::matmul(block, transposed);
    pairs(first, count, similar);
    if (problem.need_grad) gradient(first, count, torch::stable::matmul(similar, unit));
  }
}

// The tensors of the backward pass.
struct InputGradProblem {
  FeatureMap z;
  Tensor mean, factor;  // (N, C), contiguous
  Tensor grad;          // ()
};

inline InputGradProblem make_input_grad_problem(const Tensor& z, const Tensor& mean, const Tensor& factor,
                                                const Tensor& grad) {
  const ScalarType accumulate =
      z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* tensor : {&mean, &factor})
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == z.size(0) && tensor->size(1) == z.size(1) &&
                        tensor->scalar_type() == accumulate,
                    "expected mean and factor (N, C) in the accumulation dtype");
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == accumulate,
                  "expected grad_loss () in the accumulation dtype");
  return {feature_map(z), memory::packed(mean, accumulate), memory::packed(factor, accumulate), grad};
}

}  // namespace auglocal

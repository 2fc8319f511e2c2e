// What the cpu and the cuda provider of supervised_contrast share on the host: arguments, checks and the walk
// over blocks of rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "memory.h"
#include "supervised_contrast.h"

namespace auglocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// loss (), gradient of the features (N, D)
using ContrastOutputs = std::tuple<Tensor, Tensor>;

struct ContrastProblem {
  Tensor features;  // (N, D), any strides
  Tensor target;    // (N,) int64, contiguous
  int64_t images, width;
  double temperature;
  int64_t ignore_index;
  bool need_grad;
  ScalarType accumulate;

  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size) const {
    return memory::new_empty(features, size, accumulate);
  }
};

inline ContrastProblem make_contrast(const Tensor& features, const Tensor& target, double temperature,
                                     int64_t ignore_index, bool need_grad) {
  STD_TORCH_CHECK(features.dim() == 2 && features.numel() > 0, "expected features (N, D) with elements");
  STD_TORCH_CHECK(
      target.dim() == 1 && target.size(0) == features.size(0) && target.scalar_type() == ScalarType::Long,
      "expected target (N,) in int64 for ", features.size(0), " rows of features");
  STD_TORCH_CHECK(temperature > 0, "expected a positive temperature, got ", temperature);
  return {features,
          memory::packed(target, ScalarType::Long),
          features.size(0),
          features.size(1),
          temperature,
          ignore_index,
          need_grad,
          features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float};
}

// Some rows of the matrix of pairs: of z z^T, then of G.
struct PairRows {
  Tensor matrix;  // (count, N)
  int64_t first, count;
};

// Calls `rows(pairs)`, which turns products into G and writes the rows' losses, for one block after the
// other, and where the gradient is needed `add(down, across, pairs)` with G^T z_block (N, D) and, for the
// block's rows alone, G z.
template <typename Rows, typename Add>
void walk_pairs(const ContrastProblem& problem, Tensor& z, const Rows& rows, const Add& add) {
  const Tensor columns = torch::stable::transpose(z, 0, 1);
  for (int64_t first = 0; first < problem.images; first += kContrastRows) {
    const int64_t count = std::min(kContrastRows, problem.images - first);
    const Tensor own = torch::stable::narrow(z, 0, first, count);
    const PairRows pairs{torch::stable::matmul(own, columns), first, count};
    rows(pairs);
    if (!problem.need_grad) continue;
    const Tensor down = torch::stable::matmul(torch::stable::transpose(pairs.matrix, 0, 1), own);
    add(down, torch::stable::matmul(pairs.matrix, z), pairs);
  }
}

}  // namespace auglocal

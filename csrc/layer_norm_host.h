// What the cpu and the cuda provider of layer_norm share on the host: arguments, checks and outputs.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "memory.h"

namespace auglocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a pass reads; undefined where it is not there.
struct NormInputs {
  Tensor x;             // (..., C), contiguous: R rows of C elements
  Tensor weight, bias;  // (C,), contiguous, of any floating dtype; bias only beside weight
  Tensor mean, rstd;    // (R,) in the accumulation dtype; no mean for RMSNorm
  int64_t rows, width;  // R, C
  ScalarType wide;      // the accumulation dtype

  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef size) const {
    return memory::new_empty(x, size, wide);
  }

  // A tensor in x's shape and dtype.
  Tensor map() const { return memory::new_empty(x, x.sizes()); }

  // Another tensor of x's shape and dtype, contiguous.
  Tensor beside(const Tensor& other, const char* name) const {
    const auto shape = x.sizes(), given = other.sizes();
    STD_TORCH_CHECK(std::equal(shape.begin(), shape.end(), given.begin(), given.end()) &&
                        other.scalar_type() == x.scalar_type(),
                    "expected ", name, " in the shape and dtype of x");
    return memory::packed(other, x.scalar_type());
  }

  Tensor beside(const std::optional<Tensor>& other, const char* name) const {
    return other ? beside(*other, name) : Tensor();
  }
};

inline NormInputs norm_inputs(const Tensor& x, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() > 0 && x.numel() > 0, "expected x (..., C) with elements");
  const int64_t width = x.size(x.dim() - 1);
  STD_TORCH_CHECK(weight || !bias, "expected no bias without weight");
  const auto parameter = [&](const std::optional<Tensor>& given) {
    if (!given) return Tensor();
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == width, "expected weight and bias (C,) for ", width,
                    " elements of a row");
    return memory::packed(*given, given->scalar_type());
  };
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {memory::packed(x, x.scalar_type()),
          parameter(weight),
          parameter(bias),
          Tensor(),
          Tensor(),
          x.numel() / width,
          width,
          wide};
}

// The same with statistics that a forward pass has made.
inline NormInputs norm_inputs(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                              bool rms) {
  NormInputs inputs = norm_inputs(x, weight, bias);
  const auto statistic = [&](const Tensor& given) {
    STD_TORCH_CHECK(given.dim() == 1 && given.size(0) == inputs.rows && given.scalar_type() == inputs.wide,
                    "expected mean and rstd (R,) for ", inputs.rows,
                    " rows, in float32, or in float64 for a double x");
    return memory::packed(given, inputs.wide);
  };
  if (!rms) inputs.mean = statistic(mean);
  inputs.rstd = statistic(rstd);
  return inputs;
}

// y, total, mean, rstd
using NormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// grad_x, grad_weight, grad_bias
using NormGradients = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace auglocal

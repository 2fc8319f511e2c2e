// pooled_cross_entropy on the CPU: pooling, rows of logits and small matrix products here, large ones by the
// library's matmul.
#include "../pooled_cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../pooled_cross_entropy_host.h"
#include "convert.h"
#include "loops.h"
#include "pooled_outputs.h"
#include "product.h"
#include "stripes.h"
#include "sums.h"

#define AUGLOCAL_LOOPS "pooled_cross_entropy_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

// W: the type of the weight's elements, T or the one that sums are in.
template <typename T, typename W>
Outputs run(const PooledProblem& problem, bool own) {
  using Real = Accumulate<T>;
  const int64_t images = problem.map.images, channels = problem.map.channels, classes = problem.classes,
                positions = problem.map.positions;
  Tensor sums = problem.empty({images, channels});
  AUGLOCAL_AT_LEVEL(pool<T>(problem.map, sums.mutable_data_ptr<Real>()));

  const MatrixView<const Real> pooled(sums.const_data_ptr<Real>(), images, channels);
  const MatrixView<const W> weight(problem.weight.const_data_ptr<W>(), classes, channels);
  // The product of two matrices, which are in memory as well as in tensors.
  const auto product = [&](const auto& a, const auto& b, const Tensor& left, const Tensor& right) {
    if (!own) return torch::stable::matmul(left, right);
    Tensor made = problem.empty({a.rows, b.columns});
    const MatrixView<Real> out(made.mutable_data_ptr<Real>(), a.rows, b.columns);
    AUGLOCAL_AT_LEVEL(multiply(a, b, out));
    return made;
  };
  const auto transposed = [&](const Tensor& matrix) {
    return own ? matrix : torch::stable::transpose(matrix, 0, 1);
  };
  Tensor logits = product(pooled, weight.transposed(), sums, transposed(problem.weight));

  const int64_t* target = problem.target.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t n = 0; n < images; ++n) counted += counts(target[n], classes, problem.ignore_index);
  const Real divisor = problem.mean ? static_cast<Real>(counted) : Real(1);

  Tensor d = problem.empty({problem.need_any() ? images : 0, classes});
  Real* logit_rows = logits.mutable_data_ptr<Real>();
  Real* d_rows = problem.need_any() ? d.mutable_data_ptr<Real>() : nullptr;
  const Real* bias = problem.bias.defined() ? problem.bias.const_data_ptr<Real>() : nullptr;
  std::vector<Real> losses(images);
  std::vector<char> hits(images);
  torch::stable::parallel_for(0, images, grain(classes), [&](int64_t begin, int64_t end) {
    const Real scale = 1 / (divisor * static_cast<Real>(positions));
    for (int64_t n = begin; n < end; ++n) {
      bool hit = false;
      AUGLOCAL_AT_LEVEL(losses[n] = class_row(problem, target[n], bias, scale, logit_rows + n * classes,
                                              d_rows ? d_rows + n * classes : nullptr, &hit));
      hits[n] = hit;
    }
  });

  Tensor loss = problem.empty({}), correct = memory::new_empty(problem.target, {});
  double total = 0;
  int64_t hit_count = 0;
  for (int64_t n = 0; n < images; ++n) {
    total += losses[n];
    hit_count += hits[n];
  }
  *loss.mutable_data_ptr<Real>() = static_cast<Real>(total / divisor);
  *correct.mutable_data_ptr<int64_t>() = hit_count;

  const MatrixView<const Real> gradient(d_rows, images, classes);
  Tensor grad_bias = problem.empty({problem.need_bias ? classes : 0});
  if (problem.need_bias)
    AUGLOCAL_AT_LEVEL(sum_rows(images, classes, positions, d_rows, grad_bias.mutable_data_ptr<Real>()));
  Tensor grad_pooled = problem.need_x ? product(gradient, weight, d, problem.weight) : problem.empty({0});
  Tensor grad_weight =
      problem.need_weight ? product(gradient.transposed(), pooled, transposed(d), sums) : problem.empty({0});
  return {loss, logits, correct, grad_pooled, grad_weight, grad_bias};
}

// Parameters of half precision in float32, without the dispatcher, which takes longer than a small head.
Tensor widened_parameter(const Tensor& parameter) {
  const ScalarType dtype = parameter.scalar_type();
  if ((dtype != ScalarType::Half && dtype != ScalarType::BFloat16) || !parameter.is_contiguous())
    return parameter;
  Tensor wide = memory::new_empty(parameter, parameter.sizes(), ScalarType::Float);
  THO_DISPATCH_V2(dtype, "pooled_cross_entropy", AT_WRAP([&] {
                    AUGLOCAL_AT_LEVEL(widen(parameter.const_data_ptr<scalar_t>(), parameter.numel(),
                                            wide.mutable_data_ptr<float>()));
                  }),
                  ScalarType::Half, ScalarType::BFloat16);
  return wide;
}

}  // namespace

Outputs pooled_cross_entropy(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target,
                             int64_t ignore_index, double smoothing, bool mean, bool need_x, bool need_weight,
                             bool need_bias) {
  const int64_t images = x.dim() > 0 ? x.size(0) : 0;
  const bool own = images <= kFewImages || images * weight.numel() <= kOwnProduct;
  const bool as_it_is = own && weight.scalar_type() == x.scalar_type();
  if (x.scalar_type() != ScalarType::Double) {
    if (!as_it_is) weight = widened_parameter(weight);
    if (bias) bias = widened_parameter(*bias);
  }
  const PooledProblem problem = make_problem(x, weight, bias, target, ignore_index, smoothing, mean, need_x,
                                             need_weight, need_bias, !as_it_is);
  Outputs outputs;
  const auto dispatched = [&](auto element) {
    using T = decltype(element);
    outputs = as_it_is ? run<T, T>(problem, own) : run<T, Accumulate<T>>(problem, own);
  };
  THO_DISPATCH_V2(x.scalar_type(), "pooled_cross_entropy", AT_WRAP([&] { dispatched(scalar_t()); }),
                  ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  return outputs;
}

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("pooled_cross_entropy.cpu", TORCH_BOX(&pooled_cross_entropy));
}

}  // namespace auglocal

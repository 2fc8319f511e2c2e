// linear_cross_entropy on the CPU: what comes between the matrix products of a chunk of rows, and the product
// of bfloat16 factors that makes float32 logits. The chunks are in Python; small problems have none.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../memory.h"
#include "../pooled_cross_entropy.h"
#include "bfloat16_product.h"
#include "convert.h"
#include "loops.h"
#include "pooled_outputs.h"
#include "sums.h"

namespace auglocal {
namespace {

struct TokenProblem {
  int64_t classes, ignore_index;
  double smoothing, z_loss, scale;  // scale: of the gradients
  bool gradient;
};

struct RowResult {
  double loss = 0, nll = 0;
  bool hit = false;
};

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "linear_cross_entropy_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_matrix(const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.size(0) == rows && tensor.size(1) == columns,
                  "expected ", name, " (", rows, ", ", columns, "), contiguous and of the right dtype");
}

template <typename Real>
void run(const TokenProblem& problem, const Tensor& logits, const std::optional<Tensor>& bias,
         const Tensor& target, const std::optional<Tensor>& rounded, const std::optional<Tensor>& grad_bias,
         double* totals) {
  const int64_t number = logits.size(0), classes = problem.classes;
  Real* rows = logits.mutable_data_ptr<Real>();
  const Real* added = bias ? bias->const_data_ptr<Real>() : nullptr;
  const int64_t* labels = target.const_data_ptr<int64_t>();
  c10::BFloat16* narrow = rounded ? rounded->mutable_data_ptr<c10::BFloat16>() : nullptr;
  std::vector<RowResult> results(number);
  torch::stable::parallel_for(0, number, grain(classes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Real* row = rows + r * classes;
      AUGLOCAL_AT_LEVEL(results[r] = token_row(problem, labels[r], added, row);
                        if (narrow) store(row, classes, narrow + r * classes));
    }
  });
  for (const RowResult& result : results) {
    totals[0] += result.loss;
    totals[1] += result.nll;
    totals[2] += result.hit;
  }
  if (!grad_bias) return;
  Real* sums = grad_bias->mutable_data_ptr<Real>();
  torch::stable::parallel_for(0, classes, grain(number), [&](int64_t begin, int64_t end) {
    AUGLOCAL_AT_LEVEL(add_rows(rows, number, classes, begin, end, sums));
  });
}

void linear_cross_entropy_rows_(Tensor logits, std::optional<Tensor> bias, Tensor target,
                                int64_t ignore_index, double smoothing, double z_loss, double scale,
                                bool gradient, std::optional<Tensor> rounded, std::optional<Tensor> grad_bias,
                                Tensor totals) {
  const ScalarType wide = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() == 2 && (wide == ScalarType::Float || wide == ScalarType::Double),
                  "expected logits (R, V) in float32 or float64");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_matrix(logits, wide, rows, classes, "logits");
  if (rounded) check_matrix(*rounded, ScalarType::BFloat16, rows, classes, "rounded");
  for (const auto* vector : {&bias, &grad_bias})
    STD_TORCH_CHECK(!*vector || ((*vector)->dim() == 1 && (*vector)->size(0) == classes &&
                                 (*vector)->scalar_type() == wide && (*vector)->is_contiguous()),
                    "expected bias and grad_bias (V,) in the dtype of the logits");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == rows && target.scalar_type() == ScalarType::Long &&
                      target.is_contiguous(),
                  "expected target (R,) in int64");
  STD_TORCH_CHECK(totals.numel() == 3 && totals.scalar_type() == ScalarType::Double && totals.is_contiguous(),
                  "expected totals (3,) in float64");
  const TokenProblem problem{classes, ignore_index, smoothing, z_loss, scale, gradient};
  double* sums = totals.mutable_data_ptr<double>();
  if (wide == ScalarType::Double) run<double>(problem, logits, bias, target, rounded, grad_bias, sums);
  else run<float>(problem, logits, bias, target, rounded, grad_bias, sums);
}

// Whether out (R, V) has become x weight^T: not where the processor has no instruction for it.
bool linear_cross_entropy_logits_(Tensor out, Tensor x, Tensor weight) {
  if (!multiplies_bfloat16()) return false;
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "expected x (R, C) and weight (V, C)");
  const int64_t rows = x.size(0), columns = weight.size(0), depth = x.size(1);
  check_matrix(x, ScalarType::BFloat16, rows, depth, "x");
  check_matrix(weight, ScalarType::BFloat16, columns, depth, "weight");
  check_matrix(out, ScalarType::Float, rows, columns, "logits");
  multiply_bfloat16(x.const_data_ptr<c10::BFloat16>(), weight.const_data_ptr<c10::BFloat16>(), rows, columns,
                    depth, out.mutable_data_ptr<float>());
  return true;
}

// How many labels count.
int64_t linear_cross_entropy_counted(Tensor target, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.dim() == 1 && target.scalar_type() == ScalarType::Long && target.is_contiguous(),
                  "expected target (R,) in int64");
  const int64_t* labels = target.const_data_ptr<int64_t>();
  return std::count_if(labels, labels + target.numel(),
                       [&](int64_t label) { return label >= 0 && label < classes && label != ignore_index; });
}

// Loss, number of hits and nll of all rows, by what was added up to `totals`.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_results(Tensor totals, int64_t divisor,
                                                                bool in_double) {
  STD_TORCH_CHECK(totals.numel() == 3 && totals.scalar_type() == ScalarType::Double && totals.is_contiguous(),
                  "expected totals (3,) in float64");
  const double* sums = totals.const_data_ptr<double>();
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = memory::new_empty(totals, {}, dtype), nll = memory::new_empty(totals, {}, dtype),
         correct = memory::new_empty(totals, {}, ScalarType::Long);
  *correct.mutable_data_ptr<int64_t>() = static_cast<int64_t>(sums[2]);
  const auto write = [&](const Tensor& to, double value) {
    if (in_double) *to.mutable_data_ptr<double>() = value;
    else *to.mutable_data_ptr<float>() = static_cast<float>(value);
  };
  write(loss, sums[0] / static_cast<double>(divisor));
  write(nll, sums[1]);
  return {loss, correct, nll};
}

// The whole op without label smoothing and z-loss, in one call: to pool one position changes nothing.
Outputs linear_cross_entropy_small(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target,
                                   int64_t ignore_index, double smoothing, double z_loss,
                                   ScalarType /*product*/, bool need_x, bool need_weight, bool need_bias) {
  STD_TORCH_CHECK(x.dim() == 2, "expected x (R, C)");
  STD_TORCH_CHECK(smoothing == 0 && z_loss == 0, "expected neither label smoothing nor z-loss");
  auto [loss, logits, correct, grad_x, grad_weight, grad_bias] = pooled_cross_entropy(
      x, weight, bias, target, ignore_index, smoothing, true, need_x, need_weight, need_bias);
  const int64_t counted =
      linear_cross_entropy_counted(memory::packed(target, ScalarType::Long), weight.size(0), ignore_index);
  if (counted == 0)  // which is no mean
    for (Tensor* each : {&loss, &grad_x, &grad_weight, &grad_bias}) torch::stable::zero_(*each);
  const ScalarType wide = loss.scalar_type();
  Tensor nll = memory::new_empty(loss, {});
  if (wide == ScalarType::Double)
    *nll.mutable_data_ptr<double>() = *loss.const_data_ptr<double>() * static_cast<double>(counted);
  else *nll.mutable_data_ptr<float>() = *loss.const_data_ptr<float>() * static_cast<float>(counted);
  // A gradient in bfloat16 has the range of float32, and is stored as it is.
  const auto stored = [&](const Tensor& gradient, const Tensor& of) {
    return of.scalar_type() == ScalarType::BFloat16 ? memory::packed(gradient, ScalarType::BFloat16)
                                                    : gradient;
  };
  return {loss, correct, nll, stored(grad_x, x), stored(grad_weight, weight), grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("linear_cross_entropy_rows_.cpu", TORCH_BOX(&linear_cross_entropy_rows_));
  m.impl("linear_cross_entropy_logits_.cpu", TORCH_BOX(&linear_cross_entropy_logits_));
  m.impl("linear_cross_entropy_counted.cpu", TORCH_BOX(&linear_cross_entropy_counted));
  m.impl("linear_cross_entropy_results.cpu", TORCH_BOX(&linear_cross_entropy_results));
  m.impl("linear_cross_entropy_small.cpu", TORCH_BOX(&linear_cross_entropy_small));
}

}  // namespace auglocal

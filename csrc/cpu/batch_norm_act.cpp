// batch_norm_act on the CPU: two reductions over (N, P) and two passes element by element.
#include "../batch_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "../batch_norm_act_host.h"
#include "batch_norm_factors.h"
#include "channels.h"
#include "convert.h"
#include "grid.h"
#include "loops.h"
#include "sums.h"

namespace auglocal {
namespace {

// The moments of all parts, which have `count` values together: each is merged with the mean of all.
Moments<double> merged(const Moments<double>* parts, int64_t number, double count) {
  Moments<double> all{count, 0, 0};
  for (int64_t i = 0; i < number; ++i) all.mean += parts[i].count * parts[i].mean;
  all.mean /= count;
  for (int64_t i = 0; i < number; ++i) {
    const double delta = parts[i].mean - all.mean;
    all.squares += parts[i].squares + parts[i].count * (delta * delta);
  }
  return all;
}

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "batch_norm_act_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

// Calls f with an element of x's dtype.
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  THO_DISPATCH_V2(x.scalar_type(), "batch_norm_act", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Double,
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

TwoTensors batch_norm_stats(const Tensor& x) {
  const FeatureMap map = checked_map(x);
  Tensor mean = per_channel(x), var = per_channel(x);
  dispatch(x, [&](auto element) { AUGLOCAL_AT_LEVEL(stats<decltype(element)>(map, mean, var)); });
  return {mean, var};
}

}  // namespace

TwoTensors batch_norm_factors_(const Tensor& x, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               double momentum, double eps) {
  check_running(running_mean, x);
  check_running(running_var, x);
  int64_t* batches = batch_count(num_batches_tracked);
  auto [mean, rstd] = batch_norm_stats(x);
  const auto update = [&](auto element) {
    using Real = decltype(element);
    const Update<Real> with{static_cast<Real>(momentum), static_cast<Real>(eps)};
    const Real count = static_cast<Real>(x.numel() / x.size(1));
    Real *means = mean.template mutable_data_ptr<Real>(), *vars = rstd.template mutable_data_ptr<Real>();
    Real* old_mean = running_mean ? running_mean->mutable_data_ptr<Real>() : nullptr;
    Real* old_var = running_var ? running_var->mutable_data_ptr<Real>() : nullptr;
    for (int64_t c = 0; c < x.size(1); ++c) {
      if (old_mean) old_mean[c] = updated(old_mean[c], means[c], with);
      if (old_var) old_var[c] = updated(old_var[c], unbiased(vars[c], count), with);
      vars[c] = reciprocal_deviation(vars[c], with);
    }
  };
  if (accumulation(x) == ScalarType::Double) update(double());
  else update(float());
  if (batches) ++*batches;
  return {mean, rstd};
}

namespace {

Tensor batch_norm_act_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, double slope) {
  const BatchNormProblem problem = make_problem({}, x, mean, rstd, weight, bias, residual, slope);
  Tensor y = empty_map(x);
  dispatch(x, [&](auto element) { AUGLOCAL_AT_LEVEL(apply<decltype(element)>(problem, feature_map(y))); });
  return y;
}

TwoTensors sums_of(const Tensor& x, const BatchNormProblem& problem) {
  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  dispatch(x,
           [&](auto element) { AUGLOCAL_AT_LEVEL(reduce<decltype(element)>(problem, sum_g, sum_g_xhat)); });
  return {sum_g, sum_g_xhat};
}

TwoTensors gradients_of(const Tensor& x, const BatchNormProblem& problem, const OptionalTensor& sum_g,
                        const OptionalTensor& sum_g_xhat, bool need_residual) {
  Tensor grad_x = empty_map(x), grad_residual = needed_map(x, need_residual);
  std::optional<FeatureMap> output_residual;
  if (need_residual) output_residual = feature_map(grad_residual);
  dispatch(x, [&](auto element) {
    AUGLOCAL_AT_LEVEL(
        input_grad<decltype(element)>(problem, sum_g, sum_g_xhat, feature_map(grad_x), output_residual));
  });
  return {grad_x, grad_residual};
}

TwoTensors batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, double slope) {
  return sums_of(x, make_problem(grad, x, mean, rstd, weight, bias, residual, slope));
}

TwoTensors batch_norm_act_input_grad(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& rstd, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual, double slope,
                                     OptionalTensor sum_g, OptionalTensor sum_g_xhat, bool need_residual) {
  if (sum_g) sum_g = vector(sum_g, x, "sum_g");
  if (sum_g_xhat) sum_g_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  return gradients_of(x, make_problem(grad, x, mean, rstd, weight, bias, residual, slope), sum_g, sum_g_xhat,
                      need_residual);
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
  const BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  return make_gradients(
      x, training, need_x, need_vectors, need_residual, [&] { return sums_of(x, problem); },
      [&](const auto&... arguments) { return gradients_of(x, problem, arguments...); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("batch_norm_stats.cpu", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_factors_.cpu", TORCH_BOX(&batch_norm_factors_));
  m.impl("batch_norm_act_apply.cpu", TORCH_BOX(&batch_norm_act_apply));
  m.impl("batch_norm_act_reduce.cpu", TORCH_BOX(&batch_norm_act_reduce));
  m.impl("batch_norm_act_input_grad.cpu", TORCH_BOX(&batch_norm_act_input_grad));
  m.impl("batch_norm_act_forward_.cpu", TORCH_BOX(&batch_norm_act_forward_));
  m.impl("batch_norm_act_backward.cpu", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace auglocal

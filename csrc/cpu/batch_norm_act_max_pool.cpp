// batch_norm_act_max_pool on the CPU. Forward keeps the activated rows of one window at a time; backward
// gathers the gradient of one row of the map at a time.
#include "../batch_norm_act_max_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../batch_norm_act_max_pool_host.h"
#include "batch_norm_factors.h"
#include "channels.h"
#include "convert.h"
#include "loops.h"
#include "sums.h"

namespace auglocal {
namespace {

constexpr int kRows = 16;  // of a pooled map that are one task

template <typename T>
struct Plane {
  T* data;
  Strides strides;

  T* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return data + n * strides.n + c * strides.c + h * strides.h + w * strides.w;
  }
};

template <typename T>
Plane<const T> plane(const Tensor& map) {
  return {map.const_data_ptr<T>(), strides_of(map)};
}

template <typename T>
Plane<T> mutable_plane(Tensor& map) {
  return {map.mutable_data_ptr<T>(), strides_of(map)};
}

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "batch_norm_act_max_pool_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

#define AUGLOCAL_DISPATCH(x, ...)                                                              \
  THO_DISPATCH_V2((x).scalar_type(), "batch_norm_act_max_pool", AT_WRAP([&] { __VA_ARGS__; }), \
                  ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16)

TwoTensors pooled(const MaxPoolProblem& problem) {
  const Tensor& x = problem.x;
  Tensor y = problem.empty_pooled(x.scalar_type()), indices = problem.empty_pooled(ScalarType::Byte);
  AUGLOCAL_DISPATCH(x, AUGLOCAL_AT_LEVEL(apply<scalar_t>(problem, y, indices)));
  return {y, indices};
}

void check_pooled(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices) {
  problem.check_pooled(grad, problem.x.scalar_type(), "grad");
  problem.check_pooled(indices, ScalarType::Byte, "indices");
}

TwoTensors sums_of(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices) {
  const Tensor& x = problem.x;
  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  AUGLOCAL_DISPATCH(x, AUGLOCAL_AT_LEVEL(reduce<scalar_t>(problem, grad, indices, sum_g, sum_g_xhat)));
  return {sum_g, sum_g_xhat};
}

Tensor gradient_of(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices,
                   const Tensor& sum_g, const Tensor& sum_g_xhat) {
  const Tensor& x = problem.x;
  Tensor grad_x = empty_map(x);
  AUGLOCAL_DISPATCH(
      x, AUGLOCAL_AT_LEVEL(input_grad<scalar_t>(problem, grad, indices, sum_g, sum_g_xhat, grad_x)));
  return grad_x;
}

TwoTensors batch_norm_act_max_pool_apply(Tensor x, Tensor mean, Tensor rstd, OptionalTensor weight,
                                         OptionalTensor bias, double slope, int64_t kernel_h,
                                         int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                         int64_t padding_h, int64_t padding_w) {
  return pooled(make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w, stride_h,
                                      stride_w, padding_h, padding_w));
}

TwoTensors batch_norm_act_max_pool_reduce(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          OptionalTensor weight, OptionalTensor bias, double slope,
                                          int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                          int64_t stride_w, int64_t padding_h, int64_t padding_w) {
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  check_pooled(problem, grad, indices);
  return sums_of(problem, grad, indices);
}

Tensor batch_norm_act_max_pool_input_grad(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          OptionalTensor weight, OptionalTensor bias, double slope,
                                          OptionalTensor sum_g, OptionalTensor sum_g_xhat, int64_t kernel_h,
                                          int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                          int64_t padding_h, int64_t padding_w) {
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  check_pooled(problem, grad, indices);
  return gradient_of(problem, grad, indices, vector(sum_g, x, "sum_g"), vector(sum_g_xhat, x, "sum_g_xhat"));
}

FourTensors batch_norm_act_max_pool_forward_(Tensor x, OptionalTensor running_mean,
                                             OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                             OptionalTensor weight, OptionalTensor bias, double momentum,
                                             double eps, double slope, int64_t kernel_h, int64_t kernel_w,
                                             int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                             int64_t padding_w) {
  auto [mean, rstd] = batch_norm_factors_(x, running_mean, running_var, num_batches_tracked, momentum, eps);
  auto [y, indices] = pooled(make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                   stride_h, stride_w, padding_h, padding_w));
  return {y, indices, mean, rstd};
}

ThreeTensors batch_norm_act_max_pool_backward(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                              OptionalTensor weight, OptionalTensor bias, double slope,
                                              int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                              int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                              bool training, bool need_x, bool need_vectors) {
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  check_pooled(problem, grad, indices);
  const bool through_statistics = training && need_x;
  auto [sum_g, sum_g_xhat] = through_statistics || need_vectors
                                 ? sums_of(problem, grad, indices)
                                 : TwoTensors(per_channel(x, false), per_channel(x, false));
  if (!need_x) return {needed_map(x, false), sum_g, sum_g_xhat};
  Tensor grad_x = through_statistics ? gradient_of(problem, grad, indices, sum_g, sum_g_xhat)
                                     : gradient_of(problem, grad, indices, Tensor(), Tensor());
  return {grad_x, sum_g, sum_g_xhat};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("batch_norm_act_max_pool_apply.cpu", TORCH_BOX(&batch_norm_act_max_pool_apply));
  m.impl("batch_norm_act_max_pool_reduce.cpu", TORCH_BOX(&batch_norm_act_max_pool_reduce));
  m.impl("batch_norm_act_max_pool_input_grad.cpu", TORCH_BOX(&batch_norm_act_max_pool_input_grad));
  m.impl("batch_norm_act_max_pool_forward_.cpu", TORCH_BOX(&batch_norm_act_max_pool_forward_));
  m.impl("batch_norm_act_max_pool_backward.cpu", TORCH_BOX(&batch_norm_act_max_pool_backward));
}

}  // namespace auglocal

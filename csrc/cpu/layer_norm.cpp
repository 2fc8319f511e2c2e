// layer_norm on the CPU: each row by itself, and sums over parts of the rows for the gradients of weight and
// bias.
#include "../layer_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <vector>

#include "../layer_norm_host.h"
#include "convert.h"
#include "level.h"
#include "loops.h"
#include "sums.h"

namespace auglocal {
namespace {

// Calls f with an element of the dtype.
template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  THO_DISPATCH_V2(dtype, "layer_norm", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Double, ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.template const_data_ptr<std::remove_const_t<T>>() : nullptr;
}

// Weight and bias as numbers, 1 and 0 where they are not there, with zeros up to whole lanes.
template <typename Real>
struct NormParameters {
  std::vector<Real> weight, bias;

  explicit NormParameters(const NormInputs& in)
      : weight(numbers(in.weight, in.width, 1)), bias(numbers(in.bias, in.width, 0)) {}

 private:
  static std::vector<Real> numbers(const Tensor& given, int64_t width, Real otherwise) {
    std::vector<Real> made(whole_lanes(width));
    if (!given.defined()) {
      std::fill_n(made.begin(), width, otherwise);
    } else {
      dispatch(given.scalar_type(), [&](auto element) {
        const auto* from = given.const_data_ptr<decltype(element)>();
        for (int64_t i = 0; i < width; ++i) made[i] = static_cast<Real>(widened(from[i]));
      });
    }
    return made;
  }
};

// The statistics of a forward pass.
template <typename Real>
class NormStatistics {
 public:
  explicit NormStatistics(const NormInputs& in)
      : mean_(data_of<const Real>(in.mean)), rstd_(in.rstd.const_data_ptr<Real>()) {}

  RowNorm<Real> operator[](int64_t row) const { return {mean_ ? mean_[row] : Real(0), rstd_[row]}; }

 private:
  const Real *mean_, *rstd_;
};

// The rows in parts, whose sums are merged in their order. The same parts whatever the number of threads.
struct NormParts {
  static constexpr int64_t kLeast = 128;  // rows of a part
  static constexpr int64_t kMost = 64;    // parts

  int64_t rows, number;

  explicit NormParts(const NormInputs& in)
      : rows(std::max(kLeast, (in.rows + kMost - 1) / kMost)), number((in.rows + rows - 1) / rows) {}
};

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "layer_norm_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

NormOutputs forward(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight,
                    std::optional<Tensor> bias, double eps, bool rms) {
  const NormInputs in = norm_inputs(x, weight, bias);
  const Tensor added = in.beside(residual, "residual");
  NormOutputs out{in.map(), added.defined() ? in.map() : memory::new_empty(x, {0}),
                  in.empty({rms ? 0 : in.rows}), in.empty({in.rows})};
  dispatch(x.scalar_type(), [&](auto element) {
    AUGLOCAL_AT_LEVEL(forward_rows<decltype(element)>(in, added, eps, rms, out));
  });
  return out;
}

Tensor apply(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight, std::optional<Tensor> bias,
             bool rms) {
  const NormInputs in = norm_inputs(x, mean, rstd, weight, bias, rms);
  Tensor y = in.map();
  dispatch(x.scalar_type(), [&](auto element) { AUGLOCAL_AT_LEVEL(apply_rows<decltype(element)>(in, y)); });
  return y;
}

template <typename T>
void run_backward(const NormInputs& in, const Tensor& grad, const Tensor& grad_total, bool rms,
                  NormGradients& out) {
  using Real = Accumulate<T>;
  auto& [grad_x, grad_weight, grad_bias] = out;
  Real* weight = grad_weight.numel() ? grad_weight.template mutable_data_ptr<Real>() : nullptr;
  Real* bias = grad_bias.numel() ? grad_bias.template mutable_data_ptr<Real>() : nullptr;
  const bool need_x = grad_x.numel() > 0, need_sums = weight || bias;
  const int64_t number = NormParts(in).number;
  std::vector<double> sums(need_sums ? number * 2 * in.width : 0);
  if (need_x || need_sums)
    with(need_x, [&](auto made) {
      with(need_sums, [&](auto summed) {
        AUGLOCAL_AT_LEVEL(backward_parts<T, decltype(made)::value, decltype(summed)::value>(
            in, grad, grad_total, rms, grad_x, sums.data()));
      });
    });
  if (need_sums) AUGLOCAL_AT_LEVEL(merge_parts(sums.data(), number, in.width, weight, bias));
}

NormGradients backward(Tensor grad, std::optional<Tensor> grad_total, Tensor x, Tensor mean, Tensor rstd,
                       std::optional<Tensor> weight, bool rms, bool need_x, bool need_weight,
                       bool need_bias) {
  const NormInputs in = norm_inputs(x, mean, rstd, weight, std::nullopt, rms);
  const Tensor upstream = in.beside(grad, "grad"), added = in.beside(grad_total, "grad_total");
  NormGradients out{need_x ? in.map() : memory::new_empty(x, {0}), in.empty({need_weight ? in.width : 0}),
                    in.empty({need_bias ? in.width : 0})};
  dispatch(x.scalar_type(),
           [&](auto element) { run_backward<decltype(element)>(in, upstream, added, rms, out); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("layer_norm_forward.cpu", TORCH_BOX(&forward));
  m.impl("layer_norm_apply.cpu", TORCH_BOX(&apply));
  m.impl("layer_norm_backward.cpu", TORCH_BOX(&backward));
}

}  // namespace auglocal

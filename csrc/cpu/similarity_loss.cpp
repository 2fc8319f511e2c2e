// similarity_loss on the CPU: statistics, rows, pairs and small matrix products here, large ones by the
// library's matmul.
#include "../similarity_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../similarity_loss_host.h"
#include "convert.h"
#include "loops.h"
#include "product.h"
#include "stripes.h"
#include "sums.h"

namespace auglocal {
namespace {

constexpr int64_t kPairs = 131072;  // whose similarities are made at a time, small enough for a cache

template <typename Real>
struct SimilarityLabels {
  std::vector<int32_t> value;  // -1 where an image does not count
  std::vector<Real> weight;    // 1 or 0
  Real count = 0;

  explicit SimilarityLabels(const SimilarityProblem& problem) {
    const int64_t* target = problem.target.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < problem.z.images; ++n) {
      const bool counted = counts(target[n], problem.classes, problem.ignore_index);
      value.push_back(counted ? static_cast<int32_t>(target[n]) : -1);
      weight.push_back(counted ? Real(1) : Real(0));
      count += weight.back();
    }
  }
};

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "similarity_loss_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

template <typename T>
Outputs run(const SimilarityProblem& problem) {
  using Real = Accumulate<T>;
  const int64_t images = problem.z.images, channels = problem.z.channels;
  Tensor mean = problem.per_channel(problem.is_map);
  Tensor features = problem.is_map ? problem.per_channel() : problem.vectors();
  if (problem.is_map)
    AUGLOCAL_AT_LEVEL(
        statistics<T>(problem.z, mean.mutable_data_ptr<Real>(), features.mutable_data_ptr<Real>()));

  const SimilarityLabels<Real> labels(problem);
  Tensor unit = problem.per_channel(), factor = problem.per_channel(problem.need_grad);
  std::vector<Real> lengths(images, 0);
  std::vector<double> losses(images, 0);
  const Real* feature_rows = features.const_data_ptr<Real>();
  Real* unit_rows = unit.mutable_data_ptr<Real>();
  AUGLOCAL_AT_LEVEL(normalise(labels, channels, feature_rows, unit_rows, lengths.data()));

  const Wanted<Real> target = wanted<Real>(problem.classes);
  const auto pairs = [&](int64_t first, int64_t rows, const Tensor& similar) {
    Real* data = similar.mutable_data_ptr<Real>();
    torch::stable::parallel_for(0, rows, grain(images), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t label = labels.value[first + i];
        if (label < 0) std::fill(data + i * images, data + (i + 1) * images, Real(0));
        else AUGLOCAL_AT_LEVEL(losses[first + i] = pair_row(labels, label, target, data + i * images));
      }
    });
  };
  const Real scale = 4 / (labels.count * labels.count);
  const auto rows_gradient = [&](int64_t first, int64_t rows, const Tensor& products) {
    const Real* data = products.const_data_ptr<Real>();
    Real* out = factor.mutable_data_ptr<Real>();
    torch::stable::parallel_for(0, rows, grain(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i, at = n * channels;
        if (labels.value[n] < 0) std::fill(out + at, out + at + channels, Real(0));
        else
          AUGLOCAL_AT_LEVEL(feature_row(channels, problem.z.positions, scale,
                                        problem.is_map ? feature_rows + at : nullptr, unit_rows + at,
                                        lengths[n], data + i * channels, out + at));
      }
    });
  };
  const int64_t all = images * images;
  if (all <= kPairs && all * channels <= kOwnProduct) {
    const MatrixView<const Real> rows(unit_rows, images, channels);
    Tensor similar = problem.empty({images, images});
    Real* matrix = similar.mutable_data_ptr<Real>();
    AUGLOCAL_AT_LEVEL(multiply(rows, rows.transposed(), MatrixView<Real>(matrix, images, images)));
    pairs(0, images, similar);
    if (problem.need_grad) {
      Tensor products = problem.per_channel();
      Real* data = products.mutable_data_ptr<Real>();
      AUGLOCAL_AT_LEVEL(multiply(MatrixView<const Real>(matrix, images, images), rows,
                                 MatrixView<Real>(data, images, channels)));
      rows_gradient(0, images, products);
    }
  } else {
    for_each_block(problem, unit, kPairs, pairs, rows_gradient);
  }

  double total = 0;
  for (const double row : losses) total += row;
  const double count = static_cast<double>(labels.count);
  Tensor loss = problem.empty({});
  *loss.mutable_data_ptr<Real>() = static_cast<Real>(total / count / count);
  return {loss, problem.need_grad ? mean : problem.empty({0}), factor};
}

// Calls f with an element of z's dtype.
template <typename F>
void dispatch(const Tensor& z, const F& f) {
  THO_DISPATCH_V2(z.scalar_type(), "similarity_loss", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Double,
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

Outputs forward(Tensor z, Tensor target, int64_t classes, int64_t ignore_index, bool need_grad) {
  const SimilarityProblem problem = make_problem(z, target, classes, ignore_index, need_grad);
  Outputs outputs;
  dispatch(z, [&](auto element) { outputs = run<decltype(element)>(problem); });
  return outputs;
}

Tensor similarity_loss_input_grad(Tensor z, Tensor mean, Tensor factor, Tensor grad_loss) {
  const InputGradProblem problem = make_input_grad_problem(z, mean, factor, grad_loss);
  Tensor grad_z = empty_map(z);
  dispatch(z, [&](auto element) {
    AUGLOCAL_AT_LEVEL(input_grad<decltype(element)>(problem, feature_map(grad_z)));
  });
  return grad_z;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("similarity_loss.cpu", TORCH_BOX(&forward));
  m.impl("similarity_loss_input_grad.cpu", TORCH_BOX(&similarity_loss_input_grad));
}

}  // namespace auglocal

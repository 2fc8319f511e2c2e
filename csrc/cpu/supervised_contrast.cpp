// supervised_contrast on the CPU: normalisation, the rows of pairs and the gradient here, the matrix products
// by the library's matmul.
#include "../supervised_contrast.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../supervised_contrast_host.h"
#include "loops.h"

namespace auglocal {
namespace {

constexpr int kLanes = 16;  // independent partial sums, which shorten the chain of roundings

template <typename Real>
Real dot(const Real* a, const Real* b, int64_t count) {
  Real lanes[kLanes] = {}, sum = 0;
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[d + lane] * b[d + lane];
  for (; d < count; ++d) sum += a[d] * b[d];
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T, typename Real>
void normalise(const ContrastProblem& problem, Real* z, Real* norms) {
  const T* features = problem.features.const_data_ptr<T>();
  const int64_t width = problem.width;
  const int64_t stride_n = problem.features.stride(0), stride_d = problem.features.stride(1);
  torch::stable::parallel_for(0, problem.images, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Real* row = z + n * width;
      for (int64_t d = 0; d < width; ++d) row[d] = static_cast<Real>(features[n * stride_n + d * stride_d]);
      norms[n] = std::sqrt(dot(row, row, width));
      const Real divisor = divisor_of(norms[n]);
      for (int64_t d = 0; d < width; ++d) row[d] /= divisor;
    }
  });
}

// One row of pairs, that of `image`.
template <typename Real>
struct Row {
  Real* pairs;  // (N,) products on entry, G at the end where it is wanted
  const int64_t* target;
  int64_t images, image, ignore_index;
  Real temperature;
  bool need_grad;

  // The row's loss; the number of positives is 0 where it is no anchor and has none.
  Real run(int64_t* count) const {
    const int64_t label = target[image];
    *count = 0;
    if (stands(label, ignore_index)) {
      for (int64_t a = 0; a < images; ++a) *count += target[a] == label;
      --*count;  // itself
    }
    if (*count == 0) {
      if (need_grad) std::fill(pairs, pairs + images, Real(0));
      return 0;
    }
    // exp makes an exact 0 of it: the image itself, and those that are left out, are in no sum below.
    constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
    pairs[image] = kNothing;
    Real largest = kNothing;
    for (int64_t a = 0; a < images; ++a) {
      if (!stands(target[a], ignore_index)) pairs[a] = kNothing;
      largest = pairs[a] > largest ? pairs[a] : largest;
    }
    ContrastSums<Real> sums;
    sums.count = *count;
    Real exponentials[kLanes] = {}, positives[kLanes] = {};
    for (int64_t a = 0; a < images; ++a) {
      const Real shifted = shifted_logit(pairs[a], largest, temperature);
      pairs[a] = std::exp(shifted);
      exponentials[a % kLanes] += pairs[a];
      if (target[a] == label && a != image) positives[a % kLanes] += shifted;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.exponentials += exponentials[lane];
      sums.positives += positives[lane];
    }
    for (int64_t a = 0; need_grad && a < images; ++a)
      pairs[a] = contrast_gradient(pairs[a], target[a] == label && a != image, sums);
    return contrast_loss(sums);
  }
};

template <typename Real>
void add_products(const PairRows& pairs, int64_t images, int64_t width, const Real* down, const Real* across,
                  Real* dz) {
  torch::stable::parallel_for(0, images, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n - pairs.first;
      const bool own = row >= 0 && row < pairs.count;
      for (int64_t d = 0; d < width; ++d) {
        const Real sum = down[n * width + d] + (own ? across[row * width + d] : Real(0));
        dz[n * width + d] = pairs.first == 0 ? sum : dz[n * width + d] + sum;
      }
    }
  });
}

template <typename T>
ContrastOutputs run(const ContrastProblem& problem) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t images = problem.images, width = problem.width;
  const Real temperature = static_cast<Real>(problem.temperature);
  Tensor z = problem.empty({images, width}), norms = problem.empty({images});
  normalise<T>(problem, z.mutable_data_ptr<Real>(), norms.mutable_data_ptr<Real>());

  Tensor losses = problem.empty({images}), counts = torch::stable::new_empty(problem.target, {images});
  Tensor dz = problem.need_grad ? problem.empty({images, width}) : problem.empty({0});
  const int64_t* target = problem.target.const_data_ptr<int64_t>();
  Real* row_losses = losses.mutable_data_ptr<Real>();
  int64_t* row_counts = counts.mutable_data_ptr<int64_t>();
  walk_pairs(
      problem, z,
      [&](const PairRows& pairs) {
        Real* matrix = pairs.matrix.mutable_data_ptr<Real>();
        torch::stable::parallel_for(0, pairs.count, grain(images), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t n = pairs.first + i;
            const Row<Real> row{matrix + i * images,  target,      images,           n,
                                problem.ignore_index, temperature, problem.need_grad};
            row_losses[n] = row.run(row_counts + n);
          }
        });
      },
      [&](const Tensor& down, const Tensor& across, const PairRows& pairs) {
        add_products(pairs, images, width, down.const_data_ptr<Real>(), across.const_data_ptr<Real>(),
                     dz.mutable_data_ptr<Real>());
      });

  double total = 0;
  int64_t anchors = 0;
  for (int64_t n = 0; n < images; ++n) {
    total += row_losses[n];
    anchors += row_counts[n] > 0;
  }
  Tensor loss = problem.empty({});
  *loss.mutable_data_ptr<Real>() = static_cast<Real>(total / at_least_one(anchors));
  if (!problem.need_grad) return {loss, dz};

  const Real scale = 1 / (temperature * static_cast<Real>(at_least_one(anchors)));
  const Real *unit = z.const_data_ptr<Real>(), *norm = norms.const_data_ptr<Real>();
  Real* grad = dz.mutable_data_ptr<Real>();
  torch::stable::parallel_for(0, images, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Real* row = unit + n * width;
      Real* out = grad + n * width;
      const Real inner = dot(out, row, width);
      for (int64_t d = 0; d < width; ++d) out[d] = feature_gradient(out[d], row[d], inner, norm[n], scale);
    }
  });
  return {loss, dz};
}

ContrastOutputs forward(Tensor features, Tensor target, double temperature, int64_t ignore_index,
                        bool need_grad) {
  const ContrastProblem problem = make_contrast(features, target, temperature, ignore_index, need_grad);
  ContrastOutputs outputs;
  THO_DISPATCH_V2(features.scalar_type(), "supervised_contrast",
                  AT_WRAP([&] { outputs = run<scalar_t>(problem); }), ScalarType::Double, ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("supervised_contrast.cpu", TORCH_BOX(&forward));
}

}  // namespace auglocal

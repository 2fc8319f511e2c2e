// pooled_cross_entropy on the CPU: pooling and the rows of logits here, the matrix products by the library's
// matmul.
#include "../pooled_cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../pooled_cross_entropy_host.h"
#include "loops.h"

namespace auglocal {
namespace {

// Sum of `count` elements; the independent partial sums are what lets the compiler vectorise it.
template <typename Real, typename T>
Real sum_strided(const T* x, int64_t count, int64_t stride) {
  constexpr int kLanes = 16;
  Real lanes[kLanes] = {}, sum = 0;
  int64_t p = 0;
  if (stride == 1) {
    for (; p + kLanes <= count; p += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<Real>(x[p + lane]);
  }
  for (; p < count; ++p) sum += static_cast<Real>(x[p * stride]);
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T, typename Real>
void pool(const FeatureMap& map, Real* sums) {  // sums (N, C)
  const T* x = map.tensor.const_data_ptr<T>();
  const int64_t channels = map.channels, positions = map.positions;
  if (map.stride_c == 1 && positions > 1) {  // channels-last: whole rows of channels are added
    torch::stable::parallel_for(0, map.images, grain(channels * positions), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Real* row = sums + n * channels;
        std::fill(row, row + channels, Real(0));
        for (int64_t p = 0; p < positions; ++p) {
          const T* values = x + n * map.stride_n + p * map.stride_p;
          for (int64_t c = 0; c < channels; ++c) row[c] += static_cast<Real>(values[c]);
        }
      }
    });
    return;
  }
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      sums[i] = sum_strided<Real>(x + n * map.stride_n + c * map.stride_c, positions, map.stride_p);
    }
  });
}

// One row: turns the products into logits, and writes its gradient (1 / (V P) inside `scale`) where d is
// given.
template <typename Real>
struct Row {
  Real* logits;  // (K,), products on entry
  const Real* bias;
  int64_t classes, positions;
  Real smoothing;

  // Returns the loss of the row; `hit` tells whether the label has the largest logit.
  Real run(int64_t label, bool counted, Real scale, Real* d, bool* hit) const {
    Best<Real> best{-std::numeric_limits<Real>::infinity(), 0};
    for (int64_t k = 0; k < classes; ++k) {
      logits[k] = logit(logits[k], positions, bias ? bias[k] : Real(0));
      best = better(best, Best<Real>{logits[k], k});
    }
    *hit = counted && best.index == label;
    if (!counted) {
      if (d) std::fill(d, d + classes, Real(0));
      return 0;
    }
    RowSums<Real> sums;
    for (int64_t k = 0; k < classes; ++k) add(sums, logits[k] - best.value);
    for (int64_t k = 0; d && k < classes; ++k)
      d[k] = row_gradient(sums, logits[k] - best.value, k == label, classes, smoothing, scale);
    return row_loss(sums, logits[label] - best.value, classes, smoothing);
  }
};

template <typename T>
Outputs run(const PooledProblem& problem) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t images = problem.map.images, channels = problem.map.channels,
                positions = problem.map.positions;
  const int64_t classes = problem.classes;
  Tensor sums = problem.empty({images, channels});
  pool<T>(problem.map, sums.mutable_data_ptr<Real>());
  Tensor logits = torch::stable::matmul(sums, torch::stable::transpose(problem.weight, 0, 1));

  const int64_t* target = problem.target.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t n = 0; n < images; ++n) counted += counts(target[n], classes, problem.ignore_index);
  const Real divisor = problem.mean ? static_cast<Real>(counted) : Real(1);

  Tensor d = problem.empty({problem.need_any() ? images : 0, classes});
  Tensor losses = problem.empty({images});
  Tensor hits = torch::stable::new_empty(problem.target, {images});
  Real* logit_rows = logits.mutable_data_ptr<Real>();
  Real* d_rows = problem.need_any() ? d.mutable_data_ptr<Real>() : nullptr;
  Real* row_losses = losses.mutable_data_ptr<Real>();
  int64_t* row_hits = hits.mutable_data_ptr<int64_t>();
  const Real* bias = problem.bias.defined() ? problem.bias.const_data_ptr<Real>() : nullptr;
  torch::stable::parallel_for(0, images, grain(classes), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Row<Real> row{logit_rows + n * classes, bias, classes, positions,
                          static_cast<Real>(problem.smoothing)};
      bool hit = false;
      row_losses[n] = row.run(target[n], counts(target[n], classes, problem.ignore_index),
                              1 / (divisor * static_cast<Real>(positions)),
                              d_rows ? d_rows + n * classes : nullptr, &hit);
      row_hits[n] = hit;
    }
  });

  Tensor loss = problem.empty({}), correct = torch::stable::new_empty(problem.target, {});
  double total = 0;
  int64_t hit_count = 0;
  for (int64_t n = 0; n < images; ++n) {
    total += row_losses[n];
    hit_count += row_hits[n];
  }
  *loss.mutable_data_ptr<Real>() = static_cast<Real>(total / divisor);
  *correct.mutable_data_ptr<int64_t>() = hit_count;

  Tensor grad_bias = problem.empty({problem.need_bias ? classes : 0});
  if (problem.need_bias) {
    Real* out = grad_bias.mutable_data_ptr<Real>();
    std::fill(out, out + classes, Real(0));
    for (int64_t n = 0; n < images; ++n)
      for (int64_t k = 0; k < classes; ++k) out[k] += d_rows[n * classes + k];
    for (int64_t k = 0; k < classes; ++k) out[k] *= static_cast<Real>(positions);
  }
  auto [grad_pooled, grad_weight] = products(problem, d, sums);
  return {loss, logits, correct, grad_pooled, grad_weight, grad_bias};
}

Outputs forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target, int64_t ignore_index,
                double smoothing, bool mean, bool need_x, bool need_weight, bool need_bias) {
  const PooledProblem problem =
      make_problem(x, weight, bias, target, ignore_index, smoothing, mean, need_x, need_weight, need_bias);
  Outputs outputs;
  THO_DISPATCH_V2(x.scalar_type(), "pooled_cross_entropy", AT_WRAP([&] { outputs = run<scalar_t>(problem); }),
                  ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("pooled_cross_entropy.cpu", TORCH_BOX(&forward));
}

}  // namespace auglocal

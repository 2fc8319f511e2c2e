// supervised_contrast on the CPU: normalisation, the rows of pairs and the gradient here, the matrix products
// by the library's matmul.
#include "../supervised_contrast.h"

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

#include "../exponential.h"
#include "../supervised_contrast_host.h"
#include "convert.h"
#include "loops.h"
#include "sums.h"

namespace auglocal {
namespace {

// Labels as numbers from 0 on, and how many images there are of each.
struct ContrastLabels {
  std::vector<int32_t> ids;  // -1 where an image does not stand
  std::vector<int64_t> counts;

  explicit ContrastLabels(const ContrastProblem& problem) : ids(problem.images, -1) {
    const int64_t* target = problem.target.const_data_ptr<int64_t>();
    std::vector<int64_t> order;
    for (int64_t n = 0; n < problem.images; ++n)
      if (stands(target[n], problem.ignore_index)) order.push_back(n);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return target[a] < target[b]; });
    for (size_t i = 0; i < order.size(); ++i) {
      if (i == 0 || target[order[i]] != target[order[i - 1]]) counts.push_back(0);
      ids[order[i]] = static_cast<int32_t>(counts.size()) - 1;
      ++counts.back();
    }
  }

  // Others with the label of an image that stands.
  int64_t positives(int64_t image) const { return ids[image] < 0 ? 0 : counts[ids[image]] - 1; }
};

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "supervised_contrast_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

template <typename T>
ContrastOutputs run(const ContrastProblem& problem) {
  using Real = Accumulate<T>;
  const int64_t images = problem.images, width = problem.width;
  const Real temperature = static_cast<Real>(problem.temperature);
  Tensor z = problem.empty({images, width}), norms = problem.empty({images});
  AUGLOCAL_AT_LEVEL(normalise<T>(problem, z.mutable_data_ptr<Real>(), norms.mutable_data_ptr<Real>()));

  const ContrastLabels labels(problem);
  std::vector<Real> losses(images);
  Tensor dz = problem.need_grad ? problem.empty({images, width}) : problem.empty({0});
  walk_pairs(
      problem, z,
      [&](const PairRows& pairs) {
        Real* matrix = pairs.matrix.mutable_data_ptr<Real>();
        torch::stable::parallel_for(0, pairs.count, grain(images), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t n = pairs.first + i;
            AUGLOCAL_AT_LEVEL(
                losses[n] = contrast_row(labels, n, temperature, problem.need_grad, matrix + i * images));
          }
        });
      },
      [&](const Tensor& down, const Tensor& across, const PairRows& pairs) {
        AUGLOCAL_AT_LEVEL(add_products(pairs, images, width, down.const_data_ptr<Real>(),
                                       across.const_data_ptr<Real>(), dz.mutable_data_ptr<Real>()));
      });

  double total = 0;
  int64_t anchors = 0;
  for (int64_t n = 0; n < images; ++n) {
    total += losses[n];
    anchors += labels.positives(n) > 0;
  }
  Tensor loss = problem.empty({});
  *loss.mutable_data_ptr<Real>() = static_cast<Real>(total / at_least_one(anchors));
  if (!problem.need_grad) return {loss, dz};

  const Real scale = 1 / (temperature * static_cast<Real>(at_least_one(anchors)));
  AUGLOCAL_AT_LEVEL(through_norms(images, width, z.const_data_ptr<Real>(), norms.const_data_ptr<Real>(),
                                  scale, dz.mutable_data_ptr<Real>()));
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

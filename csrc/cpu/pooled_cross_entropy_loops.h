// The loops of pooled_cross_entropy: sums over positions, and rows of logits. For `each_level.h`.
#include "plane_loops.h"
#include "product_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

template <typename T, typename Real>
void widen(const T* from, int64_t count, Real* to) {
  torch::stable::parallel_for(
      0, count, kGrain, [&](int64_t begin, int64_t end) { load(from + begin, 1, end - begin, to + begin); });
}

template <typename T, typename Real>
void pool_columns(const FeatureMap& map, const Stripes& stripes, Real* sums) {
  const T* x = map.tensor.const_data_ptr<T>();
  const int64_t channels = map.channels, positions = map.positions, repeats = stripes.repeats;
  torch::stable::parallel_for(
      0, map.images * stripes.number, grain(stripes.width * positions), [&](int64_t begin, int64_t end) {
        const int64_t size = stripes.size();
        std::vector<Real> buffer(kTogether * size), added(size);
        Real* __restrict__ all = added.data();
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / stripes.number, channel = task % stripes.number * stripes.width;
          const int64_t width = std::min(stripes.width, channels - channel);
          const T* first = x + n * map.stride_n + channel;
          std::fill(added.begin(), added.end(), Real(0));
          for_each_rows<Real>(first, map.stride_p, positions, width, repeats, size, buffer.data(),
                              [&](int64_t count, const auto& value) {
                                AUGLOCAL_INDEPENDENT
                                for (int64_t i = 0; i < count; ++i)
                                  all[i] += value(i, [](Real v) { return v; });
                              });
          for (int64_t i = width; i < repeats * width; ++i) all[i % width] += all[i];
          std::copy_n(all, width, sums + n * channels + channel);
        }
      });
}

template <typename T, typename Real>
void pool(const FeatureMap& map, Real* sums) {  // sums (N, C)
  const int64_t channels = map.channels, positions = map.positions;
  if (map.stride_c == 1 && positions > 1 && map.stride_p != 1)
    return pool_columns<T>(map, Stripes(map, map, Stripes::kOnce), sums);
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    for_each_planes<Real, T>(map, begin, end, [&](int64_t i, int64_t count, const Real* plane) {
      for (int64_t k = 0; k < count; ++k, plane += positions)
        sums[i + k] = static_cast<Real>(sum_of<Real>(positions, [&](int64_t p) { return plane[p]; }));
    });
  });
}

// One row: turns the products in `logits` into logits, and writes its gradient, with the factor `scale`, to d
// unless that is null. Returns the loss of the row; `hit` tells whether the label has the largest logit.
template <typename Real>
Real class_row(const PooledProblem& problem, int64_t label, const Real* bias, Real scale,
               Real* __restrict__ logits, Real* __restrict__ d, bool* hit) {
  const int64_t classes = problem.classes;
  const Real smoothing = static_cast<Real>(problem.smoothing);
  for (int64_t k = 0; k < classes; ++k)
    logits[k] = logit(logits[k], problem.map.positions, bias ? bias[k] : Real(0));
  const Real largest = largest_of<Real>(classes, [&](int64_t k) { return logits[k]; });
  if (!counts(label, classes, problem.ignore_index)) {
    *hit = false;
    if (d) std::fill(d, d + classes, Real(0));
    return 0;
  }
  // As if the first of equal ones, and where there is no number the first, were the largest.
  *hit = largest == -std::numeric_limits<Real>::infinity()
             ? label == 0
             : logits[label] == largest && std::find(logits, logits + label, largest) == logits + label;
  const SumPair all = pair_sums<Real>(classes, [&](int64_t k) {
    const Real shifted = logits[k] - largest;
    return std::pair<Real, Real>(exp_minus(-shifted), shifted);
  });
  const RowSums<Real> sums{static_cast<Real>(all.first), static_cast<Real>(all.second)};
  const Real own = logits[label] - largest;
  if (d) {
    for (int64_t k = 0; k < classes; ++k)
      d[k] = row_gradient(sums, logits[k] - largest, false, classes, smoothing, scale);
    d[label] = row_gradient(sums, own, true, classes, smoothing, scale);
  }
  return row_loss(sums, own, classes, smoothing);
}

// The gradient of the bias: the sum over rows of d, times the positions that d is divided by.
template <typename Real>
void sum_rows(int64_t images, int64_t classes, int64_t positions, const Real* d, Real* __restrict__ sums) {
  std::fill(sums, sums + classes, Real(0));
  for (int64_t n = 0; n < images; ++n)
    for (int64_t k = 0; k < classes; ++k) sums[k] += d[n * classes + k];
  for (int64_t k = 0; k < classes; ++k) sums[k] *= static_cast<Real>(positions);
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

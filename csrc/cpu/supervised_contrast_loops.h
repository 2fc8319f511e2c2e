// The loops of supervised_contrast: rows of features, and rows of pairs. For `each_level.h`.
#include "loss_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Rows divided by their norms.
template <typename T, typename Real>
void normalise(const ContrastProblem& problem, Real* z, Real* norms) {
  const T* features = problem.features.const_data_ptr<T>();
  const int64_t width = problem.width;
  const int64_t stride_n = problem.features.stride(0), stride_d = problem.features.stride(1);
  torch::stable::parallel_for(0, problem.images, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Real* row = z + n * width;
      load(features + n * stride_n, stride_d, width, row);
      norms[n] = std::sqrt(inner_product(row, row, width));
      const Real divisor = divisor_of(norms[n]);
      for (int64_t d = 0; d < width; ++d) row[d] /= divisor;
    }
  });
}

// One row of pairs, that of `image`: products on entry, G at the end where it is wanted. Returns its loss, 0
// where it is no anchor.
template <typename Real>
Real contrast_row(const ContrastLabels& labels, int64_t image, Real temperature, bool need_grad,
                  Real* __restrict__ pairs) {
  const int64_t images = static_cast<int64_t>(labels.ids.size()), positives = labels.positives(image);
  if (positives == 0) {
    if (need_grad) std::fill(pairs, pairs + images, Real(0));
    return 0;
  }
  const int32_t own = labels.ids[image];
  // The images before this one, and those after it.
  const int64_t starts[] = {0, image + 1}, counts[] = {image, images - image - 1};
  const auto largest_in = [&](int part) {
    const int32_t* __restrict__ ids = labels.ids.data() + starts[part];
    const Real* __restrict__ row = pairs + starts[part];
    constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
    return largest_of<Real>(counts[part], [&](int64_t a) { return chosen(ids[a] >= 0, row[a], kNothing); });
  };
  const Real before = largest_in(0), after = largest_in(1), largest = after > before ? after : before;

  SumPair all;
  for (int part : {0, 1}) {
    const int32_t* __restrict__ ids = labels.ids.data() + starts[part];
    Real* __restrict__ row = pairs + starts[part];
    const SumPair sums = pair_sums<Real>(counts[part], [&](int64_t a) {
      const Real shifted = shifted_logit(row[a], largest, temperature);
      const Real exponential = chosen(ids[a] >= 0, exp_minus(-shifted), Real(0));
      row[a] = exponential;
      return std::pair<Real, Real>(exponential, chosen(ids[a] == own, shifted, Real(0)));
    });
    all.first += sums.first;
    all.second += sums.second;
  }
  ContrastSums<Real> sums;
  sums.exponentials = static_cast<Real>(all.first);
  sums.positives = static_cast<Real>(all.second);
  sums.count = positives;
  if (need_grad) {
    const int32_t* __restrict__ ids = labels.ids.data();
    for (int64_t a = 0; a < images; ++a) pairs[a] = contrast_gradient(pairs[a], ids[a] == own, sums);
    pairs[image] = 0;
  }
  return contrast_loss(sums);
}

// Adds what a block of rows of G makes of z: `down` (N, D) to all of dz, `across` to the rows of the block.
template <typename Real>
void add_products(const PairRows& pairs, int64_t images, int64_t width, const Real* down, const Real* across,
                  Real* dz) {
  torch::stable::parallel_for(0, images, grain(width), [&](int64_t begin, int64_t end) {
    const auto add = [&](int64_t first, int64_t last, const Real* __restrict__ more, Real* __restrict__ to) {
      if (pairs.first == 0)
        for (int64_t i = first; i < last; ++i) to[i] = more[i];
      else
        for (int64_t i = first; i < last; ++i) to[i] += more[i];
    };
    add(begin * width, end * width, down, dz);
    const int64_t first = std::max(begin, pairs.first), last = std::min(end, pairs.first + pairs.count);
    Real* __restrict__ own = dz + first * width;
    const Real* __restrict__ more = across + (first - pairs.first) * width;
    for (int64_t i = 0; i < (last - first) * width; ++i) own[i] += more[i];
  });
}

// The gradient of the features in place of that of z.
template <typename Real>
void through_norms(int64_t images, int64_t width, const Real* z, const Real* norms, Real scale, Real* dz) {
  torch::stable::parallel_for(0, images, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Real* __restrict__ row = z + n * width;
      Real* __restrict__ out = dz + n * width;
      const Real inner = inner_product<Real>(out, row, width);
      for (int64_t d = 0; d < width; ++d) out[d] = feature_gradient(out[d], row[d], inner, norms[n], scale);
    }
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

// The loops of supervised_contrast: rows of features, and rows of pairs. For `each_level.h`.
#include "conversion_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

template <typename Real>
Real inner_product(const Real* a, const Real* b, int64_t count) {
  return static_cast<Real>(
      row_sums<Real>(count, [&](int64_t d) { return std::pair<Real, Real>(a[d] * b[d], 0); }).first);
}

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

// The largest product of a row with images that stand.
template <typename Real>
Real largest_of(int64_t count, const int32_t* __restrict__ ids, const Real* __restrict__ pairs) {
  constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
  constexpr int kMaxima = 16;
  Real largest[kMaxima];
  std::fill(largest, largest + kMaxima, kNothing);
  for (int64_t a = 0; a < count; a += kMaxima) {
    const int64_t some = std::min<int64_t>(kMaxima, count - a);
    for (int64_t i = 0; i < some; ++i) {
      const Real product = chosen(ids[a + i] >= 0, pairs[a + i], kNothing);
      largest[i] = product > largest[i] ? product : largest[i];
    }
  }
  return *std::max_element(largest, largest + kMaxima);
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
  const auto others = [&](int part) { return labels.ids.data() + starts[part]; };
  const Real before = largest_of(counts[0], others(0), pairs);
  const Real after = largest_of(counts[1], others(1), pairs + starts[1]);
  const Real largest = after > before ? after : before;

  SumPair all;
  for (int part : {0, 1}) {
    const int32_t* __restrict__ ids = others(part);
    Real* __restrict__ row = pairs + starts[part];
    const SumPair sums = row_sums<Real>(counts[part], [&](int64_t a) {
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

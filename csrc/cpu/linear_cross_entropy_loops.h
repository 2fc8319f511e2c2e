// The loops of linear_cross_entropy: rows of logits. For `each_level.h`.
#include "loss_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// One row: its logits, to which the bias is added, become their gradient where that is wanted.
template <typename Real>
RowResult token_row(const TokenProblem& problem, int64_t label, const Real* __restrict__ bias,
                    Real* __restrict__ logits) {
  const int64_t classes = problem.classes;
  if (bias)
    for (int64_t v = 0; v < classes; ++v) logits[v] += bias[v];
  if (!counts(label, classes, problem.ignore_index)) {
    if (problem.gradient) std::fill(logits, logits + classes, Real(0));
    return {};
  }
  const Real largest = largest_of<Real>(classes, [&](int64_t v) { return logits[v]; });
  RowResult result;
  // As if the first of equal ones, and where there is no number the first, were the largest.
  result.hit = largest == -std::numeric_limits<Real>::infinity()
                   ? label == 0
                   : logits[label] == largest && std::find(logits, logits + label, largest) == logits + label;
  const Real own = logits[label] - largest;
  const SumPair all = pair_sums<Real>(classes, [&](int64_t v) {
    const Real shifted = logits[v] - largest, exponential = exp_minus(-shifted);
    logits[v] = exponential;
    return std::pair<Real, Real>(exponential, shifted);
  });
  const double log_sum = std::log(all.first), total = log_sum + largest;
  const double smoothing = problem.smoothing, mean = all.second / static_cast<double>(classes);
  result.nll = log_sum - own;
  result.loss = (1 - smoothing) * result.nll + problem.z_loss * total * total;
  // Without smoothing an infinite logit of another class must not turn the loss into a NaN.
  if (smoothing != 0) result.loss += smoothing * (log_sum - mean);
  if (!problem.gradient) return result;
  const double stretch = 1 + 2 * problem.z_loss * total;
  const Real factor = static_cast<Real>(problem.scale * stretch / all.first);
  const Real share = static_cast<Real>(problem.scale * smoothing / static_cast<double>(classes));
  // p - 1 is taken first, which is exact where p is near 1.
  const double probability = logits[label] / all.first;
  const double of_label = (probability - 1) + (stretch - 1) * probability + smoothing;
  AUGLOCAL_INDEPENDENT
  for (int64_t v = 0; v < classes; ++v) logits[v] = logits[v] * factor - share;
  logits[label] = static_cast<Real>(problem.scale * of_label) - share;
  return result;
}

// sums (V,) += the rows [0, rows), of the columns [begin, end)
template <typename Real>
void add_rows(const Real* rows, int64_t number, int64_t classes, int64_t begin, int64_t end,
              Real* __restrict__ sums) {
  for (int64_t r = 0; r < number; ++r) {
    const Real* __restrict__ row = rows + r * classes;
    for (int64_t v = begin; v < end; ++v) sums[v] += row[v];
  }
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

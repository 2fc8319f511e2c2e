// The loops of reconstruction_loss over blocks of elements. For `each_level.h`.
#include "conversion_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Calls f(place in the block, elements, n, outer, inner) for the pieces of rows that elements [begin, end)
// are.
template <typename F>
void for_each_run(const DenseOrder& order, int64_t begin, int64_t end, const F& f) {
  const int64_t row = begin / order.inner;
  int64_t inner = begin % order.inner, outer = row % order.outer, n = row / order.outer;
  for (int64_t i = begin; i < end;) {
    const int64_t count = std::min(order.inner - inner, end - i);
    f(i - begin, count, n, outer, inner);
    i += count;
    inner = 0;
    if (++outer == order.outer) {
      outer = 0;
      ++n;
    }
  }
}

// Elements [begin, begin + count) of a map in the order, widened.
template <typename T, typename Real>
void read(const T* map, const OrderedStrides& step, bool dense, const DenseOrder& order, int64_t begin,
          int64_t count, Real* out) {
  if (dense) return load(map + begin, 1, count, out);
  for_each_run(order, begin, begin + count,
               [&](int64_t at, int64_t length, int64_t n, int64_t outer, int64_t inner) {
                 const T* from = map + n * step.n + outer * step.outer + inner * step.inner;
                 load(from, step.inner, length, out + at);
               });
}

// The channels' factors. In channels-last maps they are repeated, so that a block finds those of its elements
// side by side from the channel of its first one on.
template <typename Real>
struct PixelFactors {
  const DenseOrder order;
  std::vector<Real> mean, std;

  explicit PixelFactors(const ReconstructionProblem& problem) : order(problem.order) {
    const int64_t channels = problem.mean.size(0), count = channels + (order.channels_last ? kBlock : 0);
    for (int64_t i = 0; i < count; ++i) {
      mean.push_back(problem.mean.const_data_ptr<Real>()[i % channels]);
      std.push_back(problem.std.const_data_ptr<Real>()[i % channels]);
    }
  }

  void restore(Real* values, int64_t begin, int64_t count) const {
    if (order.channels_last) {
      const Real *means = mean.data() + begin % order.inner, *stds = std.data() + begin % order.inner;
      for (int64_t i = 0; i < count; ++i) values[i] = restored(values[i], means[i], stds[i]);
      return;
    }
    for_each_run(order, begin, begin + count, [&](int64_t at, int64_t length, int64_t, int64_t c, int64_t) {
      const Real own_mean = mean[c], own_std = std[c];
      for (int64_t i = at; i < at + length; ++i) values[i] = restored(values[i], own_mean, own_std);
    });
  }
};

// The independent partial sums are what lets the compiler vectorise it.
template <typename Real>
Real sum(const Real* values, int64_t count) {
  constexpr int kLanes = 16;
  Real lanes[kLanes] = {}, all = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  for (; i < count; ++i) all += values[i];
  for (int lane = 0; lane < kLanes; ++lane) all += lanes[lane];
  return all;
}

template <typename U, typename T>
void run(const T* logits, ReconstructionProblem& problem) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const DenseOrder order = problem.order;
  const OrderedStrides logit_step = problem.strides(problem.logits),
                       image_step = problem.strides(problem.image);
  const bool dense_logits = problem.dense(problem.logits), dense_image = problem.dense(problem.image);
  const PixelFactors<Real> factors(problem);
  const U* image = problem.image.tensor.const_data_ptr<U>();
  T* grad = problem.grad.numel() ? problem.grad.mutable_data_ptr<T>() : nullptr;
  const int64_t elements = problem.count(), blocks = (elements + kBlock - 1) / kBlock;
  std::vector<Real> partial(blocks);

  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    Real logit[kBlock], pixel[kBlock];  // and then loss and gradient
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, count = std::min(kBlock, elements - begin);
      read(logits, logit_step, dense_logits, order, begin, count, logit);
      read(image, image_step, dense_image, order, begin, count, pixel);
      factors.restore(pixel, begin, count);
      for (int64_t i = 0; i < count; ++i) {
        const PixelLoss<Real> made = pixel_loss(logit[i], pixel[i]);
        logit[i] = made.loss;
        pixel[i] = made.gradient;
      }
      partial[block] = sum(logit, count);
      if (grad) store(pixel, count, grad + begin);
    }
  });

  double total = 0;
  for (const Real block : partial) total += block;
  *problem.loss.mutable_data_ptr<Real>() = static_cast<Real>(total / static_cast<double>(elements));
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

// The loops of similarity_loss: statistics of channels, rows of features, pairs of images, and the pass over
// the map that its backward is. For `each_level.h`.
#include "plane_loops.h"
#include "product_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// The statistics of a channel from sums over its positions: of differences from a mean that is rounded, and
// of their squares.
template <typename Real>
void finish(int64_t i, int64_t positions, Real mean, SumPair sums, Real* means, Real* deviations) {
  const Moments<double> all =
      moments<double>({sums.first, sums.second}, static_cast<double>(positions), mean, 0);
  means[i] = static_cast<Real>(all.mean);
  deviations[i] = static_cast<Real>(deviation(all));
}

template <typename Real>
void plane_statistics(int64_t i, int64_t positions, const Real* plane, Real* means, Real* deviations) {
  const Real origin = plane[0];
  const double offset = sum_of<Real>(positions, [&](int64_t p) { return plane[p] - origin; });
  const Real mean = origin + static_cast<Real>(offset / static_cast<double>(positions));
  const SumPair sums = pair_sums<Real>(positions, [&](int64_t p) {
    const Real d = plane[p] - mean;
    return std::pair<Real, Real>(d, d * d);
  });
  finish(i, positions, mean, sums, means, deviations);
}

// Sums over the positions of the channels of a task of `Stripes`: of differences from `origin`, and of their
// squares. Up to 256 rows are added up in Real, these in double.
template <typename Real>
class StripeSums {
 public:
  std::vector<Real> origin;
  std::vector<double> first, second;  // of `size` elements, of which the channels' are those in front

  explicit StripeSums(int64_t size)
      : origin(size),
        first(size),
        second(size),
        size_(size),
        differences_(size),
        squares_(size),
        buffer_(kTogether * size) {}

  template <bool kSquares, typename T>
  void add_up(const T* z, int64_t stride_p, int64_t positions, int64_t width, int64_t repeats) {
    const int64_t length = repeats * width;
    Real* __restrict__ differences = differences_.data(), * __restrict__ squares = squares_.data();
    double* __restrict__ firsts = first.data(), * __restrict__ seconds = second.data();
    const Real* __restrict__ start = origin.data();
    std::fill_n(firsts, length, 0.0);
    std::fill_n(seconds, length, 0.0);
    const int64_t run = 256 * repeats;
    for (int64_t p = 0; p < positions; p += run) {
      std::fill_n(differences, length, Real(0));
      std::fill_n(squares, length, Real(0));
      for_each_rows(z + p * stride_p, stride_p, std::min(run, positions - p), width, repeats, size_,
                    buffer_.data(), [&](int64_t count, const auto& sum) {
                      AUGLOCAL_INDEPENDENT
                      for (int64_t i = 0; i < count; ++i) {
                        const Real from = start[i];
                        differences[i] += sum(i, [=](Real v) { return v - from; });
                        if constexpr (kSquares)
                          squares[i] += sum(i, [=](Real v) { return (v - from) * (v - from); });
                      }
                    });
      for (int64_t i = 0; i < length; ++i) {
        firsts[i] += differences[i];
        seconds[i] += squares[i];
      }
    }
    for (int64_t i = width; i < length; i += width)
      for (int64_t c = 0; c < width; ++c) {
        firsts[c] += firsts[i + c];
        seconds[c] += seconds[i + c];
      }
  }

 private:
  int64_t size_;
  std::vector<Real> differences_, squares_, buffer_;
};

// Of a map whose channels lie side by side, some of them at a time.
template <typename T, typename Real>
void column_statistics(const FeatureMap& map, const Stripes& stripes, Real* means, Real* deviations) {
  const T* z = map.tensor.const_data_ptr<T>();
  const int64_t positions = map.positions, repeats = stripes.repeats;
  torch::stable::parallel_for(
      0, map.images * stripes.number, grain(stripes.width * positions), [&](int64_t begin, int64_t end) {
        StripeSums<Real> sums(stripes.size());
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / stripes.number, channel = task % stripes.number * stripes.width;
          const int64_t width = std::min(stripes.width, map.channels - channel);
          const T* first = z + n * map.stride_n + channel;
          Real* __restrict__ origin = sums.origin.data();
          load(first, 1, width, origin);
          const auto repeat = [&] {
            for (int64_t i = width; i < width * repeats; ++i) origin[i] = origin[i - width];
          };
          repeat();
          sums.template add_up<false>(first, map.stride_p, positions, width, repeats);
          for (int64_t c = 0; c < width; ++c)
            origin[c] += static_cast<Real>(sums.first[c] / static_cast<double>(positions));
          repeat();
          sums.template add_up<true>(first, map.stride_p, positions, width, repeats);
          for (int64_t c = 0; c < width; ++c)
            finish(n * map.channels + channel + c, positions, origin[c], {sums.first[c], sums.second[c]},
                   means, deviations);
        }
      });
}

// Mean and deviation of the positions of each channel, which are met twice while they are in the cache: the
// squares are of differences from the mean.
template <typename T>
void statistics(const FeatureMap& map, Accumulate<T>* means, Accumulate<T>* deviations) {
  using Real = Accumulate<T>;
  if (map.stride_c == 1 && map.stride_p != 1)
    return column_statistics<T>(map, Stripes(map, map, Stripes::twice(map)), means, deviations);
  const auto run = [&](int64_t begin, int64_t end) {
    for_each_planes<Real, T>(map, begin, end, [&](int64_t i, int64_t count, const Real* planes) {
      for (int64_t k = 0; k < count; ++k)
        plane_statistics(i + k, map.positions, planes + k * map.positions, means, deviations);
    });
  };
  torch::stable::parallel_for(0, map.images * map.channels, grain(map.positions), run);
}

// Features to rows that are centred and divided by their length + eps, 0 where they do not count.
template <typename Real>
void normalise(const SimilarityLabels<Real>& labels, int64_t channels, const Real* features, Real* unit,
               Real* lengths) {
  const int64_t images = static_cast<int64_t>(labels.value.size());
  torch::stable::parallel_for(0, images, grain(channels), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Real* in = features + n * channels;
      Real* __restrict__ out = unit + n * channels;
      if (labels.value[n] < 0) {
        std::fill(out, out + channels, Real(0));
        continue;
      }
      const Real mean = static_cast<Real>(sum_of<Real>(channels, [&](int64_t c) { return in[c]; }) /
                                          static_cast<double>(channels));
      for (int64_t c = 0; c < channels; ++c) out[c] = in[c] - mean;
      lengths[n] =
          static_cast<Real>(std::sqrt(sum_of<Real>(channels, [&](int64_t c) { return out[c] * out[c]; })));
      const Real divisor = lengths[n] + static_cast<Real>(kLengthEps);
      for (int64_t c = 0; c < channels; ++c) out[c] /= divisor;
    }
  });
}

// One row of similarities: its sum of squared differences is returned, the differences take its place.
template <typename Real>
double pair_row(const SimilarityLabels<Real>& labels, int32_t label, const Wanted<Real>& wanted,
                Real* __restrict__ row) {
  const int32_t* __restrict__ others = labels.value.data();
  const Real* __restrict__ weights = labels.weight.data();
  const auto found = [&](int64_t j) {
    return pair(row[j], chosen(others[j] == label, wanted.same, wanted.different));
  };
  const int64_t count = static_cast<int64_t>(labels.value.size());
  const double squares = sum_of<Real>(count, [&](int64_t j) { return weights[j] * found(j).square; });
  for (int64_t j = 0; j < count; ++j) row[j] = weights[j] * found(j).gradient;
  return squares;
}

// From the gradient g of a row of unit length that of its features, or the factors of dz. `deviations` (C,)
// is null for vectors.
template <typename Real>
void feature_row(int64_t channels, int64_t positions, Real scale, const Real* deviations, const Real* unit,
                 Real length, const Real* g, Real* __restrict__ factor) {
  const Real dot = static_cast<Real>(sum_of<Real>(channels, [&](int64_t c) { return unit[c] * g[c]; }));
  const RowGradient<Real> row = row_gradient(length, dot, scale);
  for (int64_t c = 0; c < channels; ++c) factor[c] = row.along * g[c] - row.across * unit[c];
  const Real mean = static_cast<Real>(sum_of<Real>(channels, [&](int64_t c) { return factor[c]; }) /
                                      static_cast<double>(channels));
  for (int64_t c = 0; c < channels; ++c) factor[c] -= mean;
  for (int64_t c = 0; deviations && c < channels; ++c)
    factor[c] = deviation_factor(factor[c], deviations[c], positions);
}

// Elements made by element(i): where they belong, or in `buffer` and converted.
template <typename T, typename Real, typename F>
void write(int64_t count, T* to, Real* buffer, const F& element) {
  Real* __restrict__ out = buffer;
  if constexpr (std::is_same_v<T, Real>) out = to;
  AUGLOCAL_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = element(i);
  if constexpr (!std::is_same_v<T, Real>) store(out, count, to);
}

template <typename T>
void stripes_grad(const InputGradProblem& problem, const FeatureMap& output, const Stripes& stripes) {
  using Real = Accumulate<T>;
  const FeatureMap& map = problem.z;
  const T* z = map.tensor.const_data_ptr<T>();
  T* dz = output.tensor.mutable_data_ptr<T>();
  const Real *means = problem.mean.const_data_ptr<Real>(), *factors = problem.factor.const_data_ptr<Real>();
  const Real grad = *problem.grad.const_data_ptr<Real>();
  const int64_t channels = map.channels, positions = map.positions, repeats = stripes.repeats;
  torch::stable::parallel_for(
      0, map.images * stripes.number, grain(stripes.width * positions), [&](int64_t begin, int64_t end) {
        const int64_t size = stripes.size();
        std::vector<Real> buffer(size), made(size), row_means(size), row_scales(size);
        Real* __restrict__ mean = row_means.data();
        Real* __restrict__ scale = row_scales.data();
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / stripes.number, channel = task % stripes.number * stripes.width;
          const int64_t width = std::min(stripes.width, channels - channel);
          for (int64_t c = 0; c < width; ++c) {
            mean[c] = means[n * channels + channel + c];
            scale[c] = grad * factors[n * channels + channel + c];
          }
          for (int64_t i = width; i < width * repeats; ++i) {
            mean[i] = mean[i - width];
            scale[i] = scale[i - width];
          }
          for (int64_t p = 0; p < positions; p += repeats) {
            const int64_t count = std::min(repeats, positions - p) * width;
            const Real* in =
                numbers(z + n * map.stride_n + p * map.stride_p + channel, 1, count, buffer.data());
            write(count, dz + n * output.stride_n + p * output.stride_p + channel, made.data(),
                  [&](int64_t i) { return (in[i] - mean[i]) * scale[i]; });
          }
        }
      });
}

// dz = grad_loss (z - mean) factor
template <typename T>
void input_grad(const InputGradProblem& problem, const FeatureMap& output) {
  using Real = Accumulate<T>;
  const FeatureMap& map = problem.z;
  if (map.stride_c == 1 && output.stride_c == 1 && output.stride_p != 1)
    return stripes_grad<T>(problem, output, Stripes(map, output, Stripes::kOnce));
  T* dz = output.tensor.mutable_data_ptr<T>();
  const Real *means = problem.mean.const_data_ptr<Real>(), *factors = problem.factor.const_data_ptr<Real>();
  const Real grad = *problem.grad.const_data_ptr<Real>();
  const int64_t channels = map.channels, positions = map.positions;
  const bool together = output.stride_p == 1 && (channels == 1 || output.stride_c == positions);
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    std::vector<Real> made;
    for_each_planes<Real, T>(map, begin, end, [&](int64_t i, int64_t count, const Real* in) {
      T* to = dz + i / channels * output.stride_n + i % channels * output.stride_c;
      const auto make = [&](Real* __restrict__ out) {
        for (int64_t k = 0; k < count; ++k, out += positions, in += positions) {
          const Real mean = means[i + k], scale = grad * factors[i + k];
          for (int64_t p = 0; p < positions; ++p) out[p] = (in[p] - mean) * scale;
        }
      };
      if constexpr (std::is_same_v<T, Real>)
        if (together) return make(to);
      made.resize(count * positions);
      make(made.data());
      if (together) return store(made.data(), count * positions, to);
      for (int64_t k = 0; k < count; ++k)
        for (int64_t p = 0; p < positions; ++p)
          to[k * output.stride_c + p * output.stride_p] = narrowed<T>(made[k * positions + p]);
    });
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

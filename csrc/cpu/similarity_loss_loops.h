// The loops of similarity_loss: statistics of channels, rows of features, pairs of images, and the pass over
// the map that its backward is. For `each_level.h`.
#include "conversion_loops.h"
#include "product_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// Sum of value(i).
template <typename Real, typename Value>
double total_of(int64_t count, const Value& value) {
  return row_sums<Real>(count, [&](int64_t i) { return std::pair<Real, Real>(value(i), 0); }).first;
}

// The statistics of a channel from sums over its positions: of differences from a mean that is rounded, and
// of their squares.
template <typename Real>
void finish(int64_t i, int64_t positions, Real mean, SumPair sums, Real* means, Real* deviations) {
  const Moments<double> all =
      moments<double>({sums.first, sums.second}, static_cast<double>(positions), mean, 0);
  means[i] = static_cast<Real>(all.mean);
  deviations[i] = static_cast<Real>(deviation(all));
}

template <typename T, typename Real>
void plane_statistics(const FeatureMap& map, Real* means, Real* deviations) {
  const T* z = map.tensor.const_data_ptr<T>();
  const int64_t channels = map.channels, positions = map.positions;
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    std::vector<Held<T>> buffer(positions);
    for (int64_t i = begin; i < end; ++i) {
      const T* first = z + i / channels * map.stride_n + i % channels * map.stride_c;
      const Held<T>* plane = held(first, map.stride_p, positions, buffer.data());
      const Real origin = widened(plane[0]);
      const double offset = total_of<Real>(positions, [&](int64_t p) { return widened(plane[p]) - origin; });
      const Real mean = origin + static_cast<Real>(offset / static_cast<double>(positions));
      const SumPair sums = row_sums<Real>(positions, [&](int64_t p) {
        const Real d = widened(plane[p]) - mean;
        return std::pair<Real, Real>(d, d * d);
      });
      finish(i, positions, mean, sums, means, deviations);
    }
  });
}

// Of a map whose channels lie side by side, some of them at a time.
template <typename T, typename Real>
void column_statistics(const FeatureMap& map, const Stripes& stripes, Real* means, Real* deviations) {
  const T* z = map.tensor.const_data_ptr<T>();
  const int64_t positions = map.positions, repeats = stripes.repeats;
  const int64_t whole = positions / repeats, rest = positions % repeats;
  torch::stable::parallel_for(
      0, map.images * stripes.number, grain(stripes.width * positions), [&](int64_t begin, int64_t end) {
        const int64_t size = stripes.size();
        std::vector<Held<T>> buffer(size);
        std::vector<Real> origin(size);
        ColumnSums<Real> sums;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / stripes.number, channel = task % stripes.number * stripes.width;
          const int64_t width = std::min(stripes.width, map.channels - channel), length = width * repeats;
          const T* first = z + n * map.stride_n + channel;
          // Sums over the positions of each channel.
          const auto add_up = [&](const auto& pair) {
            sums.start(length);
            const auto row = [&](int64_t at, int64_t count) {
              return held(first + at * repeats * map.stride_p, 1, count, buffer.data());
            };
            sums.add(length, 0, whole, [&](int64_t at) { return row(at, length); }, pair);
            if (rest)
              sums.add(
                  rest * width, whole, whole + 1, [&](int64_t at) { return row(at, rest * width); }, pair);
            for (int64_t i = width; i < length; ++i) {
              sums.first[i % width] += sums.first[i];
              sums.second[i % width] += sums.second[i];
            }
          };
          Real* __restrict__ start = origin.data();
          for (int64_t i = 0; i < length; ++i) start[i] = widened(first[i % width]);
          add_up([start](const Held<T>* values, int64_t i) {
            return std::pair<Real, Real>(widened(values[i]) - start[i], 0);
          });
          for (int64_t c = 0; c < width; ++c)
            start[c] += static_cast<Real>(sums.first[c] / static_cast<double>(positions));
          for (int64_t i = width; i < length; ++i) start[i] = start[i - width];
          add_up([start](const Held<T>* values, int64_t i) {
            const Real d = widened(values[i]) - start[i];
            return std::pair<Real, Real>(d, d * d);
          });
          for (int64_t c = 0; c < width; ++c)
            finish(n * map.channels + channel + c, positions, start[c], {sums.first[c], sums.second[c]},
                   means, deviations);
        }
      });
}

// Mean and deviation of the positions of each channel, which are met twice while they are in the cache: the
// squares are of differences from the mean.
template <typename T>
void statistics(const FeatureMap& map, Accumulate<T>* means, Accumulate<T>* deviations) {
  if (map.stride_c == 1 && map.stride_p != 1) column_statistics<T>(map, Stripes(map, map), means, deviations);
  else plane_statistics<T>(map, means, deviations);
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
      const Real mean = static_cast<Real>(total_of<Real>(channels, [&](int64_t c) { return in[c]; }) /
                                          static_cast<double>(channels));
      for (int64_t c = 0; c < channels; ++c) out[c] = in[c] - mean;
      lengths[n] =
          static_cast<Real>(std::sqrt(total_of<Real>(channels, [&](int64_t c) { return out[c] * out[c]; })));
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
  const double squares = total_of<Real>(count, [&](int64_t j) { return weights[j] * found(j).square; });
  for (int64_t j = 0; j < count; ++j) row[j] = weights[j] * found(j).gradient;
  return squares;
}

// From the gradient g of a row of unit length that of its features, or the factors of dz. `deviations` (C,)
// is null for vectors.
template <typename Real>
void feature_row(int64_t channels, int64_t positions, Real scale, const Real* deviations, const Real* unit,
                 Real length, const Real* g, Real* __restrict__ factor) {
  const Real dot = static_cast<Real>(total_of<Real>(channels, [&](int64_t c) { return unit[c] * g[c]; }));
  const RowGradient<Real> row = row_gradient(length, dot, scale);
  for (int64_t c = 0; c < channels; ++c) factor[c] = row.along * g[c] - row.across * unit[c];
  const Real mean = static_cast<Real>(total_of<Real>(channels, [&](int64_t c) { return factor[c]; }) /
                                      static_cast<double>(channels));
  for (int64_t c = 0; c < channels; ++c) factor[c] -= mean;
  for (int64_t c = 0; deviations && c < channels; ++c)
    factor[c] = deviation_factor(factor[c], deviations[c], positions);
}

// dz = grad_loss (z - mean) factor
template <typename T>
void input_grad(const InputGradProblem& problem, const FeatureMap& output) {
  using Real = Accumulate<T>;
  constexpr bool kConverted = !std::is_same_v<T, Held<T>>;
  const FeatureMap& map = problem.z;
  const T* z = map.tensor.const_data_ptr<T>();
  T* dz = output.tensor.mutable_data_ptr<T>();
  const Real *means = problem.mean.const_data_ptr<Real>(), *factors = problem.factor.const_data_ptr<Real>();
  const Real grad = *problem.grad.const_data_ptr<Real>();
  const int64_t channels = map.channels, positions = map.positions;

  // One row: made where it belongs, or converted to it.
  const auto write = [](int64_t count, T* to, Held<T>* converted, const auto& element) {
    Held<T>* __restrict__ out = converted;
    if constexpr (!kConverted) out = to;
    AUGLOCAL_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] = narrowed<Held<T>>(element(i));
    if constexpr (kConverted) narrow_row(converted, count, to);
  };

  if (map.stride_c == 1 && output.stride_c == 1 && output.stride_p != 1) {
    const Stripes stripes(map, output);
    const int64_t repeats = stripes.repeats, rows = (positions + repeats - 1) / repeats;
    torch::stable::parallel_for(
        0, map.images * stripes.number, grain(stripes.width * positions), [&](int64_t begin, int64_t end) {
          const int64_t size = stripes.size();
          std::vector<Held<T>> buffer(size), converted(size);
          std::vector<Real> row_means(size), row_scales(size);
          Real* __restrict__ mean = row_means.data();
          Real* __restrict__ scale = row_scales.data();
          for (int64_t task = begin; task < end; ++task) {
            const int64_t n = task / stripes.number, channel = task % stripes.number * stripes.width;
            const int64_t width = std::min(stripes.width, channels - channel);
            for (int64_t i = 0; i < width * repeats; ++i) {
              const int64_t at = n * channels + channel + i % width;
              mean[i] = means[at];
              scale[i] = grad * factors[at];
            }
            for (int64_t row = 0; row < rows; ++row) {
              const int64_t p = row * repeats, count = std::min(repeats, positions - p) * width;
              const Held<T>* in =
                  held(z + n * map.stride_n + p * map.stride_p + channel, 1, count, buffer.data());
              write(count, dz + n * output.stride_n + p * output.stride_p + channel, converted.data(),
                    [&](int64_t i) { return (widened(in[i]) - mean[i]) * scale[i]; });
            }
          }
        });
    return;
  }
  STD_TORCH_CHECK(output.stride_p == 1, "expected a result whose rows lie together");
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    std::vector<Held<T>> buffer(positions), converted(positions);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      const Held<T>* in =
          held(z + n * map.stride_n + c * map.stride_c, map.stride_p, positions, buffer.data());
      const Real mean = means[i], scale = grad * factors[i];
      write(positions, dz + n * output.stride_n + c * output.stride_c, converted.data(),
            [&](int64_t p) { return (widened(in[p]) - mean) * scale; });
    }
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

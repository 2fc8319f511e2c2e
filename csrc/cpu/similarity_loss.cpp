// similarity_loss on the CPU: statistics, rows and pairs here, the matrix products by the library's matmul.
#include "../similarity_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../similarity_loss_host.h"
#include "loops.h"

namespace auglocal {
namespace {

constexpr int64_t kPairs = 131072;  // whose similarities are made at a time, small enough for a cache
constexpr int64_t kRun = 512;       // elements added up in the narrow type, by kLanes of them
constexpr int64_t kTile = 32;       // channels of a channels-last map that are read together
constexpr int kLanes = 16;

// Sum of value(i); independent lanes let the compiler vectorise it.
template <typename Real, typename Value>
double sum(int64_t count, const Value& value) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    Real lanes[kLanes] = {};
    const int64_t end = std::min(count, begin + kRun);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += value(i + lane);
    for (; i < end; ++i) lanes[0] += value(i);
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  }
  return total;
}

// Mean and deviation of the positions of each channel, which are met twice while they are in the cache: the
// squares are of differences from the mean.
template <typename T>
void statistics(const FeatureMap& map, Accumulate<T>* means, Accumulate<T>* deviations) {
  using Real = Accumulate<T>;
  const T* z = map.tensor.const_data_ptr<T>();
  const int64_t channels = map.channels, positions = map.positions;
  const double count = static_cast<double>(positions);
  const auto store = [&](int64_t i, Real mean, double difference, double squares) {
    const Moments<double> all = moments<double>({difference, squares}, count, mean, 0);
    means[i] = static_cast<Real>(all.mean);
    deviations[i] = static_cast<Real>(deviation(all));
  };
  if (map.stride_c == 1 && map.stride_p != 1) {
    const int64_t tiles = (channels + kTile - 1) / kTile;
    torch::stable::parallel_for(
        0, map.images * tiles, grain(kTile * positions), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / tiles, first = i % tiles * kTile, width = std::min(kTile, channels - first);
            const T* start = z + n * map.stride_n + first;
            Real origin[kTile] = {}, narrow[2][kTile];
            double totals[2][kTile] = {};
            // Adds differences from the origin, and their squares, up.
            const auto add_up = [&](auto squares) {
              for (auto& total : totals) std::fill(total, total + kTile, 0.0);
              for (int64_t run = 0; run < positions; run += kTile) {
                for (auto& sums : narrow) std::fill(sums, sums + kTile, Real(0));
                for (int64_t p = run; p < std::min(positions, run + kTile); ++p) {
                  const T* row = start + p * map.stride_p;
                  for (int64_t c = 0; c < width; ++c) {
                    const Real difference = static_cast<Real>(row[c]) - origin[c];
                    narrow[0][c] += difference;
                    if constexpr (squares) narrow[1][c] += difference * difference;
                  }
                }
                for (int64_t c = 0; c < width; ++c) {
                  totals[0][c] += narrow[0][c];
                  totals[1][c] += narrow[1][c];
                }
              }
            };
            for (int64_t c = 0; c < width; ++c) origin[c] = static_cast<Real>(start[c]);
            add_up(std::false_type());
            for (int64_t c = 0; c < width; ++c) origin[c] += static_cast<Real>(totals[0][c] / count);
            add_up(std::true_type());
            for (int64_t c = 0; c < width; ++c)
              store(n * channels + first + c, origin[c], totals[0][c], totals[1][c]);
          }
        });
    return;
  }
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = z + i / channels * map.stride_n + i % channels * map.stride_c;
      with(map.stride_p == 1, [&](auto unit) {
        const auto at = [&](int64_t p) { return static_cast<Real>(row[unit ? p : p * map.stride_p]); };
        const Real origin = at(0);
        const Real mean =
            origin +
            static_cast<Real>(sum<Real>(positions, [&](int64_t p) { return at(p) - origin; }) / count);
        const double difference = sum<Real>(positions, [&](int64_t p) { return at(p) - mean; });
        const double squares = sum<Real>(positions, [&](int64_t p) {
          const Real d = at(p) - mean;
          return d * d;
        });
        store(i, mean, difference, squares);
      });
    }
  });
}

template <typename Real>
struct Labels {
  std::vector<int32_t> value;  // -1 where an image does not count
  std::vector<Real> weight;    // 1 or 0
  Real count = 0;

  explicit Labels(const SimilarityProblem& problem) {
    const int64_t* target = problem.target.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < problem.z.images; ++n) {
      const bool counted = counts(target[n], problem.classes, problem.ignore_index);
      value.push_back(counted ? static_cast<int32_t>(target[n]) : -1);
      weight.push_back(counted ? Real(1) : Real(0));
      count += weight.back();
    }
  }
};

// Features to rows that are centred and divided by their length + eps, 0 where they do not count.
template <typename Real>
void normalise(const Labels<Real>& labels, int64_t channels, const Real* features, Real* unit,
               Real* lengths) {
  const int64_t images = static_cast<int64_t>(labels.value.size());
  torch::stable::parallel_for(0, images, grain(channels), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Real* in = features + n * channels;
      Real* out = unit + n * channels;
      if (labels.value[n] < 0) {
        std::fill(out, out + channels, Real(0));
        continue;
      }
      const Real mean = static_cast<Real>(sum<Real>(channels, [&](int64_t c) { return in[c]; }) /
                                          static_cast<double>(channels));
      for (int64_t c = 0; c < channels; ++c) out[c] = in[c] - mean;
      lengths[n] =
          static_cast<Real>(std::sqrt(sum<Real>(channels, [&](int64_t c) { return out[c] * out[c]; })));
      const Real divisor = lengths[n] + static_cast<Real>(kLengthEps);
      for (int64_t c = 0; c < channels; ++c) out[c] /= divisor;
    }
  });
}

// One row of similarities: its sum of squared differences is returned, the differences take its place.
template <typename Real>
double pair_row(const Labels<Real>& labels, int32_t label, const Wanted<Real>& wanted, Real* row) {
  const int32_t* __restrict__ others = labels.value.data();
  const Real* __restrict__ weights = labels.weight.data();
  return sum<Real>(static_cast<int64_t>(labels.value.size()), [&](int64_t j) {
    const Pair<Real> found = pair(row[j], others[j] == label ? wanted.same : wanted.different);
    row[j] = weights[j] * found.gradient;
    return weights[j] * found.square;
  });
}

// From the gradient g of a row of unit length that of its features, or the factors of dz.
template <typename Real>
struct FeatureGradient {
  int64_t channels, positions;
  Real scale;              // 4 / V^2
  const Real* deviations;  // (N, C), or null for vectors

  void run(int64_t n, const Real* unit, Real length, const Real* g, Real* factor) const {
    const Real dot = static_cast<Real>(sum<Real>(channels, [&](int64_t c) { return unit[c] * g[c]; }));
    const RowGradient<Real> row = row_gradient(length, dot, scale);
    for (int64_t c = 0; c < channels; ++c) factor[c] = row.along * g[c] - row.across * unit[c];
    const Real mean = static_cast<Real>(sum<Real>(channels, [&](int64_t c) { return factor[c]; }) /
                                        static_cast<double>(channels));
    for (int64_t c = 0; c < channels; ++c) {
      factor[c] -= mean;
      if (deviations) factor[c] = deviation_factor(factor[c], deviations[n * channels + c], positions);
    }
  }
};

template <typename T>
Outputs run(const SimilarityProblem& problem) {
  using Real = Accumulate<T>;
  const int64_t images = problem.z.images, channels = problem.z.channels;
  Tensor mean = problem.per_channel(problem.is_map);
  Tensor features = problem.is_map ? problem.per_channel() : problem.vectors();
  if (problem.is_map)
    statistics<T>(problem.z, mean.mutable_data_ptr<Real>(), features.mutable_data_ptr<Real>());

  const Labels<Real> labels(problem);
  Tensor unit = problem.per_channel(), factor = problem.per_channel(problem.need_grad);
  std::vector<Real> lengths(images, 0);
  std::vector<double> losses(images, 0);
  const Real* feature_rows = features.const_data_ptr<Real>();
  Real* unit_rows = unit.mutable_data_ptr<Real>();
  normalise(labels, channels, feature_rows, unit_rows, lengths.data());

  const Wanted<Real> target = wanted<Real>(problem.classes);
  const auto pairs = [&](int64_t first, int64_t rows, const Tensor& similar) {
    Real* data = similar.mutable_data_ptr<Real>();
    torch::stable::parallel_for(0, rows, grain(images), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t label = labels.value[first + i];
        if (label < 0) std::fill(data + i * images, data + (i + 1) * images, Real(0));
        else losses[first + i] = pair_row(labels, label, target, data + i * images);
      }
    });
  };
  const FeatureGradient<Real> gradient{channels, problem.z.positions, 4 / (labels.count * labels.count),
                                       problem.is_map ? feature_rows : nullptr};
  const auto rows_gradient = [&](int64_t first, int64_t rows, const Tensor& products) {
    const Real* data = products.const_data_ptr<Real>();
    Real* out = factor.mutable_data_ptr<Real>();
    torch::stable::parallel_for(0, rows, grain(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i, at = n * channels;
        if (labels.value[n] < 0) std::fill(out + at, out + at + channels, Real(0));
        else gradient.run(n, unit_rows + at, lengths[n], data + i * channels, out + at);
      }
    });
  };
  for_each_block(problem, unit, kPairs, pairs, rows_gradient);

  double total = 0;
  for (const double row : losses) total += row;
  const double count = static_cast<double>(labels.count);
  Tensor loss = problem.empty({});
  *loss.mutable_data_ptr<Real>() = static_cast<Real>(total / count / count);
  return {loss, problem.need_grad ? mean : problem.empty({0}), factor};
}

// dz = grad_loss (z - mean) factor
template <typename T>
void input_grad(const InputGradProblem& problem, const FeatureMap& output) {
  using Real = Accumulate<T>;
  const FeatureMap& map = problem.z;
  const T* z = map.tensor.const_data_ptr<T>();
  T* dz = output.tensor.mutable_data_ptr<T>();
  const Real *means = problem.mean.const_data_ptr<Real>(), *factors = problem.factor.const_data_ptr<Real>();
  const Real grad = *problem.grad.const_data_ptr<Real>();
  const int64_t channels = map.channels, positions = map.positions;
  if (map.stride_c == 1 && output.stride_c == 1) {
    torch::stable::parallel_for(0, map.images, grain(channels * positions), [&](int64_t begin, int64_t end) {
      std::vector<Real> scales(channels);
      for (int64_t n = begin; n < end; ++n) {
        const Real* mean = means + n * channels;
        for (int64_t c = 0; c < channels; ++c) scales[c] = grad * factors[n * channels + c];
        const Real* __restrict__ scale = scales.data();
        for (int64_t p = 0; p < positions; ++p) {
          const T* in = z + n * map.stride_n + p * map.stride_p;
          T* __restrict__ out = dz + n * output.stride_n + p * output.stride_p;
          for (int64_t c = 0; c < channels; ++c)
            out[c] = static_cast<T>((static_cast<Real>(in[c]) - mean[c]) * scale[c]);
        }
      }
    });
    return;
  }
  torch::stable::parallel_for(0, map.images * channels, grain(positions), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      const T* in = z + n * map.stride_n + c * map.stride_c;
      T* __restrict__ out = dz + n * output.stride_n + c * output.stride_c;
      const Real mean = means[i], scale = grad * factors[i];
      with(map.stride_p == 1 && output.stride_p == 1, [&](auto unit) {
        for (int64_t p = 0; p < positions; ++p)
          out[unit ? p : p * output.stride_p] =
              static_cast<T>((static_cast<Real>(in[unit ? p : p * map.stride_p]) - mean) * scale);
      });
    }
  });
}

// Calls f with an element of z's dtype.
template <typename F>
void dispatch(const Tensor& z, const F& f) {
  THO_DISPATCH_V2(z.scalar_type(), "similarity_loss", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Double,
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

Outputs forward(Tensor z, Tensor target, int64_t classes, int64_t ignore_index, bool need_grad) {
  const SimilarityProblem problem = make_problem(z, target, classes, ignore_index, need_grad);
  Outputs outputs;
  dispatch(z, [&](auto element) { outputs = run<decltype(element)>(problem); });
  return outputs;
}

Tensor similarity_loss_input_grad(Tensor z, Tensor mean, Tensor factor, Tensor grad_loss) {
  const InputGradProblem problem = make_input_grad_problem(z, mean, factor, grad_loss);
  Tensor grad_z = empty_map(z);
  dispatch(z, [&](auto element) { input_grad<decltype(element)>(problem, feature_map(grad_z)); });
  return grad_z;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("similarity_loss.cpu", TORCH_BOX(&forward));
  m.impl("similarity_loss_input_grad.cpu", TORCH_BOX(&similarity_loss_input_grad));
}

}  // namespace auglocal

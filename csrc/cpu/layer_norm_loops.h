// The loops of layer_norm over rows. For `each_level.h`.
#include "lane_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// The mean of the first elements of a row, which is near enough to that of all in almost every row.
template <typename Real, typename T>
Real near_mean(const T* row, int64_t width) {
  const int64_t few = std::min<int64_t>(width, kLanes);
  Real values[kLanes];
  if (few == kLanes) read_lanes(row, 1, AllLanes(), values);
  else read_lanes(row, 1, few, values);
  const Real part = 1 / static_cast<Real>(few);
  for (int lane = 0; lane < kLanes; ++lane) values[lane] *= part;  // the sum of large numbers has no number
  return halves_sum<kLanes>(values);
}

// The sums of x - origin over a row, and of its square; read(i, n, values) are n elements from the i-th on.
template <typename Real, typename Read>
SumPair row_sums(int64_t width, Real origin, const Read& read) {
  return lane_sums<Real>(0, width, true, [&](int64_t i, auto n, Real* sum, Real* square) {
    Real values[kLanes];
    read(i, n, values);
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real d = lane < n ? values[lane] - origin : Real(0);
      sum[lane] += d;
      square[lane] += d * d;
    }
  });
}

// The statistics of a row of x, or of x + residual, which is written to `total`.
template <typename T, typename Real = Accumulate<T>>
RowNorm<Real> statistics(const T* x, const T* residual, int64_t width, double eps, bool rms, T* total) {
  const double count = static_cast<double>(width);
  const T* row = residual ? total : x;
  const auto read = [&](int64_t i, auto n, Real* values) { read_lanes(row + i, 1, n, values); };
  const auto add = [&](int64_t i, auto n, Real* values) {
    Real added[kLanes];
    read_lanes(x + i, 1, n, values);
    read_lanes(residual + i, 1, n, added);
    for (int lane = 0; lane < kLanes; ++lane) values[lane] += added[lane];
    write_lanes(values, n, total + i);
    round_lanes<T>(values);
  };
  const auto found = [&](Real origin, const SumPair& sums) {
    const auto [mean, rstd] = row_norm<double>(origin, rms ? 0 : sums.first, sums.second, width, eps);
    return RowNorm<Real>{static_cast<Real>(mean), static_cast<Real>(rstd)};
  };
  Real near = rms ? Real(0) : near_mean<Real>(x, width);
  if (residual && !rms) near += near_mean<Real>(residual, width);
  const SumPair sums = residual ? row_sums(width, near, add) : row_sums(width, near, read);
  const double shift = sums.first / count;
  if (rms || 2 * shift * shift <= sums.second / count) return found(near, sums);
  const Real mean = static_cast<Real>(near + shift);
  return found(mean, row_sums(width, mean, read));
}

template <typename T, typename Real>
void normalise_row(const T* row, const RowNorm<Real>& norm, const NormParameters<Real>& parameters,
                   int64_t width, T* y) {
  const Real *weight = parameters.weight.data(), *bias = parameters.bias.data();
  const RowNorm<Real> own_norm = norm;
  for_lanes(0, width, true, [=](int64_t i, auto n) {
    Real values[kLanes];
    read_lanes(row + i, 1, n, values);
    const LaneFactors<Real, 2, true> own({weight, bias}, i);
    for (int lane = 0; lane < kLanes; ++lane)
      values[lane] = affine(own_norm.normalised(values[lane]), own.at(0, lane), own.at(1, lane));
    write_lanes(values, n, y + i);
  });
}

// Rows whose statistics are made, of x or of x + residual.
template <typename T>
void forward_rows(const NormInputs& in, const Tensor& residual, double eps, bool rms, NormOutputs& out) {
  using Real = Accumulate<T>;
  auto& [y, total, mean, rstd] = out;
  const T *x = in.x.const_data_ptr<T>(), *added = data_of<const T>(residual);
  T *normalised = y.template mutable_data_ptr<T>(),
    *sums = added ? total.template mutable_data_ptr<T>() : nullptr;
  Real *means = rms ? nullptr : mean.template mutable_data_ptr<Real>(),
       *rstds = rstd.template mutable_data_ptr<Real>();
  const NormParameters<Real> parameters(in);
  torch::stable::parallel_for(0, in.rows, grain(in.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = r * in.width;
      const RowNorm<Real> norm = statistics(x + first, added ? added + first : nullptr, in.width, eps, rms,
                                            added ? sums + first : nullptr);
      normalise_row((added ? sums : x) + first, norm, parameters, in.width, normalised + first);
      if (means) means[r] = norm.mean;
      rstds[r] = norm.rstd;
    }
  });
}

template <typename T>
void apply_rows(const NormInputs& in, Tensor& y) {
  using Real = Accumulate<T>;
  const T* x = in.x.const_data_ptr<T>();
  T* normalised = y.mutable_data_ptr<T>();
  const NormParameters<Real> parameters(in);
  const NormStatistics<Real> statistics(in);
  torch::stable::parallel_for(0, in.rows, grain(in.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      normalise_row(x + r * in.width, statistics[r], parameters, in.width, normalised + r * in.width);
  });
}

// What the gradient of a row's x needs of all its elements.
template <typename T, typename Real>
RowMeans<Real> row_means(const T* grad, const T* x, const RowNorm<Real>& norm, const Real* weight,
                         int64_t width, bool rms) {
  const SumPair sums = lane_sums<Real>(0, width, true, [&](int64_t i, auto n, Real* first, Real* second) {
    Real grads[kLanes], values[kLanes];
    read_lanes(grad + i, 1, n, grads);
    read_lanes(x + i, 1, n, values);
    const LaneFactors<Real, 1, true> own({weight}, i);
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real g = grads[lane] * own.at(0, lane), xhat = norm.normalised(values[lane]);
      first[lane] += g;
      second[lane] += lane < n ? g * xhat : Real(0);
    }
  });
  const double count = static_cast<double>(width);
  return {rms ? Real(0) : static_cast<Real>(sums.first / count), static_cast<Real>(sums.second / count)};
}

// Adds what a run of rows has summed up, and begins the next with zeros.
template <typename Real>
void finish_run(Real* run, int64_t width, double* sums) {
  AUGLOCAL_INDEPENDENT
  for (int64_t c = 0; c < width; ++c) sums[c] += run[c];
  std::fill_n(run, width, Real(0));
}

// The gradients of a row, which lies in the cache since its means were taken; kX, kSums: that of x, and those
// of weight and bias, which are added up. `added` may be null.
template <bool kX, bool kSums, typename T, typename Real>
void backward_row(const T* grad, const T* x, const T* added, const RowNorm<Real>& norm,
                  const RowMeans<Real>& means, const Real* weight, int64_t width, T* grad_x,
                  Real* weight_sums, Real* bias_sums) {
  const RowNorm<Real> own_norm = norm;
  const RowMeans<Real> own_means = means;
  for_lanes(0, width, true, [=](int64_t i, auto n) {
    Real g[kLanes], xhat[kLanes];
    read_lanes(grad + i, 1, n, g);
    read_lanes(x + i, 1, n, xhat);
    for (int lane = 0; lane < kLanes; ++lane) xhat[lane] = own_norm.normalised(xhat[lane]);
    if constexpr (kSums) {
      Real weights[kLanes], biases[kLanes];
      copy_lanes(weight_sums + i, weights);
      copy_lanes(bias_sums + i, biases);
      for (int lane = 0; lane < kLanes; ++lane) {
        weights[lane] += g[lane] * xhat[lane];
        biases[lane] += g[lane];
      }
      copy_lanes(weights, weight_sums + i);
      copy_lanes(biases, bias_sums + i);
    }
    if constexpr (kX) {
      const LaneFactors<Real, 1, true> own({weight}, i);
      for (int lane = 0; lane < kLanes; ++lane)
        g[lane] = input_gradient(own_norm, own_means, g[lane] * own.at(0, lane), xhat[lane]);
      if (added) {
        Real more[kLanes];
        read_lanes(added + i, 1, n, more);
        for (int lane = 0; lane < kLanes; ++lane) g[lane] += more[lane];
      }
      write_lanes(g, n, grad_x + i);
    }
  });
}

// The gradients of all rows, part by part; the sums over rows, zero before, are (parts, 2, width).
template <typename T, bool kX, bool kSums>
void backward_parts(const NormInputs& in, const Tensor& grad, const Tensor& grad_total, bool rms,
                    Tensor& grad_x, double* sums) {
  using Real = Accumulate<T>;
  const T *x = in.x.const_data_ptr<T>(), *grads = grad.const_data_ptr<T>(),
          *added = data_of<const T>(grad_total);
  T* made = kX ? grad_x.mutable_data_ptr<T>() : nullptr;
  const NormParameters<Real> parameters(in);
  const NormStatistics<Real> statistics(in);
  const NormParts parts(in);
  const int64_t width = in.width;
  const Real* weight = parameters.weight.data();
  torch::stable::parallel_for(0, parts.number, grain(parts.rows * width), [&](int64_t begin, int64_t end) {
    std::vector<Real> run_weight(kSums ? whole_lanes(width) : 0), run_bias(run_weight);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * parts.rows, last = std::min(in.rows, first + parts.rows);
      for (int64_t r = first; r < last; ++r) {
        const int64_t at = r * width;
        const RowNorm<Real> norm = statistics[r];
        RowMeans<Real> means{};
        if constexpr (kX) means = row_means(grads + at, x + at, norm, weight, width, rms);
        backward_row<kX, kSums>(grads + at, x + at, added ? added + at : nullptr, norm, means, weight, width,
                                kX ? made + at : nullptr, run_weight.data(), run_bias.data());
        if (kSums && ((r + 1 - first) % kRun == 0 || r + 1 == last)) {
          finish_run(run_weight.data(), width, sums + part * 2 * width);
          finish_run(run_bias.data(), width, sums + (part * 2 + 1) * width);
        }
      }
    }
  });
}

// The sums of all parts, (number, 2, width), in their order: the gradients of weight and bias.
template <typename Real>
void merge_parts(const double* sums, int64_t number, int64_t width, Real* weight, Real* bias) {
  torch::stable::parallel_for(0, 2 * width, grain(number), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - i);
      double all[kLanes] = {};
      for (int64_t part = 0; part < number; ++part) {
        const double* from = sums + part * 2 * width + i;
        for (int64_t lane = 0; lane < count; ++lane) all[lane] += from[lane];
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        Real* to = i + lane < width ? weight : bias;
        if (to) to[(i + lane) % width] = static_cast<Real>(all[lane]);
      }
    }
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

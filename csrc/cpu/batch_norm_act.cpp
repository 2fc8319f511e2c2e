// batch_norm_act on the CPU: two reductions over (N, P) and two passes element by element.
#include "../batch_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "../batch_norm_act_host.h"
#include "channels.h"
#include "loops.h"

namespace auglocal {
namespace {

constexpr int64_t kChunk = 1024;  // rows of channels whose sums are one task
constexpr int64_t kRun = 32;      // of them, or of a lane's positions, added up in the narrow type
constexpr int kLanes = 16;

// A map as rows of elements: along the channels (n, p) -> C, along the positions (n, c) -> P.
template <typename T>
struct Rows {
  T* data;
  int64_t stride_n, stride_outer, stride;

  T* row(int64_t n, int64_t outer) const { return data + n * stride_n + outer * stride_outer; }
};

template <typename T>
Rows<T> rows(const FeatureMap& map, bool channels) {
  T* data = nullptr;
  if constexpr (std::is_const_v<T>) data = map.tensor.const_data_ptr<std::remove_const_t<T>>();
  else data = map.tensor.mutable_data_ptr<T>();
  return {data, map.stride_n, channels ? map.stride_p : map.stride_c, channels ? map.stride_c : map.stride_p};
}

template <typename T>
Rows<T> rows(const std::optional<FeatureMap>& map, bool channels) {
  return map ? rows<T>(*map, channels) : Rows<T>{nullptr, 0, 0, 1};
}

// Two sums of a channel over one image (along the positions) or over kChunk rows (along the channels).
struct Sums {
  double first = 0, second = 0;
};

int64_t parts(const FeatureMap& map, bool channels) {
  return channels ? (map.images * map.positions + kChunk - 1) / kChunk : map.images;
}

// Calls f(chunk, first row, last row) for the runs of the chunks from begin to end.
template <typename F>
void for_each_run(int64_t begin, int64_t end, int64_t rows_in_all, const F& f) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t last = std::min(rows_in_all, (chunk + 1) * kChunk);
    for (int64_t run = chunk * kChunk; run < last; run += kRun) f(chunk, run, std::min(last, run + kRun));
  }
}

// The sums of the pair(i) of a row; independent lanes let the compiler vectorise it.
template <typename Real, typename Pair>
Sums sum_row(int64_t count, const Pair& pair) {
  Sums total;
  for (int64_t begin = 0; begin < count; begin += kRun * kLanes) {
    Real first[kLanes] = {}, second[kLanes] = {};
    const int64_t end = std::min(count, begin + kRun * kLanes);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto [a, b] = pair(i + lane);
        first[lane] += a;
        second[lane] += b;
      }
    for (; i < end; ++i) {
      const auto [a, b] = pair(i);
      first[0] += a;
      second[0] += b;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      total.first += first[lane];
      total.second += second[lane];
    }
  }
  return total;
}

template <typename T>
void stats(const FeatureMap& map, Tensor& mean, Tensor& var) {
  using Real = Accumulate<T>;
  const bool channels = along_channels(map);
  const Rows<const T> x = rows<const T>(map, channels);
  const int64_t width = map.channels, positions = map.positions, rows_in_all = map.images * positions;
  const int64_t chunks = parts(map, channels);
  std::vector<Moments<double>> partial(chunks * width);
  const auto origin = [&](int64_t c) {
    return static_cast<Real>(map.tensor.const_data_ptr<T>()[c * map.stride_c]);
  };

  if (channels) {
    torch::stable::parallel_for(0, chunks, grain(width * kChunk), [&](int64_t begin, int64_t end) {
      std::vector<Real> buffer(3 * width);
      Real* __restrict__ shift = buffer.data(), * __restrict__ sum = shift + width;
      Real* __restrict__ squares = sum + width;
      for_each_run(begin, end, rows_in_all, [&](int64_t chunk, int64_t first, int64_t last) {
        const T* start = x.row(first / positions, first % positions);
        for (int64_t c = 0; c < width; ++c) shift[c] = static_cast<Real>(start[c * x.stride]);
        std::fill(sum, sum + 2 * width, Real(0));
        for (int64_t i = first; i < last; ++i) {
          const T* row = x.row(i / positions, i % positions);
          with(x.stride == 1, [&](auto unit) {
            for (int64_t c = 0; c < width; ++c) {
              const Real d = static_cast<Real>(row[unit ? c : c * x.stride]) - shift[c];
              sum[c] += d;
              squares[c] += d * d;
            }
          });
        }
        for (int64_t c = 0; c < width; ++c) {
          Moments<double>& all = partial[chunk * width + c];
          all = merged(all, moments<double>({sum[c], squares[c]}, static_cast<double>(last - first), shift[c],
                                            origin(c)));
        }
      });
    });
  } else {
    torch::stable::parallel_for(0, map.images * width, grain(positions), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = x.row(i / width, i % width);
        const Real shift = static_cast<Real>(*row);
        Sums sums;
        with(x.stride == 1, [&](auto unit) {
          sums = sum_row<Real>(positions, [&](int64_t p) {
            const Real d = static_cast<Real>(row[unit ? p : p * x.stride]) - shift;
            return std::pair(d, d * d);
          });
        });
        partial[i] = moments<double>({sums.first, sums.second}, static_cast<double>(positions), shift,
                                     origin(i % width));
      }
    });
  }
  for (int64_t c = 0; c < width; ++c) {
    Moments<double> all{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) all = merged(all, partial[chunk * width + c]);
    mean.mutable_data_ptr<Real>()[c] = static_cast<Real>(origin(c) + all.mean);
    var.mutable_data_ptr<Real>()[c] = static_cast<Real>(all.squares / all.count);
  }
}

// What a loop is compiled for: the elements of all its maps side by side, a residual, ReLU (whose mask the
// compiler vectorises where it stands alone).
template <bool kUnit_, bool kResidual_, bool kRelu_>
struct Variant {
  static constexpr bool kUnit = kUnit_, kResidual = kResidual_;

  template <typename Real>
  static Real slope(const BatchNormProblem& problem) {
    return kRelu_ ? Real(0) : static_cast<Real>(problem.slope);
  }
};

template <typename F>
void with_variant(const BatchNormProblem& problem, bool unit_stride, const F& f) {
  with(unit_stride, [&](auto unit) {
    with(problem.residual.has_value(), [&](auto residual) {
      with(problem.slope == 0, [&](auto relu) { f(Variant<unit, residual, relu>()); });
    });
  });
}

// g = grad act'(z) for one element.
template <typename Real>
Real masked(Real grad, Real x, Real residual, const Channel<Real> channel, Real slope) {
  const Real z = normalised(channel, x) + residual;
  return slope == 1 ? grad : activated(grad, z, slope);
}

template <typename T>
void reduce(const BatchNormProblem& problem, Tensor& sum_g, Tensor& sum_g_xhat) {
  using Real = Accumulate<T>;
  const FeatureMap& map = problem.x;
  const bool channels = along_channels(map), has_residual = problem.residual.has_value();
  const Rows<const T> x = rows<const T>(map, channels), grad = rows<const T>(problem.grad, channels);
  const Rows<const T> residual = rows<const T>(problem.residual, channels);
  const bool unit_stride = x.stride == 1 && grad.stride == 1 && residual.stride == 1;
  const int64_t width = map.channels, positions = map.positions, rows_in_all = map.images * positions;
  const int64_t chunks = parts(map, channels);
  const Channels<Real> factors(problem.mean, problem.rstd, problem.weight, problem.bias, problem.x.channels);
  std::vector<Sums> partial(chunks * width);

  // g and g (x - mean) of one element
  const auto pair = [&](auto variant, const T* g, const T* xs, const T* r, int64_t i,
                        const Channel<Real> at) {
    const Real value = static_cast<Real>(xs[variant.kUnit ? i : i * x.stride]);
    Real added = 0;
    if constexpr (variant.kResidual) added = static_cast<Real>(r[variant.kUnit ? i : i * residual.stride]);
    const Real upstream = static_cast<Real>(g[variant.kUnit ? i : i * grad.stride]);
    const Real here = masked(upstream, value, added, at, variant.template slope<Real>(problem));
    return std::pair(here, here * (value - at.mean));
  };
  with_variant(problem, unit_stride, [&](auto variant) {
    if (channels) {
      torch::stable::parallel_for(0, chunks, grain(width * kChunk), [&](int64_t begin, int64_t end) {
        for_each_run(begin, end, rows_in_all, [&](int64_t chunk, int64_t run, int64_t last) {
          for (int64_t c = 0; c < width; c += kLanes) {
            Real first[kLanes] = {}, second[kLanes] = {};
            const int64_t lanes = std::min<int64_t>(kLanes, width - c);
            const ChannelPointers<Real> at(factors, c);
            for (int64_t i = run; i < last; ++i) {
              const int64_t n = i / positions, p = i % positions;
              const T *g = grad.row(n, p) + c * grad.stride, *xs = x.row(n, p) + c * x.stride;
              const T* r = has_residual ? residual.row(n, p) + c * residual.stride : nullptr;
              const auto add = [&](int64_t lane) {
                const auto [a, b] = pair(variant, g, xs, r, lane, at[lane]);
                first[lane] += a;
                second[lane] += b;
              };
              if (lanes == kLanes)
                for (int lane = 0; lane < kLanes; ++lane) add(lane);
              else
                for (int64_t lane = 0; lane < lanes; ++lane) add(lane);
            }
            for (int64_t lane = 0; lane < lanes; ++lane) {
              partial[chunk * width + c + lane].first += first[lane];
              partial[chunk * width + c + lane].second += second[lane];
            }
          }
        });
      });
    } else {
      torch::stable::parallel_for(0, map.images * width, grain(positions), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / width, c = i % width;
          const T *g = grad.row(n, c), *xs = x.row(n, c), *r = has_residual ? residual.row(n, c) : nullptr;
          partial[i] = sum_row<Real>(positions, [&, at = ChannelPointers<Real>(factors, c)[0]](int64_t p) {
            return pair(variant, g, xs, r, p, at);
          });
        }
      });
    }
  });
  const Real* rstd = problem.rstd.const_data_ptr<Real>();
  for (int64_t c = 0; c < width; ++c) {
    Sums total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total.first += partial[chunk * width + c].first;
      total.second += partial[chunk * width + c].second;
    }
    sum_g.mutable_data_ptr<Real>()[c] = static_cast<Real>(total.first);
    sum_g_xhat.mutable_data_ptr<Real>()[c] = static_cast<Real>(total.second * rstd[c]);
  }
}

// Runs f(variant, along the channels, n, outer, elements) for every row.
template <typename F>
void for_each_row(const BatchNormProblem& problem, bool channels, bool unit_stride, const F& f) {
  const FeatureMap& map = problem.x;
  const int64_t outer = channels ? map.positions : map.channels;
  const int64_t inner = channels ? map.channels : map.positions;
  with(channels, [&](auto with_channels) {
    with_variant(problem, unit_stride, [&](auto variant) {
      torch::stable::parallel_for(0, map.images * outer, grain(inner), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(variant, with_channels, i / outer, i % outer, inner);
      });
    });
  });
}

template <typename T>
void apply(const BatchNormProblem& problem, const FeatureMap& output) {
  using Real = Accumulate<T>;
  const bool channels = along_channels(problem.x);
  const Rows<const T> x = rows<const T>(problem.x, channels);
  const Rows<const T> residual = rows<const T>(problem.residual, channels);
  const Rows<T> y = rows<T>(output, channels);
  const Channels<Real> factors(problem.mean, problem.rstd, problem.weight, problem.bias, problem.x.channels);
  const bool unit_stride = x.stride == 1 && residual.stride == 1 && y.stride == 1;
  for_each_row(problem, channels, unit_stride,
               [&](auto variant, auto with_channels, int64_t n, int64_t outer, int64_t inner) {
                 constexpr bool kUnit = variant.kUnit;
                 const T *in = x.row(n, outer), *added = variant.kResidual ? residual.row(n, outer) : nullptr;
                 T* __restrict__ out = y.row(n, outer);
                 const ChannelPointers<Real> channel(factors, with_channels ? 0 : outer);
                 const Real slope = variant.template slope<Real>(problem);
                 for (int64_t i = 0; i < inner; ++i) {
                   Real z = normalised(channel[with_channels ? i : 0],
                                       static_cast<Real>(in[kUnit ? i : i * x.stride]));
                   if constexpr (variant.kResidual)
                     z += static_cast<Real>(added[kUnit ? i : i * residual.stride]);
                   out[kUnit ? i : i * y.stride] = static_cast<T>(slope == 1 ? z : activated(z, z, slope));
                 }
               });
}

template <typename T>
void input_grad(const BatchNormProblem& problem, const std::optional<Tensor>& sum_g,
                const std::optional<Tensor>& sum_g_xhat, const FeatureMap& output,
                const std::optional<FeatureMap>& output_residual) {
  using Real = Accumulate<T>;
  const bool channels = along_channels(problem.x);
  const Rows<const T> x = rows<const T>(problem.x, channels), grad = rows<const T>(problem.grad, channels);
  const Rows<const T> residual = rows<const T>(problem.residual, channels);
  const Rows<T> grad_x = rows<T>(output, channels), grad_residual = rows<T>(output_residual, channels);
  const Channels<Real> factors(problem.mean, problem.rstd, problem.weight, problem.bias, problem.x.channels);
  std::vector<Real> mean_g(problem.x.channels, 0), inner_g(problem.x.channels, 0);
  if (sum_g && sum_g_xhat) {
    const Real count = static_cast<Real>(problem.count());
    for (int64_t c = 0; c < problem.x.channels; ++c) {
      mean_g[c] = sum_g->const_data_ptr<Real>()[c] / count;
      inner_g[c] = problem.rstd.const_data_ptr<Real>()[c] * (sum_g_xhat->const_data_ptr<Real>()[c] / count);
    }
  }
  const bool unit_stride = x.stride == 1 && residual.stride == 1 && grad.stride == 1 && grad_x.stride == 1 &&
                           grad_residual.stride == 1;
  for_each_row(problem, channels, unit_stride,
               [&](auto variant, auto with_channels, int64_t n, int64_t outer, int64_t inner) {
                 constexpr bool kUnit = variant.kUnit;
                 const T *in = x.row(n, outer), *upstream = grad.row(n, outer);
                 const T* added = variant.kResidual ? residual.row(n, outer) : nullptr;
                 T* __restrict__ out = grad_x.row(n, outer);
                 const int64_t first = with_channels ? 0 : outer;
                 const ChannelPointers<Real> channel(factors, first);
                 const Real* __restrict__ mean_at = mean_g.data() + first, * __restrict__ inner_at =
                                                                               inner_g.data() + first;
                 const Real slope = variant.template slope<Real>(problem);
                 const auto gradient = [&](int64_t i, Real value) {
                   Real r = 0;
                   if constexpr (variant.kResidual)
                     r = static_cast<Real>(added[kUnit ? i : i * residual.stride]);
                   const Real from_above = static_cast<Real>(upstream[kUnit ? i : i * grad.stride]);
                   return masked(from_above, value, r, channel[with_channels ? i : 0], slope);
                 };
                 for (int64_t i = 0; i < inner; ++i) {
                   const int64_t c = with_channels ? i : 0;
                   const Real value = static_cast<Real>(in[kUnit ? i : i * x.stride]);
                   const Backward<Real> backward{mean_at[c], inner_at[c]};
                   out[kUnit ? i : i * grad_x.stride] =
                       static_cast<T>(input_gradient(channel[c], backward, gradient(i, value), value));
                 }
                 if (!output_residual) return;
                 T* __restrict__ out_residual = grad_residual.row(n, outer);
                 for (int64_t i = 0; i < inner; ++i)
                   out_residual[kUnit ? i : i * grad_residual.stride] =
                       static_cast<T>(gradient(i, static_cast<Real>(in[kUnit ? i : i * x.stride])));
               });
}

// Calls f with an element of x's dtype.
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  THO_DISPATCH_V2(x.scalar_type(), "batch_norm_act", AT_WRAP([&] { f(scalar_t()); }), ScalarType::Double,
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

TwoTensors batch_norm_stats(const Tensor& x) {
  const FeatureMap map = checked_map(x);
  Tensor mean = per_channel(x), var = per_channel(x);
  dispatch(x, [&](auto element) { stats<decltype(element)>(map, mean, var); });
  return {mean, var};
}

TwoTensors batch_norm_factors_(const Tensor& x, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               double momentum, double eps) {
  check_running(running_mean, x);
  check_running(running_var, x);
  int64_t* batches = batch_count(num_batches_tracked);
  auto [mean, rstd] = batch_norm_stats(x);
  const auto update = [&](auto element) {
    using Real = decltype(element);
    const Update<Real> with{static_cast<Real>(momentum), static_cast<Real>(eps)};
    const Real count = static_cast<Real>(x.numel() / x.size(1));
    Real *means = mean.template mutable_data_ptr<Real>(), *vars = rstd.template mutable_data_ptr<Real>();
    Real* old_mean = running_mean ? running_mean->mutable_data_ptr<Real>() : nullptr;
    Real* old_var = running_var ? running_var->mutable_data_ptr<Real>() : nullptr;
    for (int64_t c = 0; c < x.size(1); ++c) {
      if (old_mean) old_mean[c] = updated(old_mean[c], means[c], with);
      if (old_var) old_var[c] = updated(old_var[c], unbiased(vars[c], count), with);
      vars[c] = reciprocal_deviation(vars[c], with);
    }
  };
  if (accumulation(x) == ScalarType::Double) update(double());
  else update(float());
  if (batches) ++*batches;
  return {mean, rstd};
}

Tensor batch_norm_act_apply(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, double slope) {
  const BatchNormProblem problem = make_problem({}, x, mean, rstd, weight, bias, residual, slope);
  Tensor y = empty_map(x);
  dispatch(x, [&](auto element) { apply<decltype(element)>(problem, feature_map(y)); });
  return y;
}

TwoTensors sums_of(const Tensor& x, const BatchNormProblem& problem) {
  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  dispatch(x, [&](auto element) { reduce<decltype(element)>(problem, sum_g, sum_g_xhat); });
  return {sum_g, sum_g_xhat};
}

TwoTensors gradients_of(const Tensor& x, const BatchNormProblem& problem, const OptionalTensor& sum_g,
                        const OptionalTensor& sum_g_xhat, bool need_residual) {
  Tensor grad_x = empty_map(x), grad_residual = needed_map(x, need_residual);
  std::optional<FeatureMap> output_residual;
  if (need_residual) output_residual = feature_map(grad_residual);
  dispatch(x, [&](auto element) {
    input_grad<decltype(element)>(problem, sum_g, sum_g_xhat, feature_map(grad_x), output_residual);
  });
  return {grad_x, grad_residual};
}

TwoTensors batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& residual, double slope) {
  return sums_of(x, make_problem(grad, x, mean, rstd, weight, bias, residual, slope));
}

TwoTensors batch_norm_act_input_grad(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& rstd, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual, double slope,
                                     OptionalTensor sum_g, OptionalTensor sum_g_xhat, bool need_residual) {
  if (sum_g) sum_g = vector(sum_g, x, "sum_g");
  if (sum_g_xhat) sum_g_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  return gradients_of(x, make_problem(grad, x, mean, rstd, weight, bias, residual, slope), sum_g, sum_g_xhat,
                      need_residual);
}
ThreeTensors batch_norm_act_forward_(const Tensor& x, const OptionalTensor& running_mean,
                                     const OptionalTensor& running_var,
                                     const OptionalTensor& num_batches_tracked, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& residual,
                                     double momentum, double eps, double slope) {
  auto [mean, rstd] = batch_norm_factors_(x, running_mean, running_var, num_batches_tracked, momentum, eps);
  return {batch_norm_act_apply(x, mean, rstd, weight, bias, residual, slope), mean, rstd};
}

FourTensors batch_norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                    const Tensor& rstd, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& residual, double slope,
                                    bool training, bool need_x, bool need_vectors, bool need_residual) {
  const BatchNormProblem problem = make_problem(grad, x, mean, rstd, weight, bias, residual, slope);
  return make_gradients(
      x, training, need_x, need_vectors, need_residual, [&] { return sums_of(x, problem); },
      [&](const auto&... arguments) { return gradients_of(x, problem, arguments...); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("batch_norm_stats.cpu", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_factors_.cpu", TORCH_BOX(&batch_norm_factors_));
  m.impl("batch_norm_act_apply.cpu", TORCH_BOX(&batch_norm_act_apply));
  m.impl("batch_norm_act_reduce.cpu", TORCH_BOX(&batch_norm_act_reduce));
  m.impl("batch_norm_act_input_grad.cpu", TORCH_BOX(&batch_norm_act_input_grad));
  m.impl("batch_norm_act_forward_.cpu", TORCH_BOX(&batch_norm_act_forward_));
  m.impl("batch_norm_act_backward.cpu", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace auglocal

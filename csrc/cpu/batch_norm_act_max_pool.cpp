// batch_norm_act_max_pool on the CPU. Forward keeps the activated rows of one window at a time; backward
// gathers the gradient of one row of the map at a time.
#include "../batch_norm_act_max_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../batch_norm_act_max_pool_host.h"
#include "channels.h"
#include "loops.h"

namespace auglocal {
namespace {

constexpr int kRows = 16;  // of a pooled map that are one task

template <typename T>
struct Plane {
  T* data;
  Strides strides;

  T* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return data + n * strides.n + c * strides.c + h * strides.h + w * strides.w;
  }
};

template <typename T>
Plane<const T> plane(const Tensor& map) {
  return {map.const_data_ptr<T>(), strides_of(map)};
}

template <typename T>
Plane<T> mutable_plane(Tensor& map) {
  return {map.mutable_data_ptr<T>(), strides_of(map)};
}

// What a loop is compiled for: the layout, and ReLU, whose mask the compiler vectorises where it stands
// alone.
template <bool kChannelsLast_, bool kRelu_>
struct Variant {
  static constexpr bool kChannelsLast = kChannelsLast_;

  template <typename Real>
  static Real slope(const MaxPoolProblem& problem) {
    return kRelu_ ? Real(0) : static_cast<Real>(problem.slope);
  }
};

// Calls f(variant, n, first channel, first row, last row) for tasks of at most `most` of `rows` rows.
// In channels-last maps a task has all channels, in others one.
template <typename F>
void for_each_task(const MaxPoolProblem& problem, int rows, int most, const F& f) {
  const int64_t chunks = (rows + most - 1) / most, planes = problem.channels_last ? 1 : problem.channels;
  const int64_t elements = problem.count() / (problem.images * planes * chunks);
  with(problem.channels_last, [&](auto channels_last) {
    with(problem.slope == 0, [&](auto relu) {
      const auto run = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int first = static_cast<int>(i % chunks) * most;
          f(Variant<channels_last, relu>(), i / chunks / planes, i / chunks % planes, first,
            std::min(rows, first + most));
        }
      };
      const int64_t tasks = problem.images * planes * chunks;
      torch::stable::parallel_for(0, tasks, grain(std::max<int64_t>(elements, 1)), run);
    });
  });
}

template <typename T>
void apply(const MaxPoolProblem& problem, Tensor& y, Tensor& indices) {
  using Real = Accumulate<T>;
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;  // as wide as Real
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x);
  const Plane<T> out = mutable_plane<T>(y);
  const Plane<uint8_t> places = mutable_plane<uint8_t>(indices);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels);
  const Real lowest = -std::numeric_limits<Real>::infinity();
  // Columns that windows have in the same place lie side by side: those of each remainder modulo the stride.
  const int padded = problem.width + 2 * window.padding_w, step = std::min(window.stride_w, padded);
  const int64_t phase = (padded + step - 1) / step, row_size = phase * step;
  const auto column = [&](int w) { return w % step * phase + w / step; };

  for_each_task(
      problem, problem.pooled_height, kRows, [&](auto variant, int64_t n, int64_t c0, int begin, int end) {
        const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
        const Real slope = variant.template slope<Real>(problem);
        const ChannelPointers<Real> at(channels, c0);
        // Activated rows by their number modulo kernel_h; what is beside the map is never the largest.
        std::vector<Real> rows(window.kernel_h * row_size * inner, lowest);
        const int64_t results = problem.pooled_width * inner;
        std::vector<Real> largest(results);
        std::vector<Index> place(results);
        const auto row = [&](int h) { return rows.data() + (h % window.kernel_h) * row_size * inner; };
        int next = 0;
        for (int oh = begin; oh < end; ++oh) {
          const int top = oh * window.stride_h - window.padding_h;
          const int first = std::max(top, 0), last = std::min(top + window.kernel_h, problem.height);
          for (next = std::max(next, first); next < last; ++next) {
            for (int first_w = 0; first_w < std::min(step, problem.width); ++first_w) {
              const T* in = x.at(n, c0, next, first_w);
              Real* __restrict__ made = row(next) + column(window.padding_w + first_w) * inner;
              for (int w = first_w; w < problem.width; w += step, in += step * x.strides.w, made += inner)
                for (int64_t c = 0; c < inner; ++c)
                  made[c] = pooled_value<T>(at[c], static_cast<Real>(in[c]), slope);
            }
          }
          std::fill(largest.begin(), largest.end(), lowest);
          for (int64_t ow = 0; ow < problem.pooled_width; ++ow) {
            const int64_t left = std::max<int64_t>(0, window.padding_w - ow * window.stride_w);
            std::fill_n(place.begin() + ow * inner, inner,
                        static_cast<Index>((first - top) * window.kernel_w + left));
          }
          for (int h = first; h < last; ++h) {
            for (int j = 0; j < window.kernel_w; ++j) {
              const Index here = static_cast<Index>((h - top) * window.kernel_w + j);
              const Real* __restrict__ from = row(h) + column(j) * inner;
              Real* __restrict__ best = largest.data();
              Index* __restrict__ found = place.data();
              for (int64_t i = 0; i < results; ++i) {
                const Real value = from[i], before = best[i];
                const bool taken = takes_over(value, before);
                best[i] = taken ? value : before;
                found[i] = taken ? here : found[i];
              }
            }
          }
          for (int64_t ow = 0; ow < problem.pooled_width; ++ow) {
            T* result = out.at(n, c0, oh, ow);
            uint8_t* index = places.at(n, c0, oh, ow);
            for (int64_t c = 0; c < inner; ++c) {
              result[c] = static_cast<T>(largest[ow * inner + c]);
              index[c] = static_cast<uint8_t>(place[ow * inner + c]);
            }
          }
        }
      });
}

template <typename T>
void reduce(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices, Tensor& sum_g,
            Tensor& sum_g_xhat) {
  using Real = Accumulate<T>;
  struct Sums {
    double g = 0, g_difference = 0;
  };
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x), above = plane<T>(grad);
  const Plane<const uint8_t> places = plane<uint8_t>(indices);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels);
  const int64_t chunks = (problem.pooled_height + kRows - 1) / kRows;
  std::vector<Sums> partial(problem.images * chunks * problem.channels);
  // Of the elements of a window, from its first one.
  std::vector<int64_t> offsets(window.kernel_h * window.kernel_w);
  for (size_t i = 0; i < offsets.size(); ++i)
    offsets[i] = static_cast<int64_t>(i) / window.kernel_w * x.strides.h +
                 static_cast<int64_t>(i) % window.kernel_w * x.strides.w;

  for_each_task(problem, problem.pooled_height, kRows,
                [&](auto variant, int64_t n, int64_t c0, int begin, int end) {
                  const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
                  const Real slope = variant.template slope<Real>(problem);
                  const ChannelPointers<Real> at(channels, c0);
                  Sums* sums = partial.data() + (n * chunks + begin / kRows) * problem.channels + c0;
                  for (int oh = begin; oh < end; ++oh) {
                    for (int64_t ow = 0; ow < problem.pooled_width; ++ow) {
                      const int64_t corner = (oh * window.stride_h - window.padding_h) * x.strides.h +
                                             (ow * window.stride_w - window.padding_w) * x.strides.w;
                      const T* from = x.at(n, c0, 0, 0) + corner;
                      const T* upstream = above.at(n, c0, oh, ow);
                      const uint8_t* place = places.at(n, c0, oh, ow);
                      for (int64_t c = 0; c < inner; ++c) {
                        const Real value = static_cast<Real>(from[c + offsets[place[c * places.strides.c]]]);
                        const Channel<Real> channel = at[c];
                        const Real g = activated(static_cast<Real>(upstream[c * above.strides.c]),
                                                 normalised(channel, value), slope);
                        sums[c].g += g;
                        sums[c].g_difference += g * (value - channel.mean);
                      }
                    }
                  }
                });
  for (int64_t c = 0; c < problem.channels; ++c) {
    Sums all;
    for (int64_t i = c; i < static_cast<int64_t>(partial.size()); i += problem.channels) {
      all.g += partial[i].g;
      all.g_difference += partial[i].g_difference;
    }
    sum_g.mutable_data_ptr<Real>()[c] = static_cast<Real>(all.g);
    sum_g_xhat.mutable_data_ptr<Real>()[c] =
        static_cast<Real>(all.g_difference * problem.rstd.const_data_ptr<Real>()[c]);
  }
}

template <typename T>
void input_grad(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices, const Tensor& sum_g,
                const Tensor& sum_g_xhat, Tensor& grad_x) {
  using Real = Accumulate<T>;
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x), above = plane<T>(grad);
  const Plane<const uint8_t> places = plane<uint8_t>(indices);
  const Plane<T> out = mutable_plane<T>(grad_x);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels);
  std::vector<Real> mean_g(problem.channels, 0), inner_g(problem.channels, 0);
  if (sum_g.defined() && sum_g_xhat.defined()) {
    const Real count = static_cast<Real>(problem.count());
    for (int64_t c = 0; c < problem.channels; ++c) {
      mean_g[c] = sum_g.const_data_ptr<Real>()[c] / count;
      inner_g[c] = problem.rstd.const_data_ptr<Real>()[c] * (sum_g_xhat.const_data_ptr<Real>()[c] / count);
    }
  }

  for_each_task(problem, problem.height, kRows, [&](auto variant, int64_t n, int64_t c0, int begin, int end) {
    const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
    const Real slope = variant.template slope<Real>(problem);
    const ChannelPointers<Real> at(channels, c0);
    const int64_t padded = problem.width + 2 * window.padding_w;
    std::vector<Real> gathered(padded * inner);  // the gradient of the activated row, columns padded
    for (int h = begin; h < end; ++h) {
      std::fill(gathered.begin(), gathered.end(), Real(0));
      const int last = last_window(h, window.stride_h, window.padding_h, problem.pooled_height);
      for (int oh = first_window(h, window.kernel_h, window.stride_h, window.padding_h); oh <= last; ++oh) {
        const int before = (h - (oh * window.stride_h - window.padding_h)) * window.kernel_w;
        for (int64_t ow = 0; ow < problem.pooled_width; ++ow) {
          Real* to = gathered.data() + ow * window.stride_w * inner;
          if constexpr (variant.kChannelsLast) {
            const uint8_t* place = places.at(n, 0, oh, ow);
            const T* from = above.at(n, 0, oh, ow);
            for (int64_t c = 0; c < inner; ++c) {
              const int j = place[c * places.strides.c] - before;
              const bool here = j >= 0 && j < window.kernel_w;
              to[(here ? j : 0) * inner + c] += here ? static_cast<Real>(from[c * above.strides.c]) : Real(0);
            }
          } else {
            // Without a branch, which nobody could predict.
            const int j = *places.at(n, c0, oh, ow) - before;
            const bool here = j >= 0 && j < window.kernel_w;
            to[here ? j : 0] += here ? static_cast<Real>(*above.at(n, c0, oh, ow)) : Real(0);
          }
        }
      }
      const Real* row = gathered.data() + window.padding_w * inner;
      const Real* __restrict__ mean_at = mean_g.data() + c0, * __restrict__ inner_at = inner_g.data() + c0;
      const T* in = x.at(n, c0, h, 0);
      T* __restrict__ made = out.at(n, c0, h, 0);
      for (int64_t w = 0; w < problem.width; ++w, in += x.strides.w, made += out.strides.w) {
        for (int64_t c = 0; c < inner; ++c) {
          const Real value = static_cast<Real>(in[c]);
          const Channel<Real> channel = at[c];
          const Real g = activated(row[w * inner + c], normalised(channel, value), slope);
          made[c] =
              static_cast<T>(input_gradient(channel, Backward<Real>{mean_at[c], inner_at[c]}, g, value));
        }
      }
    }
  });
}

#define AUGLOCAL_DISPATCH(x, ...)                                                              \
  THO_DISPATCH_V2((x).scalar_type(), "batch_norm_act_max_pool", AT_WRAP([&] { __VA_ARGS__; }), \
                  ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16)

TwoTensors batch_norm_act_max_pool_apply(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                                         std::optional<Tensor> bias, double slope, int64_t kernel_h,
                                         int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                         int64_t padding_h, int64_t padding_w) {
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  Tensor y = problem.empty_pooled(x.scalar_type()), indices = problem.empty_pooled(ScalarType::Byte);
  AUGLOCAL_DISPATCH(x, apply<scalar_t>(problem, y, indices));
  return {y, indices};
}

TwoTensors batch_norm_act_max_pool_reduce(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          std::optional<Tensor> weight, std::optional<Tensor> bias,
                                          double slope, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                          int64_t stride_w, int64_t padding_h, int64_t padding_w) {
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  problem.check_pooled(grad, x.scalar_type(), "grad");
  problem.check_pooled(indices, ScalarType::Byte, "indices");
  Tensor sum_g = per_channel(x), sum_g_xhat = per_channel(x);
  AUGLOCAL_DISPATCH(x, reduce<scalar_t>(problem, grad, indices, sum_g, sum_g_xhat));
  return {sum_g, sum_g_xhat};
}

Tensor batch_norm_act_max_pool_input_grad(Tensor grad, Tensor indices, Tensor x, Tensor mean, Tensor rstd,
                                          std::optional<Tensor> weight, std::optional<Tensor> bias,
                                          double slope, std::optional<Tensor> sum_g,
                                          std::optional<Tensor> sum_g_xhat, int64_t kernel_h,
                                          int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                          int64_t padding_h, int64_t padding_w) {
  const MaxPoolProblem problem = make_max_pool_problem(x, mean, rstd, weight, bias, slope, kernel_h, kernel_w,
                                                       stride_h, stride_w, padding_h, padding_w);
  problem.check_pooled(grad, x.scalar_type(), "grad");
  problem.check_pooled(indices, ScalarType::Byte, "indices");
  const Tensor sum = vector(sum_g, x, "sum_g"), sum_xhat = vector(sum_g_xhat, x, "sum_g_xhat");
  Tensor grad_x = empty_map(x);
  AUGLOCAL_DISPATCH(x, input_grad<scalar_t>(problem, grad, indices, sum, sum_xhat, grad_x));
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("batch_norm_act_max_pool_apply.cpu", TORCH_BOX(&batch_norm_act_max_pool_apply));
  m.impl("batch_norm_act_max_pool_reduce.cpu", TORCH_BOX(&batch_norm_act_max_pool_reduce));
  m.impl("batch_norm_act_max_pool_input_grad.cpu", TORCH_BOX(&batch_norm_act_max_pool_input_grad));
}

}  // namespace auglocal

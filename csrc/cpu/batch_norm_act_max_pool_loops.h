// The loops of batch_norm_act_max_pool: over rows of the map and of the pooled one, in which the elements of
// all windows at one place lie side by side. For `each_level.h`.
#include "conversion_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// What a loop is compiled for: the layout, and ReLU, whose mask the compiler vectorises where it stands
// alone.
template <bool kChannelsLast_, bool kRelu_>
struct PoolVariant {
  static constexpr bool kChannelsLast = kChannelsLast_;

  template <typename Real>
  static Real slope(const MaxPoolProblem& problem) {
    return kRelu_ ? Real(0) : static_cast<Real>(problem.slope);
  }
};

// Calls f(variant, each) in every thread, and each(g) calls g(image, first channel, first row, last row) for
// its tasks of at most kRows of `rows` rows. In channels-last maps a task has all channels, in others one.
template <typename F>
void for_each_task(const MaxPoolProblem& problem, int rows, const F& f) {
  const int64_t chunks = (rows + kRows - 1) / kRows, planes = problem.channels_last ? 1 : problem.channels;
  const int64_t tasks = problem.images * planes * chunks;
  const int64_t elements = std::max<int64_t>(problem.count() / (problem.images * planes * chunks), 1);
  with(problem.channels_last, [&](auto channels_last) {
    with(problem.slope == 0, [&](auto relu) {
      torch::stable::parallel_for(0, tasks, grain(elements), [&](int64_t begin, int64_t end) {
        f(PoolVariant<channels_last, relu>(), [&](const auto& g) {
          for (int64_t i = begin; i < end; ++i) {
            const int first = static_cast<int>(i % chunks) * kRows;
            g(i / chunks / planes, i / chunks % planes, first, std::min(rows, first + kRows));
          }
        });
      });
    });
  });
}

// A row of a map: of `width` columns of `inner` channels from c on.
template <typename T, typename To>
void load_row(const Plane<const T>& map, int64_t n, int64_t c, int64_t h, int64_t width, int64_t inner,
              To* to) {
  const T* from = map.at(n, c, h, 0);
  const Strides& strides = map.strides;
  if (inner == 1) return load(from, strides.w, width, to);
  if (strides.c == 1 && strides.w == inner) return load(from, 1, width * inner, to);
  for (int64_t w = 0; w < width; ++w) load(from + w * strides.w, strides.c, inner, to + w * inner);
}

// The last `number` rows of some, by their own numbers.
template <typename Value>
class LastRows {
 public:
  LastRows(int64_t number, int64_t size, Value value)
      : number_(number), size_(size), rows_(number * size, value) {}

  Value* operator[](int64_t row) { return rows_.data() + row % number_ * size_; }

  void clear() { next_ = 0; }

  // Calls make(row, its memory) for those from `first` to `last` that are not there.
  template <typename Make>
  void extend(int first, int last, const Make& make) {
    for (next_ = std::max(next_, first); next_ < last; ++next_) make(next_, (*this)[next_]);
  }

 private:
  int64_t number_, size_;
  std::vector<Value> rows_;
  int next_ = 0;
};

// The order of a padded row's columns: by their remainder modulo the stride, so that those which windows have
// at one place lie side by side.
class Columns {
 public:
  explicit Columns(const MaxPoolProblem& problem)
      : width_(problem.width), padding_(problem.window.padding_w) {
    const int64_t padded = width_ + 2 * padding_;
    step_ = std::min<int64_t>(problem.window.stride_w, padded);
    of_phase_ = (padded + step_ - 1) / step_;
  }

  int64_t size() const { return step_ * of_phase_; }

  // Where the place's first column lies, which is that of the first window.
  int64_t operator[](int64_t place) const { return place % step_ * of_phase_ + place / step_; }

  // padded[..] = f(row[i], channel) for the elements of a row, which is overwritten.
  template <typename PoolVariant, typename Real, typename F>
  void scatter(Real* __restrict__ row, int64_t inner, Real* __restrict__ padded, const F& f) const {
    if constexpr (PoolVariant::kChannelsLast) {
      each([&](int64_t w, int64_t at) {
        const Real* __restrict__ from = row + w * inner;
        Real* __restrict__ to = padded + at * inner;
        AUGLOCAL_INDEPENDENT
        for (int64_t c = 0; c < inner; ++c) to[c] = f(from[c], c);
      });
    } else {
      AUGLOCAL_INDEPENDENT
      for (int64_t w = 0; w < width_; ++w) row[w] = f(row[w], 0);
      each([&](int64_t w, int64_t at) { padded[at] = row[w]; });
    }
  }

  // row[i] = f(padded[..], row[i], channel); `gathered` is as long as a row.
  template <typename PoolVariant, typename Real, typename F>
  void gather(const Real* __restrict__ padded, int64_t inner, Real* __restrict__ gathered,
              Real* __restrict__ row, const F& f) const {
    if constexpr (PoolVariant::kChannelsLast) {
      each([&](int64_t w, int64_t at) {
        const Real* __restrict__ from = padded + at * inner;
        Real* __restrict__ to = row + w * inner;
        AUGLOCAL_INDEPENDENT
        for (int64_t c = 0; c < inner; ++c) to[c] = f(from[c], to[c], c);
      });
    } else {
      each([&](int64_t w, int64_t at) { gathered[w] = padded[at]; });
      AUGLOCAL_INDEPENDENT
      for (int64_t w = 0; w < width_; ++w) row[w] = f(gathered[w], row[w], 0);
    }
  }

 private:
  int64_t width_, padding_, step_, of_phase_;

  template <typename F>
  void each(const F& f) const {
    for (int64_t first = 0; first < std::min(step_, width_); ++first) {
      int64_t at = (*this)[padding_ + first];
      for (int64_t w = first; w < width_; w += step_, ++at) f(w, at);
    }
  }
};

// The elements of all windows at the place `here`, each compared with the largest so far and its place.
template <typename Real, typename Index>
AUGLOCAL_NOT_INLINE void take_larger(const Real* __restrict__ from, Index here, int64_t count,
                                     Real* __restrict__ largest, Index* __restrict__ place) {
  AUGLOCAL_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Real value = from[i], before = largest[i];
    const Index place_before = place[i];
    const bool taken = takes_over(value, before);
    largest[i] = taken ? value : before;
    place[i] = taken ? here : place_before;
  }
}

// to[i] = from[i] for the windows whose largest element is at the place `here`.
template <typename Real, typename Index>
AUGLOCAL_NOT_INLINE void take_those_at(const Real* __restrict__ from, Index here,
                                       const Index* __restrict__ place, int64_t count,
                                       Real* __restrict__ to) {
  AUGLOCAL_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Real value = from[i], before = to[i];
    to[i] = chosen(place[i] == here, value, before);
  }
}

// to[i] += from[i] for these windows.
template <typename Real, typename Index>
AUGLOCAL_NOT_INLINE void add_those_at(const Real* __restrict__ from, Index here,
                                      const Index* __restrict__ place, int64_t count, Real* __restrict__ to) {
  AUGLOCAL_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Real value = from[i];
    to[i] += chosen(place[i] == here, value, Real(0));
  }
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
  const Columns columns(problem);

  for_each_task(problem, problem.pooled_height, [&](auto variant, const auto& each) {
    const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
    const int64_t results = problem.pooled_width * inner;
    const Real slope = variant.template slope<Real>(problem);
    std::vector<Real> values(problem.width * inner), largest(results);
    std::vector<Index> place(results);
    // Of activated values; what is beside the map is never the largest.
    LastRows<Real> rows(window.kernel_h, columns.size() * inner, lowest);
    each([&](int64_t n, int64_t c0, int begin, int end) {
      const ChannelPointers<Real> at = channels.at(c0);
      const auto activate = [&](int h, Real* to) {
        load_row(x, n, c0, h, problem.width, inner, values.data());
        columns.template scatter<decltype(variant)>(values.data(), inner, to, [&](Real value, int64_t c) {
          const Real z = normalised(at[c], value);
          return activated(z, z, slope);
        });
        round_row<T>(to, columns.size() * inner);
      };
      rows.clear();
      for (int oh = begin; oh < end; ++oh) {
        const int top = oh * window.stride_h - window.padding_h;
        const int first = std::max(top, 0), last = std::min(top + window.kernel_h, problem.height);
        rows.extend(first, last, activate);
        std::fill(largest.begin(), largest.end(), lowest);
        for (int64_t ow = 0; ow < problem.pooled_width; ++ow) {
          const int64_t left = std::max<int64_t>(0, window.padding_w - ow * window.stride_w);
          std::fill_n(place.begin() + ow * inner, inner,
                      static_cast<Index>((first - top) * window.kernel_w + left));
        }
        for (int h = first; h < last; ++h) {
          for (int j = 0; j < window.kernel_w; ++j) {
            const Index here = static_cast<Index>((h - top) * window.kernel_w + j);
            take_larger(rows[h] + columns[j] * inner, here, results, largest.data(), place.data());
          }
        }
        store(largest.data(), results, out.at(n, c0, oh, 0));
        store(place.data(), results, places.at(n, c0, oh, 0));
      }
    });
  });
}

template <typename T>
void reduce(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices, Tensor& sum_g,
            Tensor& sum_g_xhat) {
  using Real = Accumulate<T>;
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x), above = plane<T>(grad);
  const Plane<const uint8_t> places = plane<uint8_t>(indices);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels);
  const Columns columns(problem);
  const int64_t chunks = (problem.pooled_height + kRows - 1) / kRows;
  std::vector<SumPair> partial(problem.images * chunks * problem.channels);

  for_each_task(problem, problem.pooled_height, [&](auto variant, const auto& each) {
    const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
    const int64_t results = problem.pooled_width * inner;
    const Real slope = variant.template slope<Real>(problem);
    std::vector<Real> values(problem.width * inner), largest(results), upstream(results);
    std::vector<Index> place(results);
    LastRows<Real> rows(window.kernel_h, columns.size() * inner, 0);
    ColumnSums<Real> sums;
    each([&](int64_t n, int64_t c0, int begin, int end) {
      const ChannelPointers<Real> at = channels.at(c0);
      const auto widen = [&](int h, Real* to) {
        load_row(x, n, c0, h, problem.width, inner, values.data());
        columns.template scatter<decltype(variant)>(values.data(), inner, to,
                                                    [](Real value, int64_t) { return value; });
      };
      // g and g (x - mean) of the largest element of a window
      const auto pair = [&](int64_t i, int64_t c) {
        const Channel<Real> channel = at[c];
        const Real g = activated(upstream[i], normalised(channel, largest[i]), slope);
        return std::pair(g, g * (largest[i] - channel.mean));
      };
      SumPair* total = partial.data() + (n * chunks + begin / kRows) * problem.channels + c0;
      sums.start(inner);
      rows.clear();
      for (int oh = begin; oh < end; ++oh) {
        const int top = oh * window.stride_h - window.padding_h;
        const int first = std::max(top, 0), last = std::min(top + window.kernel_h, problem.height);
        rows.extend(first, last, widen);
        load_row(above, n, c0, oh, problem.pooled_width, inner, upstream.data());
        load_row(places, n, c0, oh, problem.pooled_width, inner, place.data());
        for (int h = first; h < last; ++h) {
          for (int j = 0; j < window.kernel_w; ++j) {
            const Index here = static_cast<Index>((h - top) * window.kernel_w + j);
            take_those_at(rows[h] + columns[j] * inner, here, place.data(), results, largest.data());
          }
        }
        if constexpr (variant.kChannelsLast) {
          sums.add(
              inner, 0, problem.pooled_width, [&](int64_t ow) { return ow * inner; },
              [&](int64_t first, int64_t c) { return pair(first + c, c); });
        } else {
          const SumPair row = row_sums<Real>(results, [&](int64_t i) { return pair(i, 0); });
          total->first += row.first;
          total->second += row.second;
        }
      }
      if constexpr (variant.kChannelsLast)
        for (int64_t c = 0; c < inner; ++c) total[c] = {sums.first[c], sums.second[c]};
    });
  });
  const Real* rstd = problem.rstd.const_data_ptr<Real>();
  Real *sums_g = sum_g.mutable_data_ptr<Real>(), *sums_g_xhat = sum_g_xhat.mutable_data_ptr<Real>();
  for (int64_t c = 0; c < problem.channels; ++c) {
    SumPair all;
    for (int64_t i = c; i < static_cast<int64_t>(partial.size()); i += problem.channels) {
      all.first += partial[i].first;
      all.second += partial[i].second;
    }
    sums_g[c] = static_cast<Real>(all.first);
    sums_g_xhat[c] = static_cast<Real>(all.second * rstd[c]);
  }
}

template <typename T>
void input_grad(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices, const Tensor& sum_g,
                const Tensor& sum_g_xhat, Tensor& grad_x) {
  using Real = Accumulate<T>;
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x), above = plane<T>(grad);
  const Plane<const uint8_t> places = plane<uint8_t>(indices);
  const Plane<T> out = mutable_plane<T>(grad_x);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels);
  const Columns columns(problem);
  std::vector<Real> mean_g(problem.channels, 0), inner_g(problem.channels, 0);
  if (sum_g.defined() && sum_g_xhat.defined()) {
    const Real count = static_cast<Real>(problem.count()), *rstd = problem.rstd.const_data_ptr<Real>();
    const Real *sums_g = sum_g.const_data_ptr<Real>(), *sums_g_xhat = sum_g_xhat.const_data_ptr<Real>();
    for (int64_t c = 0; c < problem.channels; ++c) {
      mean_g[c] = sums_g[c] / count;
      inner_g[c] = rstd[c] * (sums_g_xhat[c] / count);
    }
  }

  for_each_task(problem, problem.height, [&](auto variant, const auto& each) {
    const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
    const int64_t results = problem.pooled_width * inner;
    const Real slope = variant.template slope<Real>(problem);
    STD_TORCH_CHECK(problem.width == 1 || out.strides.w == inner,
                    "expected a result whose rows lie together");
    // Of a row: its elements, the gradient of the activated ones, and the same in the order of the windows.
    std::vector<Real> values(problem.width * inner), arrived(problem.width * inner);
    std::vector<Real> gathered(columns.size() * inner);
    // Of the pooled map; a row is covered by no more windows than a window has rows.
    LastRows<Real> upstream(window.kernel_h, results, 0);
    LastRows<Index> place(window.kernel_h, results, 0);
    each([&](int64_t n, int64_t c0, int begin, int end) {
      const ChannelPointers<Real> at = channels.at(c0);
      const Real* __restrict__ mean_at = mean_g.data() + c0, * __restrict__ inner_at = inner_g.data() + c0;
      upstream.clear();
      place.clear();
      for (int h = begin; h < end; ++h) {
        const int first = first_window(h, window.kernel_h, window.stride_h, window.padding_h);
        const int last = last_window(h, window.stride_h, window.padding_h, problem.pooled_height);
        upstream.extend(first, last + 1, [&](int oh, Real* to) {
          load_row(above, n, c0, oh, problem.pooled_width, inner, to);
        });
        place.extend(first, last + 1, [&](int oh, Index* to) {
          load_row(places, n, c0, oh, problem.pooled_width, inner, to);
        });
        std::fill(gathered.begin(), gathered.end(), Real(0));
        for (int oh = first; oh <= last; ++oh) {
          const int before = (h - (oh * window.stride_h - window.padding_h)) * window.kernel_w;
          // An element's gradients are added in the order of its windows.
          for (int j = window.kernel_w - 1; j >= 0; --j) {
            add_those_at(upstream[oh], static_cast<Index>(before + j), place[oh], results,
                         gathered.data() + columns[j] * inner);
          }
        }
        load_row(x, n, c0, h, problem.width, inner, values.data());
        columns.template gather<decltype(variant)>(
            gathered.data(), inner, arrived.data(), values.data(), [&](Real grad, Real value, int64_t c) {
              const Channel<Real> channel = at[c];
              const Real g = activated(grad, normalised(channel, value), slope);
              return input_gradient(channel, Backward<Real>{mean_at[c], inner_at[c]}, g, value);
            });
        store(values.data(), problem.width * inner, out.at(n, c0, h, 0));
      }
    });
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

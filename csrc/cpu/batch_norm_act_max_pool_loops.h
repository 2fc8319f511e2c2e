// The loops of batch_norm_act_max_pool: over rows of the map and of the pooled one, in which the elements of
// all windows at one place lie side by side. For `each_level.h`.
#include "channel_loops.h"
#include "lane_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// What a loop is compiled for: the layout, and ReLU, whose mask the compiler vectorises where it stands
// alone.
template <bool kChannelsLast_, bool kRelu_>
struct PoolVariant {
  static constexpr bool kChannelsLast = kChannelsLast_;

  // Leaky ReLU of slope 1 is no activation.
  template <typename Real>
  static Real activated(Real value, Real z, Real slope) {
    return activated_by<kRelu_ ? Activation::kRelu : Activation::kLeaky>(value, z, slope);
  }
};

// Calls f(variant, each) in every thread, and each(g) calls g(image, first channel, first row, last row) for
// its tasks of at most kRows of `rows` rows. In channels-last maps a task has all channels, in others one.
template <typename F>
void for_each_task(const MaxPoolProblem& problem, int rows, const F& f) {
  const int64_t chunks = (rows + kRows - 1) / kRows, planes = problem.channels_last ? 1 : problem.channels;
  const int64_t tasks = problem.images * planes * chunks;
  const int64_t elements = problem.count() * problem.channels / tasks + 1;
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
    for (int64_t w = 0; w < width_; ++w) places_.push_back((*this)[padding_ + w]);
  }

  int64_t size() const { return step_ * of_phase_; }

  // Where column `at` of the padded row lies. That of a window's first element is where the first window has
  // its; the others follow it.
  int64_t operator[](int64_t at) const { return at % step_ * of_phase_ + at / step_; }

  // Where column w of the map lies.
  int64_t place(int64_t w) const { return places_[w]; }

  // Puts a row of the map in this order.
  template <typename Real>
  void scatter(const Real* __restrict__ row, Real* __restrict__ padded) const {
    for (int64_t first = 0; first < std::min(step_, width_); ++first) {
      const Real* from = row + first;
      Real* to = padded + places_[first];
      const int64_t count = (width_ - first + step_ - 1) / step_;
      if (step_ == 2)  // which the compiler vectorises
        for (int64_t i = 0; i < count; ++i) to[i] = from[2 * i];
      else
        for (int64_t i = 0; i < count; ++i) to[i] = from[i * step_];
    }
  }

 private:
  int64_t width_, padding_, step_, of_phase_;
  std::vector<int64_t> places_;
};

// Calls f(w, n, factors, i) for the elements of a row of a map, kLanes at a time, of which n are there: in
// channels-last maps those of column w from channel i on, else those of the columns from w on. Some come
// twice.
template <typename PoolVariant, typename Real, size_t kNumber, typename F>
void for_row(PoolVariant, int64_t width, int64_t channels, bool dense,
             const std::array<const Real*, kNumber>& factors, const F& f) {
  if constexpr (PoolVariant::kChannelsLast) {
    for_lanes_again(0, channels, dense, [&](int64_t c, auto n) {
      const LaneFactors<Real, kNumber, true> own(factors, c);
      for (int64_t w = 0; w < width; ++w) f(w, n, own, c);
    });
  } else {
    const LaneFactors<Real, kNumber, false> own(factors, 0);
    for_lanes_again(0, width, dense, [&](int64_t w, auto n) { f(w, n, own, 0); });
  }
}

// How far the elements of a window are from its first one, by their places.
class Offsets {
 public:
  // For windows of which one row is `stride_h` from the next, and one column `stride_w`.
  Offsets(const PoolWindow& window, int64_t stride_h, int64_t stride_w) {
    for (int place = 0; place < 256; ++place)
      of_[place] = place / window.kernel_w * stride_h + place % window.kernel_w * stride_w;
  }

  int64_t operator[](uint8_t place) const { return of_[place]; }

 private:
  int64_t of_[256];
};

// Of kLanes windows whose elements inside the map are from[0][i + lane], from[1][i + lane] and so on up to a
// null pointer: the largest, and its place, which is counted from `start`; where all elements are the lowest
// number, start + left[lane]. A loop over a number of elements that it knows the compiler would turn inside
// out.
template <typename Real, typename Index>
AUGLOCAL_NOT_INLINE void take_largest(const Real* const* from, int64_t i, Index start,
                                      const Index* __restrict__ left, Real* __restrict__ largest,
                                      Index* __restrict__ place) {
  Real most[kLanes];
  Index at[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    most[lane] = -std::numeric_limits<Real>::infinity();
    at[lane] = start + left[lane];
  }
  for (Index here = start; *from; ++from, ++here) {
    const Real* __restrict__ values = *from + i;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real value = values[lane], before = most[lane];
      const Index place_before = at[lane];
      const bool taken = takes_over(value, before);
      most[lane] = taken ? value : before;
      at[lane] = taken ? here : place_before;
    }
  }
  copy_lanes(most, largest);
  copy_lanes(at, place);
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
    const Real slope = static_cast<Real>(problem.slope);
    const int64_t stride = variant.kChannelsLast ? x.strides.c : x.strides.w;
    std::vector<Real> row(variant.kChannelsLast ? 0 : problem.width);
    // Where windows begin that the left edge of the map cuts.
    std::vector<Index> left(whole_lanes(results), 0);
    for (int64_t i = 0; i < results; ++i)
      left[i] = static_cast<Index>(std::max<int64_t>(0, window.padding_w - i / inner * window.stride_w));
    // Of activated values; what is beside the map is never the largest.
    LastRows<Real> rows(window.kernel_h, columns.size() * inner + kLanes, lowest);
    std::vector<const Real*> elements;  // of the first window, from the first one inside on
    each([&](int64_t n, int64_t c0, int begin, int end) {
      const auto activate = [&](int h, Real* to) {
        const T* from = x.at(n, c0, h, 0);
        for_row(variant, problem.width, inner, stride == 1, channels.pointers(c0),
                [&](int64_t w, auto n, const auto& factors, int64_t c) {
                  Real z[kLanes];
                  read_lanes(from + w * x.strides.w + c * x.strides.c, stride, n, z);
                  for (int lane = 0; lane < kLanes; ++lane) {
                    const Real value = normalised(channel_of(factors, lane), z[lane]);
                    z[lane] = variant.activated(value, value, slope);
                  }
                  round_lanes<T>(z);
                  write_lanes(z, n,
                              variant.kChannelsLast ? to + columns.place(w) * inner + c : row.data() + w);
                });
        if constexpr (!variant.kChannelsLast) columns.scatter(row.data(), to);
      };
      rows.clear();
      for (int oh = begin; oh < end; ++oh) {
        const int top = oh * window.stride_h - window.padding_h;
        const int first = std::max(top, 0), last = std::min(top + window.kernel_h, problem.height);
        rows.extend(first, last, activate);
        elements.clear();
        for (int h = first; h < last; ++h)
          for (int j = 0; j < window.kernel_w; ++j) elements.push_back(rows[h] + columns[j] * inner);
        elements.push_back(nullptr);
        const Index start = static_cast<Index>((first - top) * window.kernel_w);
        T* to = out.at(n, c0, oh, 0);
        uint8_t* to_place = places.at(n, c0, oh, 0);
        for_lanes(0, results, true, [&](int64_t i, auto n) {
          Real largest[kLanes];
          Index place[kLanes];
          take_largest(elements.data(), i, start, left.data() + i, largest, place);
          write_lanes(largest, n, to + i);
          uint8_t bytes[kLanes];
          for (int lane = 0; lane < kLanes; ++lane) bytes[lane] = static_cast<uint8_t>(place[lane]);
          std::copy_n(bytes, static_cast<int64_t>(n), to_place + i);
        });
      }
    });
  });
}

template <typename T>
void reduce(const MaxPoolProblem& problem, const Tensor& grad, const Tensor& indices, Tensor& sum_g,
            Tensor& sum_g_xhat) {
  using Real = Accumulate<T>;
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x), above = plane<T>(grad);
  const Plane<const uint8_t> places = plane<uint8_t>(indices);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels);
  const Offsets offsets(window, x.strides.h, x.strides.w);
  const int64_t chunks = (problem.pooled_height + kRows - 1) / kRows;
  std::vector<SumPair> partial(problem.images * chunks * problem.channels);

  for_each_task(problem, problem.pooled_height, [&](auto variant, const auto& each) {
    const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
    const int64_t results = problem.pooled_width * inner, rows = variant.kChannelsLast ? 1 : kRows;
    const Real slope = static_cast<Real>(problem.slope);
    std::vector<T> chosen(results);
    std::vector<uint8_t> place(results);
    std::vector<Real> values(whole_lanes(rows * results) + kLanes), upstream(values);
    ElementSums<Real> sums(inner);
    each([&](int64_t n, int64_t c0, int begin, int end) {
      // The largest elements of a row's windows, and their gradients.
      const auto read = [&](int oh, Real* to, Real* to_upstream) {
        load_row(above, n, c0, oh, problem.pooled_width, inner, to_upstream);
        load_row(places, n, c0, oh, problem.pooled_width, inner, place.data());
        const T* from = x.data + n * x.strides.n + c0 * x.strides.c +
                        (static_cast<int64_t>(oh) * window.stride_h - window.padding_h) * x.strides.h -
                        window.padding_w * x.strides.w;
        T* __restrict__ taken = chosen.data();
        const uint8_t* at = place.data();
        for (int64_t ow = 0; ow < problem.pooled_width; ++ow, from += window.stride_w * x.strides.w)
          for (int64_t c = 0; c < inner; ++c) *taken++ = from[offsets[*at++] + c * x.strides.c];
        load(chosen.data(), 1, results, to);
      };
      // Adds g and g (x - mean) of kLanes elements from the i-th on.
      const auto add = [&](int64_t i, const auto& factors, Real* __restrict__ first,
                           Real* __restrict__ second) {
        const Real *at = values.data() + i, *grads = upstream.data() + i;
        for (int lane = 0; lane < kLanes; ++lane) {
          const Real value = at[lane], z = normalised(channel_of(factors, lane), value);
          const Real g = variant.activated(grads[lane], z, slope);
          first[lane] += g;
          second[lane] += g * (value - factors.at(0, lane));
        }
      };
      SumPair* total = partial.data() + (n * chunks + begin / kRows) * problem.channels + c0;
      if constexpr (variant.kChannelsLast) {
        sums.clear();
        for (int oh = begin; oh < end; ++oh) {
          read(oh, values.data(), upstream.data());
          for (int64_t from = 0; from < problem.pooled_width; from += kRun) {
            const int64_t to = std::min<int64_t>(problem.pooled_width, from + kRun);
            sums.add(
                to - from, inner, true,
                [&](int64_t c) { return LaneFactors<Real, 3, true>(channels.pointers(), c); },
                [&](int64_t ow, int64_t c, auto, const auto& factors, Real* first, Real* second) {
                  add((from + ow) * inner + c, factors, first, second);
                });
          }
        }
        for (int64_t c = 0; c < inner; ++c) total[c] = sums.total(c, 1, c + 1);
      } else {
        int64_t count = 0;
        for (int oh = begin; oh < end; ++oh, count += results)
          read(oh, values.data() + count, upstream.data() + count);
        for (auto* each : {&values, &upstream})
          std::fill(each->begin() + count, each->begin() + whole_lanes(count), Real(0));
        const LaneFactors<Real, 3, false> factors(channels.pointers(c0), 0);
        *total = lane_sums<Real>(0, count, true, [&](int64_t i, auto, Real* first, Real* second) {
          add(i, factors, first, second);
        });
      }
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
  const PoolWindow window = problem.window;
  const Plane<const T> x = plane<T>(problem.x), above = plane<T>(grad);
  const Plane<const uint8_t> places = plane<uint8_t>(indices);
  const Plane<T> out = mutable_plane<T>(grad_x);
  const bool constant = !sum_g.defined() || !sum_g_xhat.defined();  // the statistics
  const BackwardChannels<Real> channels(
      Channels<Real>(problem.mean, problem.rstd, problem.weight, problem.bias, problem.channels),
      problem.rstd.const_data_ptr<Real>(), constant ? nullptr : sum_g.const_data_ptr<Real>(),
      constant ? nullptr : sum_g_xhat.const_data_ptr<Real>(), problem.channels, problem.count());

  for_each_task(problem, problem.height, [&](auto variant, const auto& each) {
    const int64_t inner = variant.kChannelsLast ? problem.channels : 1;
    const int64_t results = problem.pooled_width * inner;
    const Real slope = static_cast<Real>(problem.slope);
    STD_TORCH_CHECK(problem.width == 1 || out.strides.w == inner,
                    "expected a result whose rows lie together");
    // Of the rows that the windows of one row cover, with the columns beside the map: the gradient of the
    // activated values.
    const int64_t padded = (problem.width + 2 * window.padding_w) * inner;
    std::vector<Real> gathered(window.kernel_h * padded + kLanes, 0);
    const auto gathered_row = [&](int h) {  // h >= -kernel_h
      return gathered.data() + (h + window.kernel_h) % window.kernel_h * padded;
    };
    const int64_t stride = variant.kChannelsLast ? x.strides.c : x.strides.w;
    std::vector<Real> upstream(results);
    std::vector<uint8_t> place(results);
    each([&](int64_t n, int64_t c0, int begin, int end) {
      // Row h, whose gradient is complete. The next one that takes its place begins with zeros.
      const auto finish = [&](int h) {
        Real* arrived = gathered_row(h);
        if (h >= begin) {
          const T* from = x.at(n, c0, h, 0);
          T* to = out.at(n, c0, h, 0);
          for_row(variant, problem.width, inner, stride == 1, channels.pointers(c0),
                  [&](int64_t w, auto n, const auto& factors, int64_t c) {
                    Real values[kLanes], g[kLanes];
                    read_lanes(from + w * x.strides.w + c * x.strides.c, stride, n, values);
                    copy_lanes(arrived + (w + window.padding_w) * inner + c, g);
                    for (int lane = 0; lane < kLanes; ++lane) {
                      const Channel<Real> own = channel_of(factors, lane);
                      const Real masked = variant.activated(g[lane], normalised(own, values[lane]), slope);
                      values[lane] =
                          input_gradient(own, Backward<Real>{factors.at(3, lane), factors.at(4, lane)},
                                         masked, values[lane]);
                    }
                    write_lanes(values, n, to + w * inner + c);
                  });
        }
        std::fill_n(arrived, padded, Real(0));
      };
      const int first = first_window(begin, window.kernel_h, window.stride_h, window.padding_h);
      const int last = last_window(end - 1, window.stride_h, window.padding_h, problem.pooled_height);
      int next = std::min(begin, first * window.stride_h - window.padding_h);
      for (int oh = first; oh <= last; ++oh) {
        const int top = oh * window.stride_h - window.padding_h;
        for (; next < std::min(top, end); ++next) finish(next);
        load_row(above, n, c0, oh, problem.pooled_width, inner, upstream.data());
        load_row(places, n, c0, oh, problem.pooled_width, inner, place.data());
        int64_t offsets[256];
        for (int h = 0, k = 0; h < window.kernel_h; ++h)
          for (int j = 0; j < window.kernel_w; ++j, ++k)
            offsets[k] = gathered_row(top + h) - gathered.data() + j * inner;
        // An element's gradients are added in the order of its windows.
        const Real* grads = upstream.data();
        const uint8_t* k = place.data();
        Real* to = gathered.data();
        for (int64_t ow = 0; ow < problem.pooled_width; ++ow, to += window.stride_w * inner)
          for (int64_t c = 0; c < inner; ++c) to[offsets[*k++] + c] += *grads++;
      }
      for (; next < end; ++next) finish(next);
      // Rows of the next task, which is another thread's
      std::fill(gathered.begin(), gathered.end(), Real(0));
    });
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

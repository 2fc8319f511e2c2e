// The loops of batch_norm_act over a map: two reductions over (N, P) and two passes element by element. For
// `each_level.h`.
#include "channel_loops.h"
#include "row_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// What the moments of a run are made of, of kLanes elements: sums over its rows of differences to the first
// one.
template <typename Real>
struct LaneMoments {
  Real shift[kLanes], sum[kLanes] = {}, square[kLanes] = {};

  template <typename T, typename Number>
  LaneMoments(const Rows<T>& x, int64_t i, Number n) {
    x.read(0, i, n, shift);
  }

  template <typename T, typename Number>
  void add(const Rows<T>& x, int64_t row, int64_t i, Number n) {
    Real values[kLanes];
    x.read(row, i, n, values);
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real d = values[lane] - shift[lane];
      sum[lane] += d;
      square[lane] += d * d;
    }
  }
};

// Moments of each element of a row over some rows: means, as differences from `origin`, and sums of squared
// differences from them. A run of rows is shifted by its first, so that a value far from all others costs the
// digits of its run alone.
class ElementMoments {
 public:
  std::vector<double> mean, squares;

  explicit ElementMoments(int64_t size) : mean(whole_lanes(size)), squares(mean) {}

  void clear() {
    for (auto* each : {&mean, &squares}) std::fill(each->begin(), each->end(), 0);
  }

  // Adds the elements [first, first + size) of a run of `rows` rows to those of `before` rows.
  template <typename T, typename Real>
  void add(const Rows<T>& x, int64_t first, int64_t size, int64_t rows, int64_t before, const Real* origin) {
    int64_t begin = 0;
    if (x.dense()) {
      for (; begin + 2 * kLanes <= size; begin += 2 * kLanes) {
        const int64_t next = begin + kLanes;
        LaneMoments<Real> own(x, first + begin, AllLanes()), others(x, first + next, AllLanes());
        for (int64_t row = 1; row < rows; ++row) {
          own.add(x, row, first + begin, AllLanes());
          others.add(x, row, first + next, AllLanes());
        }
        finish(own, begin, kLanes, rows, before, origin);
        finish(others, next, kLanes, rows, before, origin);
      }
    }
    for_lanes(begin, size, x.dense(), [&](int64_t i, auto n) {
      LaneMoments<Real> own(x, first + i, n);
      for (int64_t row = 1; row < rows; ++row) own.add(x, row, first + i, n);
      finish(own, i, n, rows, before, origin);
    });
  }

 private:
  template <typename Real>
  void finish(const LaneMoments<Real>& run, int64_t i, int64_t n, int64_t rows, int64_t before,
              const Real* __restrict__ origin) {
    const double count = static_cast<double>(rows), each = 1 / count, share = count / (before + count);
    const double weight = static_cast<double>(before) * share;
    double* __restrict__ means = mean.data() + i, * __restrict__ all_squares = squares.data() + i;
    AUGLOCAL_INDEPENDENT
    for (int64_t lane = 0; lane < n; ++lane) {
      const double total = run.sum[lane], inside = run.square[lane] - total * (total * each);
      const double delta =
          (static_cast<double>(run.shift[lane]) - origin[i + lane]) + total * each - means[lane];
      means[lane] += delta * share;
      all_squares[lane] += (inside < 0 ? 0 : inside) + delta * delta * weight;
    }
  }
};

// The moments of a row of one channel.
template <typename T, typename Real>
Moments<double> row_moments(const Rows<T>& x, int64_t size, Real origin) {
  Moments<double> all{};
  for (int64_t first = 0; first < size; first += kRun * kLanes) {
    const int64_t last = std::min(size, first + kRun * kLanes);
    Real some[kLanes];
    x.read(0, first, int64_t{1}, some);
    const Real shift = some[0];
    const SumPair found =
        lane_sums<Real>(first, last, x.dense(), [&](int64_t i, auto n, Real* sum, Real* square) {
          Real values[kLanes];
          x.read(0, i, n, values);
          for (int lane = 0; lane < kLanes; ++lane) {
            const Real d = lane < n ? values[lane] - shift : Real(0);
            sum[lane] += d;
            square[lane] += d * d;
          }
        });
    all = merged(
        all, moments<double>({found.first, found.second}, static_cast<double>(last - first), shift, origin));
  }
  return all;
}

template <typename T>
void stats(const FeatureMap& map, Tensor& mean, Tensor& var) {
  using Real = Accumulate<T>;
  const Grid grid(map, {});
  const int64_t number = grid.parts();
  std::vector<Moments<double>> partial(grid.channels * number);
  std::vector<Real> origins(grid.channels);
  const T* data = map.tensor.const_data_ptr<T>();
  for (int64_t c = 0; c < grid.channels; ++c) origins[c] = widened(data[c * map.stride_c]);

  torch::stable::parallel_for(
      0, grid.tasks(), grain(grid.elements_of_task()), [&](int64_t begin, int64_t end) {
        Rows<T> x(map, grid);
        if (!grid.many_channels()) {
          for (int64_t row = begin; row < end; ++row) {
            const int64_t c = row % grid.channels;
            x.start(row, row + 1);
            partial[c * number + row / grid.channels] = row_moments(x, grid.size, origins[c]);
          }
          return;
        }
        TaskFactors<Real, 1> origin(grid, {origins.data()});
        ElementMoments elements(grid.size_of_task);
        for (int64_t index = begin; index < end; ++index) {
          const Task task = grid.task(index);
          const Real* start = origin(task)[0];
          int64_t rows = 0, longer = 0;  // and elements of which there is one row more
          elements.clear();
          grid.for_runs(task, [&](int64_t first, int64_t last, int64_t size) {
            x.start(first, last);
            elements.add(x, task.first, size, last - first, rows, start);
            if (size == task.last - task.first) rows += last - first;
            else longer = size;
          });
          grid.for_channels(task, [&](int64_t c, int64_t first, int64_t step, int64_t last) {
            const auto count = [&](int64_t i) { return static_cast<double>(rows + (i < longer)); };
            Moments<double> all{};
            for (int64_t i = first; i < last; i += step) {
              all.count += count(i);
              all.mean += count(i) * elements.mean[i];
            }
            all.mean /= all.count;
            for (int64_t i = first; i < last; i += step) {
              const double delta = elements.mean[i] - all.mean;
              all.squares += elements.squares[i] + count(i) * (delta * delta);
            }
            partial[c * number + task.part] = all;
          });
        }
      });
  Real *means = mean.mutable_data_ptr<Real>(), *vars = var.mutable_data_ptr<Real>();
  const double count = static_cast<double>(map.images * map.positions);
  torch::stable::parallel_for(0, grid.channels, grain(4 * number), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Moments<double> all = merged(partial.data() + c * number, number, count);
      means[c] = static_cast<Real>(origins[c] + all.mean);
      vars[c] = static_cast<Real>(all.squares / count);
    }
  });
}

// What a loop is compiled for: whether rows have many channels, a residual, ReLU.
template <bool kMany_, bool kResidual_, bool kRelu_>
struct Variant {
  static constexpr bool kMany = kMany_, kResidual = kResidual_;

  // Leaky ReLU of slope 1 is no activation.
  template <typename Real>
  static Real activated(Real value, Real z, Real slope) {
    return activated_by<kRelu_ ? Activation::kRelu : Activation::kLeaky>(value, z, slope);
  }
};

template <typename F>
void with_variant(const BatchNormProblem& problem, const Grid& grid, const F& f) {
  with(grid.many_channels(), [&](auto many) {
    with(problem.residual.has_value(), [&](auto residual) {
      with(problem.slope == 0, [&](auto relu) { f(Variant<many, residual, relu>()); });
    });
  });
}

// The residual, if the variant has one.
template <typename T>
struct Residual {
  Rows<T> rows;

  Residual(const BatchNormProblem& problem, const Grid& grid)
      : rows(problem.residual.value_or(problem.x), grid) {}

  // Adds it to the normalised values z.
  template <typename Variant, typename Number, typename Real>
  void add(Variant, int64_t row, int64_t i, Number n, Real* __restrict__ z) const {
    if constexpr (Variant::kResidual) {
      Real added[kLanes];
      rows.read(row, i, n, added);
      for (int lane = 0; lane < kLanes; ++lane) z[lane] += added[lane];
    }
  }
};

template <typename T>
void reduce(const BatchNormProblem& problem, Tensor& sum_g, Tensor& sum_g_xhat) {
  using Real = Accumulate<T>;
  const Grid grid(problem.x, {pointer(problem.grad), pointer(problem.residual)});
  const int64_t number = grid.parts();
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, grid.channels);
  const Real slope = static_cast<Real>(problem.slope);
  std::vector<SumPair> partial(grid.channels * number);

  with_variant(problem, grid, [&](auto variant) {
    const auto run = [&](int64_t begin, int64_t end) {
      Rows<T> x(problem.x, grid), grad(*problem.grad, grid);
      Residual<T> residual(problem, grid);
      TaskFactors<Real, 3> factors_of(grid, channels.pointers());
      // Adds g and g (x - mean) of kLanes elements to sums of theirs.
      const auto add = [&](int64_t row, int64_t i, auto n, const auto& factors, Real* __restrict__ first,
                           Real* __restrict__ second) {
        Real values[kLanes], g[kLanes], z[kLanes];
        x.read(row, i, n, values);
        grad.read(row, i, n, g);
        for (int lane = 0; lane < kLanes; ++lane)
          z[lane] = normalised(channel_of(factors, lane), values[lane]);
        residual.add(variant, row, i, n, z);
        for (int lane = 0; lane < kLanes; ++lane) {
          const Real masked = variant.activated(g[lane], z[lane], slope);
          first[lane] += masked;
          second[lane] += masked * (values[lane] - factors.at(0, lane));
        }
      };
      const auto start = [&](int64_t first, int64_t last) {
        x.start(first, last);
        grad.start(first, last);
        if constexpr (variant.kResidual) residual.rows.start(first, last);
      };
      const bool dense = x.dense() && grad.dense() && residual.rows.dense();
      ElementSums<Real> sums(variant.kMany ? grid.size_of_task : 0);
      for (int64_t index = begin; index < end; ++index) {
        const Task task = grid.task(index);
        const auto& own = factors_of(task);
        if constexpr (variant.kMany) {
          sums.clear();
          grid.for_runs(task, [&](int64_t first_row, int64_t last_row, int64_t size) {
            start(first_row, last_row);
            sums.add(
                last_row - first_row, size, dense,
                [&](int64_t i) { return LaneFactors<Real, 3, true>(own, i); },
                [&](int64_t row, int64_t i, auto n, const auto& factors, Real* first, Real* second) {
                  add(row, task.first + i, n, factors, first, second);
                });
          });
          grid.for_channels(task, [&](int64_t c, int64_t first, int64_t step, int64_t last) {
            partial[c * number + task.part] = sums.total(first, step, last);
          });
        } else {
          const LaneFactors<Real, 3, false> factors(own, 0);
          start(task.first_row, task.last_row);
          partial[task.first_row % grid.channels * number + task.part] = lane_sums<Real>(
              0, grid.size, dense,
              [&](int64_t i, auto n, Real* first, Real* second) { add(0, i, n, factors, first, second); });
        }
      }
    };
    torch::stable::parallel_for(0, grid.tasks(), grain(grid.elements_of_task()), run);
  });
  const Real* rstd = problem.rstd.const_data_ptr<Real>();
  Real *sums_g = sum_g.mutable_data_ptr<Real>(), *sums_g_xhat = sum_g_xhat.mutable_data_ptr<Real>();
  torch::stable::parallel_for(0, grid.channels, grain(2 * number), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      SumPair total;
      for (const SumPair* part = partial.data() + c * number; part != partial.data() + (c + 1) * number;
           ++part) {
        total.first += part->first;
        total.second += part->second;
      }
      sums_g[c] = static_cast<Real>(total.first);
      sums_g_xhat[c] = static_cast<Real>(total.second * rstd[c]);
    }
  });
}

template <typename T>
void apply(const BatchNormProblem& problem, const FeatureMap& output) {
  using Real = Accumulate<T>;
  const Grid grid(output, {&problem.x, pointer(problem.residual)});
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, grid.channels);
  const Real slope = static_cast<Real>(problem.slope);
  with_variant(problem, grid, [&](auto variant) {
    const auto run = [&](int64_t begin, int64_t end) {
      Rows<T> x(problem.x, grid);
      Residual<T> residual(problem, grid);
      Results<T> y(output, grid);
      TaskFactors<Real, 3> factors_of(grid, channels.pointers());
      const auto start = [&](int64_t first, int64_t last) {
        x.start(first, last);
        y.start(first, last);
        if constexpr (variant.kResidual) residual.rows.start(first, last);
      };
      for (int64_t index = begin; index < end; ++index) {
        const Task task = grid.task(index);
        for_rows<variant.kMany>(grid, task, factors_of(task), x.dense() && residual.rows.dense(), start,
                                [&](int64_t row, int64_t i, auto n, const auto& factors) {
                                  Real z[kLanes];
                                  x.read(row, i, n, z);
                                  for (int lane = 0; lane < kLanes; ++lane)
                                    z[lane] = normalised(channel_of(factors, lane), z[lane]);
                                  residual.add(variant, row, i, n, z);
                                  for (int lane = 0; lane < kLanes; ++lane)
                                    z[lane] = variant.activated(z[lane], z[lane], slope);
                                  y.write(z, row, i, n);
                                });
      }
    };
    torch::stable::parallel_for(0, grid.tasks(), grain(grid.elements_of_task()), run);
  });
}

template <typename T>
void input_grad(const BatchNormProblem& problem, const std::optional<Tensor>& sum_g,
                const std::optional<Tensor>& sum_g_xhat, const FeatureMap& output,
                const std::optional<FeatureMap>& output_residual) {
  using Real = Accumulate<T>;
  const Grid grid(output,
                  {&problem.x, pointer(problem.grad), pointer(problem.residual), pointer(output_residual)});
  const bool constant = !sum_g || !sum_g_xhat;  // the statistics
  const BackwardChannels<Real> channels(
      Channels<Real>(problem.mean, problem.rstd, problem.weight, problem.bias, grid.channels),
      problem.rstd.const_data_ptr<Real>(), constant ? nullptr : sum_g->const_data_ptr<Real>(),
      constant ? nullptr : sum_g_xhat->const_data_ptr<Real>(), grid.channels, problem.count());
  const Real slope = static_cast<Real>(problem.slope);
  with_variant(problem, grid, [&](auto variant) {
    const auto run = [&](int64_t begin, int64_t end) {
      Rows<T> x(problem.x, grid), grad(*problem.grad, grid);
      Residual<T> residual(problem, grid);
      Results<T> grad_x(output, grid), grad_residual(output_residual.value_or(output), grid);
      TaskFactors<Real, 5> factors_of(grid, channels.pointers());
      const auto start = [&](int64_t first, int64_t last) {
        x.start(first, last);
        grad.start(first, last);
        grad_x.start(first, last);
        if (output_residual) grad_residual.start(first, last);
        if constexpr (variant.kResidual) residual.rows.start(first, last);
      };
      const auto lanes = [&](int64_t row, int64_t i, auto n, const auto& factors) {
        Real values[kLanes], g[kLanes], z[kLanes];
        x.read(row, i, n, values);
        grad.read(row, i, n, g);
        for (int lane = 0; lane < kLanes; ++lane)
          z[lane] = normalised(channel_of(factors, lane), values[lane]);
        residual.add(variant, row, i, n, z);
        for (int lane = 0; lane < kLanes; ++lane) g[lane] = variant.activated(g[lane], z[lane], slope);
        if (output_residual) grad_residual.write(g, row, i, n);
        const auto finish = [&](auto constant) {
          for (int lane = 0; lane < kLanes; ++lane)
            z[lane] = input_gradient_by<constant>(channel_of(factors, lane),
                                                  Backward<Real>{factors.at(3, lane), factors.at(4, lane)},
                                                  g[lane], values[lane]);
          grad_x.write(z, row, i, n);
        };
        if (constant) finish(std::true_type());
        else finish(std::false_type());
      };
      const bool dense = x.dense() && grad.dense() && residual.rows.dense();
      for (int64_t index = begin; index < end; ++index) {
        const Task task = grid.task(index);
        for_rows<variant.kMany>(grid, task, factors_of(task), dense, start, lanes);
      }
    };
    torch::stable::parallel_for(0, grid.tasks(), grain(grid.elements_of_task()), run);
  });
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

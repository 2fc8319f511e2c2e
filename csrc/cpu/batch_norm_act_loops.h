// The loops of batch_norm_act over a map: two reductions over (N, P) and two passes element by element. For
// `each_level.h`.
#include "row_loops.h"
#include "sum_loops.h"

namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

constexpr int64_t kChunk = 1024;  // positions whose sums are one task, where rows run along the channels

// Which rows are the tasks of a reduction, each with sums of its own: their order, and so every bit, is the
// same for any number of threads.
inline int64_t rows_of_task(const Grid& grid) {
  return grid.channels ? std::max<int64_t>(1, kChunk / grid.repeats) : 1;
}
inline int64_t tasks(const Grid& grid) {
  return (grid.rows + rows_of_task(grid) - 1) / rows_of_task(grid);
}

// How many sums a channel has, which lie side by side.
inline int64_t parts(const Grid& grid) {
  return grid.channels ? tasks(grid) : grid.images;
}

// Moments of each element of a row over some rows: means, as differences from `origin`, and sums of squared
// differences from them. A run of rows is shifted by its first, so that a value far from all others costs the
// digits of its run alone.
template <typename Real>
class Columns {
 public:
  explicit Columns(int64_t size)
      : mean(size), squares(size), origin(size), shift_(size), sum_(size), square_(size) {}

  std::vector<double> mean, squares;
  std::vector<Real> origin;

  void clear() {
    std::fill(mean.begin(), mean.end(), 0);
    std::fill(squares.begin(), squares.end(), 0);
  }

  // Adds rows from begin to end, of `size` elements each, to `before` others.
  template <typename Row>
  void add(int64_t size, int64_t before, int64_t begin, int64_t end, const Row& row) {
    for (int64_t from = begin; from < end; from += kRun, before += kRun)
      add_run(size, static_cast<double>(before), from, std::min(end, from + kRun), row);
  }

 private:
  std::vector<Real> shift_, sum_, square_;

  template <typename Row>
  void add_run(int64_t size, double before, int64_t begin, int64_t end, const Row& row) {
    Real* __restrict__ shift = shift_.data();
    Real* __restrict__ sum = sum_.data(), * __restrict__ square = square_.data();
    double* __restrict__ means = mean.data(), * __restrict__ all_squares = squares.data();
    const Real* __restrict__ start = origin.data();
    const auto* first = row(begin);
    AUGLOCAL_INDEPENDENT
    for (int64_t i = 0; i < size; ++i) {
      shift[i] = widened(first[i]);
      sum[i] = square[i] = 0;
    }
    for (int64_t at = begin + 1; at < end; ++at) {
      const auto* in = row(at);
      AUGLOCAL_INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        const Real d = widened(in[i]) - shift[i];
        sum[i] += d;
        square[i] += d * d;
      }
    }
    const double count = static_cast<double>(end - begin), each = 1 / count, share = count / (before + count);
    AUGLOCAL_INDEPENDENT
    for (int64_t i = 0; i < size; ++i) {
      const double total = sum[i], inside = square[i] - total * (total * each);
      const double delta = (static_cast<double>(shift[i]) - start[i]) + total * each - means[i];
      means[i] += delta * share;
      all_squares[i] += (inside < 0 ? 0 : inside) + delta * delta * (before * share);
    }
  }
};

template <typename T>
void stats(const FeatureMap& map, Tensor& mean, Tensor& var) {
  using Real = Accumulate<T>;
  const Grid grid(map, {});
  const Planes planes(grid);
  const bool small = Planes::suit(grid, map, {});
  const int64_t width = grid.width, positions = grid.positions, step = rows_of_task(grid);
  const int64_t number = small ? planes.parts() : parts(grid);
  std::vector<Moments<double>> partial(width * number);
  const T* data = map.tensor.const_data_ptr<T>();
  const auto origin = [&](int64_t c) { return static_cast<Real>(widened(data[c * map.stride_c])); };

  if (small) {
    const auto run = [&](int64_t begin, int64_t end) {
      Rows<T> x(map, grid, planes.size());
      Columns<Real> columns(planes.size());
      for (int64_t task = begin; task < end; ++task) {
        const PlanesTask at(planes, task);
        for (int64_t c = 0; c < at.channels; ++c)
          std::fill_n(columns.origin.begin() + c * positions, positions, origin(at.channel + c));
        columns.clear();
        columns.add(at.size, 0, at.image, at.last_image,
                    [&](int64_t n) { return x(n * width + at.channel, at.size); });
        const double images = static_cast<double>(at.last_image - at.image), count = images * positions;
        for (int64_t c = 0; c < at.channels; ++c) {
          // Every element of the plane has as many values.
          const double *means = columns.mean.data() + c * positions,
                       *squares = columns.squares.data() + c * positions;
          Moments<double> all{count, 0, 0};
          all.mean = sum_of(positions, [&](int64_t p) { return means[p]; }) / static_cast<double>(positions);
          all.squares = sum_of(positions, [&](int64_t p) {
            return squares[p] + images * ((means[p] - all.mean) * (means[p] - all.mean));
          });
          partial[(at.channel + c) * number + at.part] = all;
        }
      }
    };
    torch::stable::parallel_for(0, planes.tasks(), grain(planes.size() * planes.of_task), run);
  } else if (grid.channels) {
    const auto run = [&](int64_t begin, int64_t end) {
      Rows<T> x(map, grid, grid.size);
      Columns<Real> columns(grid.size);
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = c; i < grid.size; i += width) columns.origin[i] = origin(c);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * step, last = std::min(grid.rows, first + step);
        const int64_t whole = grid.count(last - 1) == grid.size ? last : last - 1;
        const auto row = [&](int64_t at) { return x(at, grid.count(at)); };
        columns.clear();
        columns.add(grid.size, 0, first, whole, row);
        if (whole < last) columns.add(grid.count(whole), whole - first, whole, last, row);
        for (int64_t c = 0; c < width; ++c) {
          const auto rows = [&](int64_t i) {  // in which element i of a row is there
            return static_cast<double>(whole - first + (whole < last && i < grid.count(whole)));
          };
          Moments<double> all{};
          for (int64_t i = c; i < grid.size; i += width) {
            all.count += rows(i);
            all.mean += rows(i) * columns.mean[i];
          }
          all.mean /= all.count;
          for (int64_t i = c; i < grid.size; i += width) {
            const double delta = columns.mean[i] - all.mean;
            all.squares += columns.squares[i] + rows(i) * (delta * delta);
          }
          partial[c * number + task] = all;
        }
      }
    };
    torch::stable::parallel_for(0, tasks(grid), grain(grid.size * step), run);
  } else {
    const auto run = [&](int64_t begin, int64_t end) {
      Rows<T> x(map, grid, grid.size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / width, c = task % width;
        const Held<T>* row = x(task, grid.size);
        Moments<double> all{};
        for (int64_t first = 0; first < grid.size; first += kRun * kLanes) {
          const int64_t count = std::min(grid.size - first, kRun * kLanes);
          const Held<T>* values = row + first;
          const Real shift = widened(values[0]);
          const SumPair found = row_sums<Real>(count, [&](int64_t p) {
            const Real d = widened(values[p]) - shift;
            return std::pair(d, d * d);
          });
          all = merged(all, moments<double>({found.first, found.second}, static_cast<double>(count), shift,
                                            origin(c)));
        }
        partial[c * number + n] = all;
      }
    };
    torch::stable::parallel_for(0, tasks(grid), grain(grid.size), run);
  }
  Real *means = mean.mutable_data_ptr<Real>(), *vars = var.mutable_data_ptr<Real>();
  const double count = static_cast<double>(map.images * map.positions);
  torch::stable::parallel_for(0, width, grain(4 * number), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Moments<double> all = merged(partial.data() + c * number, number, count);
      means[c] = static_cast<Real>(origin(c) + all.mean);
      vars[c] = static_cast<Real>(all.squares / count);
    }
  });
}

// What a loop is compiled for: whether rows run along the channels, a residual, ReLU (whose mask is
// vectorised where it stands alone).
template <bool kChannels_, bool kResidual_, bool kRelu_>
struct Variant {
  static constexpr bool kChannels = kChannels_, kResidual = kResidual_;

  template <typename Real>
  static Real slope(const BatchNormProblem& problem) {
    return kRelu_ ? Real(0) : static_cast<Real>(problem.slope);
  }
};

template <typename F>
void with_variant(const BatchNormProblem& problem, bool channels, const F& f) {
  with(channels, [&](auto channels) {
    with(problem.residual.has_value(), [&](auto residual) {
      with(problem.slope == 0, [&](auto relu) { f(Variant<channels, residual, relu>()); });
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
  const Grid grid(problem.x, {pointer(problem.grad), pointer(problem.residual)});
  const Planes planes(grid);
  const bool small = Planes::suit(grid, problem.x, {pointer(problem.grad), pointer(problem.residual)});
  const int64_t width = grid.width, number = small ? planes.parts() : parts(grid), step = rows_of_task(grid);
  const Channels<Real> factors(problem.mean, problem.rstd, problem.weight, problem.bias, width, grid.repeats);
  std::vector<SumPair> partial(width * number);

  with_variant(problem, grid.channels, [&](auto variant) {
    const int64_t number_of_tasks = small ? planes.tasks() : tasks(grid);
    const int64_t elements = small ? planes.size() * planes.of_task : grid.size * step;
    torch::stable::parallel_for(0, number_of_tasks, grain(elements), [&](int64_t begin, int64_t end) {
      const int64_t most = small ? planes.size() : grid.size;
      Rows<T> x(problem.x, grid, most), grad(*problem.grad, grid, most);
      Rows<T> residual(problem.residual.value_or(problem.x), grid, most);
      ColumnSums<Real> sums;
      Channels<Real> spread;  // the factors of each element of a row of planes
      const Real slope = variant.template slope<Real>(problem);
      struct Row {
        const Held<T>* x;
        const Held<T>* grad;
        const Held<T>* residual;
      };
      const auto row = [&](int64_t at, int64_t count) {
        return Row{x(at, count), grad(at, count), variant.kResidual ? residual(at, count) : nullptr};
      };
      // g and g (x - mean) of one element
      const auto pair = [&](const Row& in, int64_t i, const Channel<Real> channel) {
        const Real value = widened(in.x[i]);
        const Real added = variant.kResidual ? static_cast<Real>(widened(in.residual[i])) : Real(0);
        const Real g = masked(static_cast<Real>(widened(in.grad[i])), value, added, channel, slope);
        return std::pair(g, g * (value - channel.mean));
      };
      for (int64_t task = begin; task < end; ++task) {
        if constexpr (variant.kChannels) {
          const ChannelPointers<Real> channel = factors.at(0);
          const auto add = [&](int64_t size, int64_t first, int64_t last) {
            sums.add(
                size, first, last, [&](int64_t at) { return row(at, size); },
                [&](const Row& in, int64_t i) { return pair(in, i, channel[i]); });
          };
          const int64_t first = task * step, last = std::min(grid.rows, first + step);
          const int64_t whole = grid.count(last - 1) == grid.size ? last : last - 1;
          sums.start(grid.size);
          add(grid.size, first, whole);
          if (whole < last) add(grid.count(whole), whole, last);
          for (int64_t c = 0; c < width; ++c) {
            SumPair all;
            for (int64_t i = c; i < grid.size; i += width) {
              all.first += sums.first[i];
              all.second += sums.second[i];
            }
            partial[c * number + task] = all;
          }
        } else if (small) {
          const PlanesTask at(planes, task);
          spread.resize(planes.size());
          for (int64_t c = 0; c < at.channels; ++c)
            spread.fill(c * grid.positions, grid.positions, factors, at.channel + c);
          const ChannelPointers<Real> channel = spread.at(0);
          sums.start(at.size);
          sums.add(
              at.size, at.image, at.last_image,
              [&](int64_t n) { return row(n * width + at.channel, at.size); },
              [&](const Row& in, int64_t i) { return pair(in, i, channel[i]); });
          for (int64_t c = 0; c < at.channels; ++c) {
            const auto over_plane = [&](const std::vector<double>& each) {
              const double* plane = each.data() + c * grid.positions;
              return sum_of(grid.positions, [&](int64_t p) { return plane[p]; });
            };
            partial[(at.channel + c) * number + at.part] = {over_plane(sums.first), over_plane(sums.second)};
          }
        } else {
          const int64_t n = task / width, c = task % width;
          const Channel<Real> channel = factors.at(c)[0];
          const Row in = row(task, grid.size);
          partial[c * number + n] =
              row_sums<Real>(grid.size, [&](int64_t p) { return pair(in, p, channel); });
        }
      }
    });
  });
  const Real* rstd = problem.rstd.const_data_ptr<Real>();
  Real *sums_g = sum_g.mutable_data_ptr<Real>(), *sums_g_xhat = sum_g_xhat.mutable_data_ptr<Real>();
  torch::stable::parallel_for(0, width, grain(2 * number), [&](int64_t begin, int64_t end) {
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

// Calls f(variant, most, each) in every thread, and each(g) calls g(row, count, factors) for its rows, of at
// most `most` elements. The factors, arrays of one number per channel, are those of each element of the row
// where variant.kChannels, else the first ones are those of the row. Small planes are rows of several.
template <typename Real, size_t kFactors, typename F>
void for_rows(const BatchNormProblem& problem, const Grid& grid, bool small,
              const std::array<const Real*, kFactors>& factors, const F& f) {
  const Planes planes(grid);
  const int64_t tasks = small ? planes.tasks() : grid.rows, most = small ? planes.size() : grid.size;
  with_variant(problem, grid.channels || small, [&](auto variant) {
    const auto run = [&](int64_t begin, int64_t end) {
      std::vector<Real> spread(small ? kFactors * most : 0);
      f(variant, most, [&](const auto& g) {
        for (int64_t task = begin; task < end; ++task) {
          std::array<const Real*, kFactors> of_row = factors;
          int64_t row = task, step = 1, last = task + 1, count = 0;
          if (small) {
            const PlanesTask at(planes, task);
            row = at.image * grid.width + at.channel;
            step = grid.width;
            last = at.last_image * grid.width;
            count = at.size;
            for (size_t k = 0; k < kFactors; ++k) {
              Real* to = spread.data() + k * most;
              of_row[k] = to;
              for (int64_t c = at.channel; c < at.channel + at.channels; ++c, to += grid.positions)
                std::fill_n(to, grid.positions, factors[k][c]);
            }
          } else {
            count = grid.count(task);
            if (!grid.channels)
              for (auto& each : of_row) each += task % grid.width;
          }
          for (; row < last; row += step) g(row, count, of_row);
        }
      });
    };
    torch::stable::parallel_for(0, tasks, grain(small ? most * planes.of_task : most), run);
  });
}

template <typename T>
void apply(const BatchNormProblem& problem, const FeatureMap& output) {
  using Real = Accumulate<T>;
  const std::initializer_list<const FeatureMap*> others{&problem.x, pointer(problem.residual)};
  const Grid grid(output, others);
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, grid.width,
                                grid.repeats);
  const std::array factors{channels.mean.data(), channels.scale.data(), channels.bias.data()};
  const auto run = [&](auto variant, int64_t most, const auto& each) {
    Rows<T> x(problem.x, grid, most), residual(problem.residual.value_or(problem.x), grid, most);
    Results<T> y(output, grid, most);
    const Real slope = variant.template slope<Real>(problem);
    each([&](int64_t at, int64_t count, const auto& of_row) {
      const Held<T>* in = x(at, count);
      const Held<T>* added = variant.kResidual ? residual(at, count) : nullptr;
      Held<T>* __restrict__ out = y(at);
      const ChannelPointers<Real> channel{of_row[0], of_row[1], of_row[2]};
      AUGLOCAL_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        Real z = normalised(channel[variant.kChannels ? i : 0], static_cast<Real>(widened(in[i])));
        if constexpr (variant.kResidual) z += widened(added[i]);
        out[i] = narrowed<Held<T>>(slope == 1 ? z : activated(z, z, slope));
      }
      y.finish(at, count);
    });
  };
  for_rows(problem, grid, Planes::suit(grid, output, others), factors, run);
}

template <typename T>
void input_grad(const BatchNormProblem& problem, const std::optional<Tensor>& sum_g,
                const std::optional<Tensor>& sum_g_xhat, const FeatureMap& output,
                const std::optional<FeatureMap>& output_residual) {
  using Real = Accumulate<T>;
  const std::initializer_list<const FeatureMap*> others{&problem.x, pointer(problem.grad),
                                                        pointer(problem.residual), pointer(output_residual)};
  const Grid grid(output, others);
  const int64_t width = grid.width;
  const Channels<Real> channels(problem.mean, problem.rstd, problem.weight, problem.bias, width,
                                grid.repeats);
  std::vector<Real> mean_g(width * grid.repeats, 0), inner_g(width * grid.repeats, 0);
  if (sum_g && sum_g_xhat) {
    const Real count = static_cast<Real>(problem.count()), *rstd = problem.rstd.const_data_ptr<Real>();
    const Real *sums_g = sum_g->const_data_ptr<Real>(), *sums_g_xhat = sum_g_xhat->const_data_ptr<Real>();
    for (int64_t c = 0; c < width * grid.repeats; ++c) {
      mean_g[c] = sums_g[c % width] / count;
      inner_g[c] = rstd[c % width] * (sums_g_xhat[c % width] / count);
    }
  }
  const std::array<const Real*, 5> factors{channels.mean.data(), channels.scale.data(), channels.bias.data(),
                                           mean_g.data(), inner_g.data()};
  const auto run = [&](auto variant, int64_t most, const auto& each) {
    Rows<T> x(problem.x, grid, most), grad(*problem.grad, grid, most);
    Rows<T> residual(problem.residual.value_or(problem.x), grid, most);
    Results<T> grad_x(output, grid, most), grad_residual(output_residual.value_or(output), grid, most);
    const Real slope = variant.template slope<Real>(problem);
    each([&](int64_t at, int64_t count, const auto& of_row) {
      const Held<T>* in = x(at, count);
      const Held<T>* upstream = grad(at, count);
      const Held<T>* added = variant.kResidual ? residual(at, count) : nullptr;
      const ChannelPointers<Real> channel{of_row[0], of_row[1], of_row[2]};
      const Real* __restrict__ mean_at = of_row[3];
      const Real* __restrict__ inner_at = of_row[4];
      const auto gradient = [&](int64_t i, Real value) {
        const Real r = variant.kResidual ? static_cast<Real>(widened(added[i])) : Real(0);
        return masked(static_cast<Real>(widened(upstream[i])), value, r, channel[variant.kChannels ? i : 0],
                      slope);
      };
      Held<T>* __restrict__ out = grad_x(at);
      AUGLOCAL_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = variant.kChannels ? i : 0;
        const Real value = widened(in[i]);
        out[i] = narrowed<Held<T>>(
            input_gradient(channel[c], Backward<Real>{mean_at[c], inner_at[c]}, gradient(i, value), value));
      }
      grad_x.finish(at, count);
      if (!output_residual) return;
      Held<T>* __restrict__ out_residual = grad_residual(at);
      AUGLOCAL_INDEPENDENT
      for (int64_t i = 0; i < count; ++i)
        out_residual[i] = narrowed<Held<T>>(gradient(i, static_cast<Real>(widened(in[i]))));
      grad_residual.finish(at, count);
    });
  };
  for_rows(problem, grid, Planes::suit(grid, output, others), factors, run);
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

// Pairs of sums over the elements of rows. For `each_level.h`.
//
// Up to kRun values are added up in Real, these in double; the order does not depend on the length of
// vectors.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

constexpr int64_t kRun = 32;  // values that are added up in Real
constexpr int kLanes = 32;    // sums side by side, where those of a row are one

// The sum of value(i) for i below `count`: of several sums side by side.
template <typename F>
double sum_of(int64_t count, const F& value) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += value(i + lane);
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += value(i);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

// The sums of pair(i) over a row of `count` elements.
template <typename Real, typename Pair>
SumPair row_sums(int64_t count, const Pair& pair) {
  SumPair total;
  for (int64_t begin = 0; begin < count; begin += kRun * kLanes) {
    Real first[kLanes] = {}, second[kLanes] = {};
    const int64_t end = std::min(count, begin + kRun * kLanes);
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, end - i);
      AUGLOCAL_INDEPENDENT
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const auto [a, b] = pair(i + lane);
        first[lane] += a;
        second[lane] += b;
      }
    }
    double firsts[kLanes / 2], seconds[kLanes / 2];
    for (int lane = 0; lane < kLanes / 2; ++lane) {
      firsts[lane] = static_cast<double>(first[lane]) + first[lane + kLanes / 2];
      seconds[lane] = static_cast<double>(second[lane]) + second[lane + kLanes / 2];
    }
    for (int half = kLanes / 4; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) {
        firsts[lane] += firsts[lane + half];
        seconds[lane] += seconds[lane + half];
      }
    total.first += firsts[0];
    total.second += seconds[0];
  }
  return total;
}

// The sums of pair(row, i) over rows, for each element i of a row.
template <typename Real>
class ColumnSums {
 public:
  std::vector<double> first, second;

  // Of rows of `size` elements; all sums are zero.
  void start(int64_t size) {
    for (auto* sums : {&first, &second}) sums->assign(size, 0);
    for (auto* run : {&first_run_, &second_run_}) run->resize(size);
  }

  // Adds the rows from begin to end, of at most as many elements: `row(at)` is read before the next is asked
  // for.
  template <typename Row, typename Pair>
  void add(int64_t size, int64_t begin, int64_t end, const Row& row, const Pair& pair) {
    Real* __restrict__ first_run = first_run_.data(), * __restrict__ second_run = second_run_.data();
    double* __restrict__ firsts = first.data(), * __restrict__ seconds = second.data();
    for (int64_t from = begin; from < end; from += kRun) {
      std::fill_n(first_run, size, Real(0));
      std::fill_n(second_run, size, Real(0));
      for (int64_t at = from; at < std::min(end, from + kRun); ++at) {
        const auto elements = row(at);
        AUGLOCAL_INDEPENDENT
        for (int64_t i = 0; i < size; ++i) {
          const auto [a, b] = pair(elements, i);
          first_run[i] += a;
          second_run[i] += b;
        }
      }
      AUGLOCAL_INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        firsts[i] += first_run[i];
        seconds[i] += second_run[i];
      }
    }
  }

 private:
  std::vector<Real> first_run_, second_run_;
};

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

// Pairs of sums over the elements of rows. For `each_level.h`.
//
// Up to kRun values are added up in Real, these in double; the order does not depend on the length of
// vectors.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// The sum over all lanes of each.
template <typename Real>
SumPair across_lanes(const Real* first, const Real* second) {
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
  return {firsts[0], seconds[0]};
}

// The sums over elements [begin, end) of a row: add(i, n, first, second) adds those of the n elements from i
// on, at most kLanes, to kLanes sums.
template <typename Real, typename Add>
SumPair lane_sums(int64_t begin, int64_t end, bool dense, const Add& add) {
  SumPair total;
  for (; begin < end; begin += kRun * kLanes) {
    Real first[kLanes] = {}, second[kLanes] = {};
    for_lanes(begin, std::min(end, begin + kRun * kLanes), dense,
              [&](int64_t i, auto n) { add(i, n, first, second); });
    const SumPair some = across_lanes(first, second);
    total.first += some.first;
    total.second += some.second;
  }
  return total;
}

// The sums over rows, for each element of a row.
template <typename Real>
class ElementSums {
 public:
  explicit ElementSums(int64_t size) : first_(whole_lanes(size)), second_(first_) {}

  void clear() {
    for (auto* sums : {&first_, &second_}) std::fill(sums->begin(), sums->end(), 0);
  }

  // Adds a run of rows of `size` elements: add(i, n, first, second) adds all rows' n elements from i on, at
  // most kLanes, to kLanes sums.
  template <typename Add>
  void add(int64_t size, bool dense, const Add& add) {
    for_lanes(0, size, dense, [&](int64_t i, auto n) {
      Real first[kLanes] = {}, second[kLanes] = {};
      add(i, n, first, second);
      const int64_t lanes = n;
      double* __restrict__ firsts = first_.data() + i, * __restrict__ seconds = second_.data() + i;
      AUGLOCAL_INDEPENDENT
      for (int64_t lane = 0; lane < lanes; ++lane) {
        firsts[lane] += first[lane];
        seconds[lane] += second[lane];
      }
    });
  }

  // The sums over elements first, first + step, ..., before last.
  SumPair total(int64_t first, int64_t step, int64_t last) const {
    SumPair all;
    for (int64_t i = first; i < last; i += step) {
      all.first += first_[i];
      all.second += second_[i];
    }
    return all;
  }

 private:
  std::vector<double> first_, second_;
};

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

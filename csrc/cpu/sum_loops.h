// Pairs of sums over the elements of rows. For `each_level.h`.
//
// Up to kRun values are added up in Real, these in double; the order does not depend on the length of
// vectors.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// The sum of kCount numbers, the two halves of which are added.
template <int kCount, typename Number>
AUGLOCAL_INLINE Number halves_sum(const Number* all) {
  if constexpr (kCount == 1) {
    return all[0];
  } else {
    Number half[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) half[i] = all[i] + all[i + kCount / 2];
    return halves_sum<kCount / 2>(half);
  }
}

// The sum over all lanes of each.
template <typename Real>
SumPair across_lanes(const Real* first, const Real* second) {
  double firsts[kLanes], seconds[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    firsts[lane] = first[lane];
    seconds[lane] = second[lane];
  }
  return {halves_sum<kLanes>(firsts), halves_sum<kLanes>(seconds)};
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

  // Adds a run of rows of `size` elements: add(row, i, n, factors(i), first, second) adds the row's n
  // elements from i on, at most kLanes, to kLanes sums. Of rows that are longer twice as many are added in
  // one go, so that memory is read with fewer leaps.
  template <typename Factors, typename Add>
  void add(int64_t rows, int64_t size, bool dense, const Factors& factors, const Add& add) {
    int64_t begin = 0;
    if (dense) {
      for (; begin + 2 * kLanes <= size; begin += 2 * kLanes) {
        const int64_t next = begin + kLanes;
        const auto own = factors(begin), others = factors(next);
        Real first[kLanes] = {}, second[kLanes] = {}, more_first[kLanes] = {}, more_second[kLanes] = {};
        for (int64_t row = 0; row < rows; ++row) {
          add(row, begin, AllLanes(), own, first, second);
          add(row, next, AllLanes(), others, more_first, more_second);
        }
        finish(begin, kLanes, first, second);
        finish(next, kLanes, more_first, more_second);
      }
    }
    for_lanes(begin, size, dense, [&](int64_t i, auto n) {
      const auto own = factors(i);
      Real first[kLanes] = {}, second[kLanes] = {};
      for (int64_t row = 0; row < rows; ++row) add(row, i, n, own, first, second);
      finish(i, n, first, second);
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

  void finish(int64_t i, int64_t n, const Real* __restrict__ first, const Real* __restrict__ second) {
    double* __restrict__ firsts = first_.data() + i, * __restrict__ seconds = second_.data() + i;
    AUGLOCAL_INDEPENDENT
    for (int64_t lane = 0; lane < n; ++lane) {
      firsts[lane] += first[lane];
      seconds[lane] += second[lane];
    }
  }
};

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

// The product of two matrices. For `each_level.h`.
//
// Blocks of columns of the second matrix are copied to panels as wide as some vectors; a tile of sums, some
// rows high, stays in registers over the depth of a panel. Elements of half precision are converted block by
// block, so that neither matrix is ever copied as a whole.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

constexpr int kWide = AUGLOCAL_VECTOR == 64 ? 1 : 2;  // vectors of a panel's width
constexpr int kTall = AUGLOCAL_VECTOR == 64 ? 8 : 4;  // rows of a tile
constexpr int64_t kDepth = 128, kBlockRows = 64, kBlockColumns = 128;
constexpr int64_t kProductGrain = 1 << 18;  // multiplications worth a thread

// A vector in memory, wherever it lies.
template <typename Real>
struct Lanes {
#if AUGLOCAL_VECTOR
  typedef Real type __attribute__((vector_size(AUGLOCAL_VECTOR), aligned(alignof(Real)), may_alias));
#else
  using type = Real;
#endif
  static constexpr int64_t kCount = sizeof(type) / sizeof(Real);
  static constexpr int64_t kPanel = kCount * kWide;
};

// Adds the products of kRows rows of `a` with a panel to kRows rows of `sums`, which lie `line` apart;
// `first` ones are written.
template <int kRows, typename Real>
AUGLOCAL_NOT_INLINE void add_tile(bool first, int64_t depth, const Real* a, int64_t row, int64_t column,
                                  const Real* panel, Real* sums, int64_t line) {
  using Vector = typename Lanes<Real>::type;
  constexpr int64_t kCount = Lanes<Real>::kCount;
  const auto at = [](auto* from) -> Vector& { return *reinterpret_cast<Vector*>(from); };
  Vector tile[kRows][kWide];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kWide; ++j) tile[i][j] = first ? Vector{} : at(sums + i * line + j * kCount);
  for (int64_t k = 0; k < depth; ++k, a += column, panel += kCount * kWide) {
    Vector own[kWide];
    for (int j = 0; j < kWide; ++j) own[j] = *reinterpret_cast<const Vector*>(panel + j * kCount);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kWide; ++j) tile[i][j] += a[i * row] * own[j];
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kWide; ++j) at(sums + i * line + j * kCount) = tile[i][j];
}

// `count` of the columns of `b`, `depth` elements of each, to panels side by side.
template <typename T, typename Real>
void pack(const MatrixView<const T>& b, int64_t first, int64_t depth, int64_t column, int64_t count,
          Real* panels) {
  constexpr int64_t kPanel = Lanes<Real>::kPanel;
  for (int64_t begin = 0; begin < count; begin += kPanel, panels += depth * kPanel) {
    const T* from = b.data + first * b.row + (column + begin) * b.column;
    const int64_t width = std::min(kPanel, count - begin);
    if (width < kPanel) std::fill(panels, panels + depth * kPanel, Real(0));
    if (b.column == 1) {
      for (int64_t k = 0; k < depth; ++k) load(from + k * b.row, 1, width, panels + k * kPanel);
    } else {
      for (int64_t j = 0; j < width; ++j)
        for (int64_t k = 0; k < depth; ++k) panels[k * kPanel + j] = widened(from[k * b.row + j * b.column]);
    }
  }
}

// A tile of `out` at whose columns a panel ends, or whose columns lie apart: made in memory of its own.
template <int kRows, typename Real>
void add_part(bool first, int64_t depth, const Real* a, int64_t row, int64_t column, const Real* panel,
              int64_t width, Real* out, int64_t out_row, int64_t out_column) {
  constexpr int64_t kPanel = Lanes<Real>::kPanel;
  Real sums[kRows * kPanel];
  for (int i = 0; i < kRows && !first; ++i)
    for (int64_t j = 0; j < kPanel; ++j)
      sums[i * kPanel + j] = j < width ? out[i * out_row + j * out_column] : Real(0);
  add_tile<kRows>(first, depth, a, row, column, panel, sums, kPanel);
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < width; ++j) out[i * out_row + j * out_column] = sums[i * kPanel + j];
}

// Some rows and columns of a matrix as numbers: in `block`, unless they are so already.
template <typename T, typename Real>
MatrixView<const Real> numbers_of(const MatrixView<const T>& matrix, int64_t row, int64_t rows,
                                  int64_t column, int64_t columns, Real* block) {
  const T* from = matrix.data + row * matrix.row + column * matrix.column;
  if constexpr (std::is_same_v<T, Real>) {
    MatrixView<const Real> view(from, rows, columns);
    view.row = matrix.row;
    view.column = matrix.column;
    return view;
  } else {
    for (int64_t i = 0; i < rows; ++i)
      load(from + i * matrix.row, matrix.column, columns, block + i * columns);
    return MatrixView<const Real>(block, rows, columns);
  }
}

// out = a b
template <typename A, typename B, typename Real>
void multiply(const MatrixView<const A>& a, const MatrixView<const B>& b, const MatrixView<Real>& out) {
  // Columns that lie apart are copied one by one: better fewer of them.
  if (b.column != 1 && a.rows < b.columns && a.column == 1)
    return multiply(b.transposed(), a.transposed(), out.transposed());
  constexpr int64_t kPanel = Lanes<Real>::kPanel;
  const int64_t across = (b.columns + kBlockColumns - 1) / kBlockColumns;
  const int64_t tasks = (a.rows + kBlockRows - 1) / kBlockRows * across;
  const int64_t work = std::min(kBlockRows, a.rows) * std::min(kBlockColumns, b.columns) * a.columns;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<Real> panels(std::min(kDepth, a.columns) * kBlockColumns);
    std::vector<Real> block(std::is_same_v<A, Real> ? 0 : kBlockRows * kDepth);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / across * kBlockRows, first = task % across * kBlockColumns;
      const int64_t rows = std::min(a.rows, first_row + kBlockRows);
      const int64_t count = std::min(kBlockColumns, b.columns - first);
      for (int64_t k = 0; k < a.columns; k += kDepth) {
        const int64_t depth = std::min(kDepth, a.columns - k);
        pack(b, k, depth, first, count, panels.data());
        const MatrixView<const Real> own = numbers_of(a, first_row, rows - first_row, k, depth, block.data());
        const auto add = [&](auto tall, int64_t row) {
          const Real* from = own.data + (row - first_row) * own.row;
          for (int64_t j = 0; j < count; j += kPanel) {
            const Real* panel = panels.data() + j * depth;
            Real* to = out.data + row * out.row + (first + j) * out.column;
            if (out.column == 1 && j + kPanel <= count)
              add_tile<tall>(k == 0, depth, from, own.row, own.column, panel, to, out.row);
            else
              add_part<tall>(k == 0, depth, from, own.row, own.column, panel, std::min(kPanel, count - j), to,
                             out.row, out.column);
          }
        };
        int64_t row = first_row;
        for (; row + kTall <= rows; row += kTall) add(std::integral_constant<int, kTall>(), row);
        for (; row < rows; ++row) add(std::integral_constant<int, 1>(), row);
      }
    }
  };
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kProductGrain / work), run);
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal

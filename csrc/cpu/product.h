// Matrix products that the CPU providers make themselves: those so small that calling the library takes
// longer. Each element is a sum in one order, for any number of threads and length of vectors.
#pragma once

#include <cstdint>
#include <utility>

namespace auglocal {

// Multiplications up to which a product is made here; larger ones are left to the library's matmul.
constexpr int64_t kOwnProduct = int64_t(1) << 20;

// Images up to which a product with a classifier's weight is made here however large that is: reading it
// takes most of the time, and the library would read a copy in float32.
constexpr int64_t kFewImages = 32;

// Elements that lie at any strides.
template <typename Real>
struct MatrixView {
  Real* data;
  int64_t rows, columns, row, column;  // sizes, strides

  // Rows that lie one after the other.
  MatrixView(Real* data, int64_t rows, int64_t columns)
      : data(data), rows(rows), columns(columns), row(columns), column(1) {}

  MatrixView transposed() const {
    MatrixView view = *this;
    std::swap(view.rows, view.columns);
    std::swap(view.row, view.column);
    return view;
  }
};

}  // namespace auglocal

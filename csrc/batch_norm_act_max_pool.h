// What batch_norm_act_max_pool adds to the arithmetic of batch_norm_act, for the host and for the device.
#pragma once

#include <cstdint>

#include "batch_norm_act.h"
#include "host_device.h"

namespace auglocal {

// Kernel, stride and padding. Window (oh, ow) covers rows from oh stride_h - padding_h, and columns likewise.
struct PoolWindow {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
};

// The activated value that is compared with others and, where it is the largest, the result: as in torch,
// which pools a map that lies in memory, it has the precision of the map.
template <typename T, typename Real>
AUGLOCAL_HOST_DEVICE Real pooled_value(const Channel<Real>& channel, Real x, Real slope) {
  const Real z = normalised(channel, x);
  return static_cast<Real>(static_cast<T>(activated(z, z, slope)));
}

// Whether a value takes the place of the largest so far: the first of equal ones stays, a NaN always does.
template <typename Real>
AUGLOCAL_HOST_DEVICE bool takes_over(Real value, Real largest) {
  return value > largest || value != value;
}

// The windows that cover a row or a column: from first_window to last_window, none where first > last.
AUGLOCAL_HOST_DEVICE int first_window(int at, int kernel, int stride, int padding) {
  const int behind = at + padding - kernel;
  return behind < 0 ? 0 : behind / stride + 1;
}

AUGLOCAL_HOST_DEVICE int last_window(int at, int stride, int padding, int windows) {
  const int last = (at + padding) / stride;
  return last < windows ? last : windows - 1;
}

}  // namespace auglocal

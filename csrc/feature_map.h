// A feature map seen as (N, C, P), whatever its layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "memory.h"

namespace auglocal {

struct FeatureMap {
  torch::stable::Tensor tensor;  // the memory, kept alive where it is a copy; of any shape
  int64_t images, channels, positions;
  int64_t stride_n, stride_c, stride_p;  // in elements, any value including 0
};

// The memory of x wherever its positions have one common stride, which contiguous and channels-last maps,
// slices of images or channels and expanded ones have; a slice of rows or columns is made contiguous.
inline FeatureMap feature_map(const torch::stable::Tensor& x) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 2, "expected a feature map (N, C, ...), got ", dim, " dimensions");
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t positions = 1;
  const int64_t stride = dim == 2 ? 1 : strides[dim - 1];
  for (int64_t i = dim - 1; i >= 2; --i) {
    if (sizes[i] != 1 && strides[i] != positions * stride) {
      // Calls through the dispatcher cost more than all the rest on the host: only where a copy is needed.
      const torch::stable::Tensor flat = torch::stable::flatten(x, 2, -1);
      return {flat, sizes[0], sizes[1], flat.size(2), flat.stride(0), flat.stride(1), flat.stride(2)};
    }
    positions *= sizes[i];
  }
  return {x, sizes[0], sizes[1], positions, strides[0], strides[1], stride};
}

// Whether the elements lie together in the order (N, *positions, C).
inline bool is_channels_last(const torch::stable::Tensor& x) {
  int64_t expected = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t dim = i == 0 ? 1 : i == x.dim() - 1 ? 0 : x.dim() - i;
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// Whether x lies in memory as a new tensor of its shape does, to the strides of dimensions of one element.
inline bool is_new(const torch::stable::Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

// Memory for a map of x's shape and dtype: channels-last where the channels of x lie together, else
// contiguous. The rule is that of auglocal_ext/ops/layout.py.
inline torch::stable::Tensor empty_map(const torch::stable::Tensor& x) {
  if (is_new(x)) return memory::new_empty(x, x.sizes());
  if (x.is_contiguous() || is_channels_last(x)) return torch::stable::empty_like(x);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  if (x.dim() == 2 || x.stride(1) != 1) return memory::new_empty(x, size);
  size.erase(size.begin() + 1);
  size.push_back(x.size(1));
  torch::stable::Tensor map = memory::new_empty(x, size);
  for (int64_t dim = x.dim() - 2; dim > 0; --dim) map = torch::stable::transpose(map, dim, dim + 1);
  return map;
}

}  // namespace auglocal

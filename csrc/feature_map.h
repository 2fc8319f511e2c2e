// A feature map seen as (N, C, P), whatever its layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace auglocal {

struct FeatureMap {
  torch::stable::Tensor tensor;  // (N, C, P); keeps the memory alive where a copy was needed
  int64_t images, channels, positions;
  int64_t stride_n, stride_c, stride_p;  // in elements, any value including 0
};

// A view wherever the positions have one common stride, which contiguous and channels-last maps, slices of
// images or channels and expanded ones have; a slice of rows or columns is made contiguous.
inline FeatureMap feature_map(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "expected a feature map (N, C, ...), got ", x.dim(), " dimensions");
  torch::stable::Tensor flat =
      x.dim() == 2 ? torch::stable::unsqueeze(x, 2) : torch::stable::flatten(x, 2, -1);
  return {flat, flat.size(0), flat.size(1), flat.size(2), flat.stride(0), flat.stride(1), flat.stride(2)};
}

}  // namespace auglocal

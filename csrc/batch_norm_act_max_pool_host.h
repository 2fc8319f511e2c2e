// What the cpu and the cuda provider of batch_norm_act_max_pool share on the host: arguments, checks and
// outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "batch_norm_act_host.h"
#include "batch_norm_act_max_pool.h"

namespace auglocal {

struct Strides {
  int64_t n, c, h, w;  // in elements, any value including 0
};

inline Strides strides_of(const Tensor& map) {
  return {map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

struct MaxPoolProblem {
  Tensor x;                         // (N, C, H, W)
  Tensor mean, rstd, weight, bias;  // (C,) in the accumulation dtype; weight and bias may be undefined
  double slope;
  PoolWindow window;
  int64_t images, channels;
  int height, width, pooled_height, pooled_width;
  bool channels_last;  // how the results lie in memory

  int64_t count() const { return images * height * width; }

  Tensor empty_pooled(ScalarType dtype) const {
    if (!channels_last) return memory::new_empty(x, {images, channels, pooled_height, pooled_width}, dtype);
    Tensor map = memory::new_empty(x, {images, pooled_height, pooled_width, channels}, dtype);
    return torch::stable::transpose(torch::stable::transpose(map, 2, 3), 1, 2);
  }

  void check_pooled(const Tensor& map, ScalarType dtype, const char* name) const {
    STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == images && map.size(1) == channels &&
                        map.size(2) == pooled_height && map.size(3) == pooled_width &&
                        map.scalar_type() == dtype,
                    "expected ", name, " of the shape and the dtype that the forward pass returned");
  }
};

inline int narrow(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < std::numeric_limits<int>::max() / 4, "expected ", name,
                  " that fits into 29 bits, got ", value);
  return static_cast<int>(value);
}

inline MaxPoolProblem make_max_pool_problem(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                            const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, double slope, int64_t kernel_h,
                                            int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                            int64_t padding_h, int64_t padding_w) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "expected a feature map (N, C, H, W) with elements");
  STD_TORCH_CHECK(
      kernel_h > 0 && kernel_w > 0 && kernel_h * kernel_w <= 256 && stride_h > 0 && stride_w > 0 &&
          padding_h >= 0 && padding_w >= 0 && 2 * padding_h <= kernel_h && 2 * padding_w <= kernel_w &&
          x.size(2) + 2 * padding_h >= kernel_h && x.size(3) + 2 * padding_w >= kernel_w,
      "expected a window of at most 256 elements, padded by at most half of it and no larger than "
      "the padded map");
  const PoolWindow window{static_cast<int>(kernel_h),  static_cast<int>(kernel_w),
                          narrow(stride_h, "stride"),  narrow(stride_w, "stride"),
                          static_cast<int>(padding_h), static_cast<int>(padding_w)};
  const int height = narrow(x.size(2), "a height"), width = narrow(x.size(3), "a width");
  return {x,
          vector(mean, x, "mean"),
          vector(rstd, x, "rstd"),
          vector(weight, x, "weight"),
          vector(bias, x, "bias"),
          slope,
          window,
          x.size(0),
          x.size(1),
          height,
          width,
          (height + 2 * window.padding_h - window.kernel_h) / window.stride_h + 1,
          (width + 2 * window.padding_w - window.kernel_w) / window.stride_w + 1,
          x.stride(1) == 1 && !x.is_contiguous()};
}

}  // namespace auglocal

// What the cpu and the cuda provider of reconstruction_loss share on the host: arguments, checks and outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

#include "feature_map.h"
#include "reconstruction_loss.h"

namespace auglocal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct ReconstructionProblem {
  FeatureMap logits, image;
  Tensor mean, std;  // (C,) in the accumulation dtype
  Tensor loss;       // (), in the accumulation dtype
  Tensor grad;       // as logits, dense; no elements where it is not needed
  DenseOrder order;  // of grad

  int64_t count() const { return logits.images * order.outer * order.inner; }

  OrderedStrides strides(const FeatureMap& map) const {
    return order.channels_last ? OrderedStrides{map.stride_n, map.stride_p, map.stride_c}
                               : OrderedStrides{map.stride_n, map.stride_c, map.stride_p};
  }

  // Whether the elements of a map lie one after the other in the order.
  bool dense(const FeatureMap& map) const {
    const OrderedStrides step = strides(map);
    return (order.inner == 1 || step.inner == 1) && (order.outer == 1 || step.outer == order.inner) &&
           (map.images == 1 || step.n == order.outer * order.inner);
  }
};

inline ReconstructionProblem make_problem(const Tensor& logits, const Tensor& image, const Tensor& mean,
                                          const Tensor& std, bool need_grad) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, "expected logits (N, C, H, W) with elements");
  STD_TORCH_CHECK(image.dim() == 4 && image.size(0) == logits.size(0) && image.size(1) == logits.size(1) &&
                      image.size(2) == logits.size(2) && image.size(3) == logits.size(3),
                  "expected image in the shape of logits");
  for (const Tensor* values : {&mean, &std})
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == logits.size(1),
                    "expected mean and std (C,) for ", logits.size(1), " channels");
  const ScalarType accumulate =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const FeatureMap map = feature_map(logits);
  const bool channels_last = !logits.is_contiguous() && logits.stride(1) == 1;
  return {map,
          feature_map(image),
          torch::stable::contiguous(torch::stable::to(mean, accumulate)),
          torch::stable::contiguous(torch::stable::to(std, accumulate)),
          torch::stable::new_empty(logits, {}, accumulate),
          need_grad ? empty_map(logits) : torch::stable::new_empty(logits, {0}),
          channels_last ? DenseOrder{map.positions, map.channels, true}
                        : DenseOrder{map.channels, map.positions, false}};
}

}  // namespace auglocal

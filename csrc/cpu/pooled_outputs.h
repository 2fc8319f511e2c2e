// The op pooled_cross_entropy, for another that is made of it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../pooled_cross_entropy_host.h"

namespace auglocal {

Outputs pooled_cross_entropy(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target,
                             int64_t ignore_index, double smoothing, bool mean, bool need_x, bool need_weight,
                             bool need_bias);

}  // namespace auglocal

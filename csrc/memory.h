// Memory for results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>

namespace auglocal::memory {

// Memory on the device of `like`, of its dtype where none is given. torch::stable::new_empty looks the op up
// by its name, which takes the host several times as long.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like,
                                       torch::headeronly::IntHeaderOnlyArrayRef size,
                                       std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int32_t code = 0;
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.data(), static_cast<int64_t>(size.size()),
                                                   dtype ? &code : nullptr, nullptr, nullptr, 0, nullptr,
                                                   &made));
  return torch::stable::Tensor(made);
}

// `tensor`, contiguous and of the dtype: itself where it is.
inline torch::stable::Tensor packed(const torch::stable::Tensor& tensor,
                                    torch::headeronly::ScalarType dtype) {
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

}  // namespace auglocal::memory

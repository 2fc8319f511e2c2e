// Memory for results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace auglocal::memory {

// Memory on the device of `like`, of its dtype where none is given. torch::stable::new_empty looks the op up
// by its name, and any op goes through the dispatcher: the host can do with a fraction of either's time.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like,
                                       torch::headeronly::IntHeaderOnlyArrayRef size,
                                       std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int32_t code = 0;
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  const auto dimensions = static_cast<int64_t>(size.size());
  constexpr int64_t kMost = 8;
  AtenTensorHandle made = nullptr;
  if (like.is_cpu() && dimensions <= kMost) {
    if (!dtype) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
    int64_t strides[kMost], stride = 1;
    for (int64_t i = dimensions; i-- > 0;) {
      strides[i] = stride;
      stride *= std::max<int64_t>(size[i], 1);
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, size.data(), strides, code,
                                                    aoti_torch_device_type_cpu(), 0, &made));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
        like.get(), size.data(), dimensions, dtype ? &code : nullptr, nullptr, nullptr, 0, nullptr, &made));
  }
  return torch::stable::Tensor(made);
}

// `tensor`, contiguous and of the dtype: itself where it is.
inline torch::stable::Tensor packed(const torch::stable::Tensor& tensor,
                                    torch::headeronly::ScalarType dtype) {
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

}  // namespace auglocal::memory

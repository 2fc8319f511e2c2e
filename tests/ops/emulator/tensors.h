// What an op makes on the host: memory that nobody has written, and results that every byte of must be.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

namespace emulator {

using torch::stable::Tensor;

inline Tensor made_empty(Tensor tensor, const Where& where) {
  if (tensor.numel() > 0)
    made_empty(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size(), where);
  return tensor;
}

inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                        std::optional<torch::headeronly::ScalarType> dtype = std::nullopt,
                        const Where& where = Where::current()) {
  return made_empty(torch::stable::new_empty(like, size, dtype), where);
}

inline Tensor empty_like(const Tensor& like, const Where& where = Where::current()) {
  return made_empty(torch::stable::empty_like(like), where);
}

// A string as an argument of a template.
template <size_t kSize>
struct Name {
  char text[kSize];
  constexpr Name(const char (&from)[kSize]) { std::copy(from, from + kSize, text); }
};

// An op whose results are checked, as a function of the same type. They lie densely in memory of their own,
// so the bytes from the first element on are all theirs.
template <Name kName, auto kFunction>
struct Op;

template <Name kName, typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Op<kName, kFunction> {
  static Result call(Arguments... arguments) {
    Result result = kFunction(std::move(arguments)...);
    int index = 0;
    if constexpr (std::is_same_v<Result, Tensor>) check(result, index);
    else std::apply([&](const auto&... tensors) { (check(tensors, index), ...); }, result);
    return result;
  }

 private:
  static void check(const Tensor& tensor, int& index) {
    if (tensor.defined() && tensor.numel() > 0)
      check_result(kName.text, index, tensor.const_data_ptr(), tensor.numel() * tensor.element_size());
    ++index;
  }
};

}  // namespace emulator

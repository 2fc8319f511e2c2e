// Forms of calls: of each argument that is a tensor dtype, device, sizes and strides, of any other its value.
#pragma once

#include <ATen/core/TensorBase.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <unordered_map>
#include <vector>

namespace auglocal {

class Forms {
 public:
  using Form = std::vector<int64_t>;

  // The form of a call; none of one with an argument whose form says too little: a tensor of another class
  // than torch's own or without strides, and what is no number or text.
  static bool describe(PyObject* const* arguments, Py_ssize_t count, Form& form) {
    form.clear();
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!add(arguments[i], form)) return false;
    return true;
  }

  std::optional<int64_t> find(const Form& form) const {
    const auto found = numbers_.find(form);
    return found == numbers_.end() ? std::nullopt : std::optional<int64_t>(found->second);
  }

  // Of varying shapes only so many.
  void remember(const Form& form, int64_t number) {
    constexpr size_t kMost = 4096;
    if (numbers_.size() >= kMost) numbers_.clear();
    numbers_[form] = number;
  }

 private:
  enum Kind : int64_t { kNone, kTensor, kBool, kFloat, kInteger, kText };

  struct Hash {
    size_t operator()(const Form& form) const {
      uint64_t hash = 14695981039346656037u;
      for (const int64_t word : form) {
        hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211u;
        hash ^= hash >> 32;
      }
      return hash;
    }
  };

  static bool add(PyObject* object, Form& form) {
    if (object == Py_None) {
      form.push_back(kNone);
    } else if (THPVariable_CheckExact(object)) {
      return add(THPVariable_Unpack(object), form);
    } else if (PyBool_Check(object)) {
      form.insert(form.end(), {kBool, object == Py_True});
    } else if (PyFloat_CheckExact(object)) {
      const double value = PyFloat_AS_DOUBLE(object);
      int64_t bits;
      static_assert(sizeof(bits) == sizeof(value));
      std::memcpy(&bits, &value, sizeof(value));
      form.insert(form.end(), {kFloat, bits});
    } else if (PyLong_CheckExact(object)) {
      int overflow = 0;
      const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
      if (overflow) return false;
      form.insert(form.end(), {kInteger, value});
    } else if (PyUnicode_CheckExact(object)) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(object, &size);
      if (!text) PyErr_Clear();
      return text && add(text, size, form);
    } else if (PyBytes_CheckExact(object)) {
      return add(PyBytes_AS_STRING(object), PyBytes_GET_SIZE(object), form);
    } else {
      return false;
    }
    return true;
  }

  static bool add(const at::TensorBase& tensor, Form& form) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (!tensor.defined() || tensor.is_nested() || tensor.layout() != c10::kStrided ||
        impl->has_symbolic_sizes_strides())
      return false;
    const c10::Device device = tensor.device();
    form.insert(form.end(), {kTensor, static_cast<int64_t>(tensor.scalar_type()),
                             static_cast<int64_t>(device.type()), device.index(), tensor.dim()});
    form.insert(form.end(), tensor.sizes().begin(), tensor.sizes().end());
    form.insert(form.end(), tensor.strides().begin(), tensor.strides().end());
    return true;
  }

  static bool add(const char* text, Py_ssize_t size, Form& form) {
    form.insert(form.end(), {kText, size});
    for (Py_ssize_t i = 0; i < size; ++i) form.push_back(text[i]);
    return true;
  }

  std::unordered_map<Form, int64_t, Hash> numbers_;
};

}  // namespace auglocal

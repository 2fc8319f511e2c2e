// Autograd nodes of ops whose backward pass is one call of another op, or scales what the forward pass made,
// without Python. The kernels are those of the dispatcher. This library needs torch's C++ interface, which
// the stable ABI lacks: it fits one version of torch and one of Python. `auglocal_ext/ops/nodes.py` describes
// the ops, and has nodes in Python for everything else.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <bitset>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "forms.h"

namespace auglocal {
namespace {

using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;
using Bits = std::bitset<64>;  // one for each input

// Where an argument of the backward op comes from.
enum class From : int64_t { kGradient, kInput, kResult, kNeeds, kFixed };

struct Argument {
  From from;
  int64_t place;  // of the gradient, the input or the result; for kNeeds the inputs, a bit each
  IValue fixed;
};

// The gradient of an input: a result of the backward op or, passed on, the gradient of a result. Without a
// backward op, the argument of that place, scaled.
struct Gradient {
  int64_t input, place;
  bool passed;
};

struct Recipe {
  c10::OperatorHandle forward;
  std::optional<c10::OperatorHandle> backward;
  size_t inputs;             // that forward takes, of those that are given
  size_t incoming, results;  // with gradients; that the caller gets
  std::vector<Argument> arguments;
  std::vector<Gradient> gradients;  // in the order of the inputs
  std::vector<Gradient> alone;      // where the first result has no gradient
  std::string refusal;              // of second derivatives
};

// By number. Each is there before its number is known, and stays: backward passes read it in threads of their
// own.
std::array<std::unique_ptr<const Recipe>, 256> recipes;
size_t defined = 0;

// What the forward pass made, times the gradient of the loss: itself where that is 1 and no second backward
// pass will read what callers may write to. Whatever records operators is not to see one that depends on a
// value.
at::Tensor scaled(const at::Tensor& made, const at::Tensor& factor) {
  const c10::DispatchKeySet unreadable{c10::DispatchKey::Python, c10::DispatchKey::Batched,
                                       c10::DispatchKey::FuncTorchBatched};
  const bool readable = factor.is_cpu() && !factor.key_set().has_any(unreadable) &&
                        !c10::impl::TorchDispatchModeTLS::any_modes_set();
  if (readable && !torch::autograd::get_current_graph_task_keep_graph() && factor.item<double>() == 1)
    return made;
  return at::mul(factor, made);
}

// `gradient` with as many dimensions as the input, expanded over the last ones.
at::Tensor expanded(const at::Tensor& gradient, at::IntArrayRef shape) {
  std::vector<int64_t> view(gradient.sizes().begin(), gradient.sizes().end());
  view.resize(shape.size(), 1);
  return gradient.reshape(view).expand(shape);
}

// The key in `saved_data` of a call: the number of its recipe, which differentiable inputs are tensors, and
// for each input and result that the backward op takes whether it is a saved tensor, or else its value.
// Without a backward op, dtype and shape of each input that has a gradient in place of the latter.
constexpr const char* kCall = "call";

struct Recorded : torch::autograd::Function<Recorded> {
  static variable_list forward(AutogradContext* context, int64_t number, const Stack& inputs,
                               at::TensorList differentiable) {
    const Recipe& recipe = *recipes[number];
    Stack results(inputs.begin(), inputs.begin() + static_cast<int64_t>(recipe.inputs));
    {
      const at::AutoDispatchBelowAutograd guard;
      recipe.forward.callBoxed(&results);
    }
    Bits tensors;
    for (const Gradient& each : recipe.gradients) tensors[each.input] = inputs[each.input].isTensor();
    std::vector<IValue> call{number, static_cast<int64_t>(tensors.to_ullong())};
    variable_list saved;
    for (const Argument& argument : recipe.arguments) {
      if (argument.from != From::kInput && argument.from != From::kResult) continue;
      const IValue& value = (argument.from == From::kInput ? inputs : results)[argument.place];
      if (recipe.backward) call.emplace_back(value.isTensor());
      if (value.isTensor()) saved.push_back(value.toTensor());
      else call.push_back(value);
    }
    if (!recipe.backward)
      for (const Gradient& each : recipe.gradients) {
        const at::Tensor input = tensors[each.input] ? inputs[each.input].toTensor() : at::Tensor();
        call.push_back(input.defined() ? IValue(input.scalar_type()) : IValue());
        call.push_back(input.defined() ? IValue(input.sizes().vec()) : IValue());
      }
    context->set_materialize_grads(false);
    context->save_for_backward(std::move(saved));
    context->saved_data.emplace(kCall, c10::ivalue::Tuple::create(std::move(call)));
    variable_list made = returned(recipe, results);
    context->mark_non_differentiable({made.begin() + static_cast<int64_t>(recipe.incoming), made.end()});
    return made;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto& call = context->saved_data.at(kCall).toTupleRef().elements();
    const Recipe& recipe = *recipes[call[0].toInt()];
    if (at::GradMode::is_enabled()) throw std::runtime_error(recipe.refusal);
    const Bits tensors(static_cast<uint64_t>(call[1].toInt()));
    // Autograd knows the inputs that are tensors, in their order.
    const auto edge = [&](int64_t input) { return (tensors << (tensors.size() - input)).count(); };
    const auto needed = [&](int64_t input) {
      return tensors[input] && context->needs_input_grad(edge(input));
    };
    variable_list made(kBefore + tensors.count());
    const auto set = [&](const Gradient& each, const Stack& results) {
      if (!needed(each.input)) return;
      made[kBefore + edge(each.input)] = each.passed ? gradients[each.place] : results[each.place].toTensor();
    };
    Stack stack;
    if (!gradients[0].defined()) {
      for (const Gradient& each : recipe.alone) set(each, stack);
      return made;
    }
    const variable_list saved = context->get_saved_variables();
    size_t kept = 2;
    if (!recipe.backward) {
      const at::AutoDispatchBelowAutograd guard;
      for (const Gradient& each : recipe.gradients) {
        const IValue &dtype = call[kept++], &shape = call[kept++];
        if (!needed(each.input)) continue;
        const at::Tensor& gradient = saved[each.place];
        if (!gradient.numel())
          throw std::runtime_error("the gradient of input " + std::to_string(each.input) +
                                   " was not made; set the need_* argument for it");
        // Scaled before it is rounded, so that a loss scale keeps a float16 gradient from underflowing.
        at::Tensor& to = made[kBefore + edge(each.input)];
        to = scaled(gradient, gradients[0]).to(dtype.toScalarType());
        const std::vector<int64_t> sizes = shape.toIntVector();
        if (to.sizes() != at::IntArrayRef(sizes)) to = expanded(to, sizes);
      }
      return made;
    }
    auto tensor = saved.begin();
    for (const Argument& argument : recipe.arguments) {
      switch (argument.from) {
        case From::kGradient: {
          const at::Tensor& gradient = gradients[argument.place];
          stack.push_back(gradient.defined() ? IValue(gradient) : IValue());
          break;
        }
        case From::kInput:
        case From::kResult:
          if (call[kept++].toBool()) stack.emplace_back(*tensor++);
          else stack.push_back(call[kept++]);
          break;
        case From::kNeeds: {
          const Bits inputs(static_cast<uint64_t>(argument.place));
          bool any = false;
          for (size_t input = 0; input < inputs.size(); ++input) any |= inputs[input] && needed(input);
          stack.emplace_back(any);
          break;
        }
        case From::kFixed:
          stack.push_back(argument.fixed);
      }
    }
    {
      const at::AutoDispatchBelowAutograd guard;
      recipe.backward->callBoxed(&stack);
    }
    for (const Gradient& each : recipe.gradients) set(each, stack);
    return made;
  }

  // What the caller gets of all results.
  static variable_list returned(const Recipe& recipe, const Stack& results) {
    variable_list made;
    for (size_t i = 0; i < recipe.results; ++i) made.push_back(results[i].toTensor());
    return made;
  }

 private:
  static constexpr size_t kBefore = 2;  // arguments of `forward` before the tensors
};

std::optional<IValue> value_of(PyObject* object) {
  if (object == Py_None) return IValue();
  if (THPVariable_CheckExact(object)) return IValue(THPVariable_Unpack(object));
  if (PyBool_Check(object)) return IValue(object == Py_True);
  if (THPDtype_Check(object))
    return IValue(static_cast<int64_t>(reinterpret_cast<THPDtype*>(object)->scalar_type));
  if (PyFloat_CheckExact(object)) return IValue(PyFloat_AS_DOUBLE(object));
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow ? std::nullopt : std::optional<IValue>(value);
}

PyObject* run_recipe(int64_t number, PyObject* const* given, Py_ssize_t count) {
  TORCH_CHECK(0 <= number && static_cast<size_t>(number) < defined, "no recipe ", number);
  const Recipe& recipe = *recipes[number];
  TORCH_CHECK(static_cast<size_t>(count) >= recipe.inputs, "expected at least ", recipe.inputs, " inputs");
  if (torch::jit::tracer::isTracing()) Py_RETURN_NONE;
  Stack inputs;
  for (Py_ssize_t i = 0; i < count; ++i) {
    std::optional<IValue> value = value_of(given[i]);
    if (!value) Py_RETURN_NONE;
    inputs.push_back(*std::move(value));
  }
  variable_list results, differentiable;
  for (const Gradient& each : recipe.gradients)
    if (inputs[each.input].isTensor()) differentiable.push_back(inputs[each.input].toTensor());
  {
    const pybind11::gil_scoped_release without_python;
    if (at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(differentiable)) {
      results = Recorded::apply(number, inputs, at::TensorList(differentiable));
    } else {
      const at::AutoDispatchBelowAutograd guard;
      inputs.resize(recipe.inputs);
      recipe.forward.callBoxed(&inputs);
      results = Recorded::returned(recipe, inputs);
    }
  }
  if (results.size() == 1) return THPVariable_Wrap(std::move(results[0]));
  auto made =
      pybind11::reinterpret_steal<pybind11::object>(PyTuple_New(static_cast<Py_ssize_t>(results.size())));
  for (size_t i = 0; i < results.size(); ++i)
    PyTuple_SET_ITEM(made.ptr(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(results[i])));
  return made.release().ptr();
}

// run(number, *inputs) -> a tensor, or a tuple of several. None, and nothing done, where an input is of
// another class than torch's own and where calls are traced.
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count > 0, "expected the number of a recipe");
  return run_recipe(PyLong_AsLongLong(arguments[0]), arguments + 1, count - 1);
  END_HANDLE_TH_ERRORS
}

// The forms of calls that have been checked, and the recipe of each. Read and written under Python's lock.
Forms forms;

// The arguments of such a call before its inputs: the op, and what the choice of a provider depends on.
constexpr Py_ssize_t kSettings = 4;

// again(op, *settings, *inputs) -> as run, or None where no such call has been remembered.
PyObject* again(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static Forms::Form form;
  if (!Forms::describe(arguments, count, form)) Py_RETURN_NONE;
  const std::optional<int64_t> number = forms.find(form);
  if (!number) Py_RETURN_NONE;
  return run_recipe(*number, arguments + kSettings, count - kSettings);
  END_HANDLE_TH_ERRORS
}

// remember(number, call): again(*call) is run(number, *inputs) from now on.
void remember(int64_t number, const std::vector<pybind11::object>& call) {
  std::vector<PyObject*> arguments;
  for (const pybind11::object& each : call) arguments.push_back(each.ptr());
  TORCH_CHECK(call.size() >= kSettings, "expected op and settings");
  Forms::Form form;
  if (Forms::describe(arguments.data(), static_cast<Py_ssize_t>(arguments.size()), form))
    forms.remember(form, number);
}

using Name = std::pair<std::string, std::string>;  // of an op and its overload
using Passed = std::vector<std::tuple<int64_t, int64_t, bool>>;

// Makes a recipe known, and returns its number.
int64_t define(const Name& forward, const std::optional<Name>& backward, size_t inputs, size_t incoming,
               size_t results, const std::vector<std::tuple<int64_t, int64_t, pybind11::object>>& arguments,
               const Passed& gradients, const Passed& alone, const std::string& refusal) {
  const auto op = [](const Name& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.first.c_str(), name.second.c_str());
  };
  Recipe recipe{op(forward), std::nullopt, inputs, incoming, results, {}, {}, {}, refusal};
  if (backward) recipe.backward = op(*backward);
  for (const auto& [from, place, fixed] : arguments)
    recipe.arguments.push_back({static_cast<From>(from), place, value_of(fixed.ptr()).value()});
  for (const auto& [input, place, passed] : gradients) recipe.gradients.push_back({input, place, passed});
  for (const auto& [input, place, passed] : alone) recipe.alone.push_back({input, place, passed});
  recipes.at(defined) = std::make_unique<const Recipe>(std::move(recipe));
  return static_cast<int64_t>(defined++);
}

template <auto function>
PyMethodDef method = {"", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                      METH_FASTCALL, nullptr};

template <auto function>
pybind11::object callable() {
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method<function>, nullptr));
}

}  // namespace
}  // namespace auglocal

PYBIND11_MODULE(_C_nodes, module) {
  module.def("define", &auglocal::define);
  module.def("remember", &auglocal::remember);
  module.attr("run") = auglocal::callable<&auglocal::run>();
  module.attr("again") = auglocal::callable<&auglocal::again>();
}

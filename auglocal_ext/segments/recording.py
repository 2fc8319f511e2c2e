"""A dry run of a model: which submodules it calls, what they return, and which values are used after them.

The model's own ``forward`` runs on fake tensors, on a copy without data, with two batch sizes, so that every size is
known as ``a + b N``. A dispatch mode notes each operator. A tensor is *data* if the model's input, or a random number,
went into it. Position numbers, masks and tables that depend on no input are not data: a segment makes them itself.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.flop_counter import flop_registry

from .._torch import (
    COMPILED_CALL,
    FakeTensorMode,
    TorchDispatchMode,
    detect_fake_mode,
    plain_call,
    schema,
    storage_id,
    tree_flatten,
    tree_unflatten,
    written_tensors,
)
from .calls import Call, Form, Linear, Operator, Recording

_BATCHES = (2, 3)
_CHECKPOINT = CheckpointFunction.forward.__code__.co_filename
_DEVICE_QUERY = torch.ops.prim.device.default
#: What a skipped call may return beside tensors.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


class _Trace(TorchDispatchMode):
    """Numbers every tensor of a run and notes its operators."""

    def __init__(self, own: dict[int, str]) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.data: set[int] = set()
        self.caller = ""
        self.marking = False
        self._own = own
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._sources: dict[int, frozenset[str]] = {}
        self._shared: dict[int, list[int]] = {}  # by storage, the tensors over it

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
            if (storage := _storage(tensor)) is not None:
                self._shared.setdefault(storage, []).append(self._numbers[id(tensor)])
        return self._numbers[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is _DEVICE_QUERY:
            return out
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        own = frozenset(self._own[id(each)] for each in inputs if id(each) in self._own)
        taken = [self.number(each) for each in inputs if id(each) not in self._own]
        made = [each for each in tree_flatten(out)[0] if isinstance(each, Tensor) and id(each) not in self._own]
        numbers = [self.number(each) for each in made]
        writes: frozenset[str] = frozenset()
        if schema(func).is_mutable:  # a write is seen by every tensor over the same memory
            written = list(written_tensors(func, args, kwargs))
            writes = frozenset(self._own[id(each)] for each in written if id(each) in self._own)
            for each in (*made, *written):
                if id(each) not in self._own and (storage := _storage(each)) is not None:
                    numbers += self._shared.get(storage, [])
        meets = own.union(*(self._sources.get(number, frozenset()) for number in taken))
        random = torch.Tag.nondeterministic_seeded in func.tags
        data = random or any(number in self.data for number in taken)
        if data:
            self.data.update(numbers)
        else:
            for number in numbers:
                self._sources[number] = meets | self._sources.get(number, frozenset())
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        self.operators.append(
            Operator(
                schema(func).name.partition("::")[2],
                tuple(dict.fromkeys(taken)),
                tuple(dict.fromkeys(numbers)),
                own,
                meets if data else frozenset(),
                data,
                self.caller,
                0 if formula is None else int(formula(*args, **kwargs, out_val=out)),
                writes,
                self.marking,
                random,
            )
        )
        return out


def _storage(tensor: Tensor) -> int | None:
    try:
        return storage_id(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse
        return None


class _Calls:
    """Notes the calls of a model's submodules while it runs."""

    def __init__(self, model: nn.Module, trace: _Trace) -> None:
        self._trace = trace
        self._counts: dict[str, int] = {}
        self._now: Call | None = None
        self._first: dict[int, int] = {}  # for what a call returned, the number before the call returned it
        self.root: Call | None = None
        for name, module in model.named_modules():
            module.__dict__[COMPILED_CALL] = self._noting(name, module)

    def _noting(self, name: str, module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outer, trace = self._now, self._trace
            nth = self._counts.get(name, 0)
            self._counts[name] = nth + 1
            this = Call(name, nth, outer, len(trace.operators), checkpointed=_checkpointed())
            taken = _one_tensor(module, args, kwargs)
            this.takes = -1 if taken is None else self._before(taken)
            self._now, trace.caller = this, name
            buffers = dict(module._buffers)
            try:
                out = self._end(this, plain_call(module)(*args, **kwargs))
                this.assigns = tuple(key for key, each in module._buffers.items() if buffers.get(key) is not each)
                return out
            finally:
                self._now, trace.caller = outer, "" if outer is None else outer.name

        return call

    def _end(self, call: Call, out: Any) -> Any:
        leaves, call.spec = tree_flatten(out)
        call.gives = [self._before(leaf) if isinstance(leaf, Tensor) else -1 for leaf in leaves]
        self._trace.caller, self._trace.marking = call.name, True
        # A fresh tensor, so that a module that returns its input is told apart from that input.
        leaves = [torch.ops.aten.alias(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._trace.marking = False
        call.end = len(self._trace.operators)
        call.leaves = leaves
        call.outputs = [self._trace.number(leaf) if isinstance(leaf, Tensor) else -1 for leaf in leaves]
        self._first.update(zip(call.outputs, call.gives, strict=True))
        tensors = [number for number in call.outputs if number >= 0]
        call.data = not tensors or any(number in self._trace.data for number in tensors)
        odd = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
        call.opaque = f"a {type(odd[0]).__name__}" if odd else ""
        if call.parent is None:
            self.root = call
        else:
            call.parent.children.append(call)
        return tree_unflatten(leaves, call.spec)

    def _before(self, tensor: Tensor) -> int:
        number = self._trace.number(tensor)
        return self._first.get(number, number)


def _one_tensor(module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor with which ``module(tensor)`` is the same call; None where there is none."""
    try:
        signature = inspect.signature(module.forward)
        (name, first), *others = signature.bind(*args, **kwargs).arguments.items()
    except (TypeError, ValueError):
        return None
    if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL and len(first) == 1:
        first = first[0]
    defaults = ((value, signature.parameters[name].default) for name, value in others)
    same = all(value is default or (isinstance(value, _PLAIN) and value == default) for value, default in defaults)
    return first if isinstance(first, Tensor) and same else None


def _checkpointed() -> str:
    """Whether ``torch.utils.checkpoint`` runs the call, between it and the call around it."""
    frame = sys._getframe(2)  # nn.Module's __call__
    depth = 0
    while frame is not None and frame.f_code.co_filename != __file__:
        if frame.f_code.co_filename == _CHECKPOINT:
            if frame.f_code.co_name == "forward":  # of the autograd function
                return "reentrant"
            return "alone" if depth == 1 else "with others"
        frame = frame.f_back  # type: ignore[assignment]
        depth += 1
    return "no"


def _fake_tensors(model: nn.Module) -> dict[int, Tensor]:
    """By ``id``, a fake tensor of the same form for each that the model holds; to be made under a fake tensor mode."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # and what is neither, but hangs on a module
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): _fake(tensor) for tensor in found}


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


@contextmanager
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def record(model: nn.Module, example: Tensor, training: bool, output: str | int | None) -> Recording:
    """What ``model`` does with a batch like ``example`` ``(1, ...)``, in training or in eval mode.

    Raises:
        ValueError: if the model does not run on fake tensors, does other things for another batch size, or returns
            nothing that ``output`` picks.
    """
    runs = [_run(model, example, training, batch, output) for batch in _BATCHES]
    (first, _), (second, _) = runs
    calls = [[run.root, *run.root.walk()] for run in (first, second)]
    if [call.key for call in calls[0]] != [call.key for call in calls[1]]:
        raise ValueError(f"{type(model).__name__} calls other modules for another batch size")
    for one, two in zip(*calls, strict=True):
        pairs = list(zip(one.leaves, two.leaves, strict=True))
        one.leaves = [_form(a, b) for a, b in pairs]
        changing = [a for a, b in pairs if isinstance(a, (bool, float, complex, str)) and a != b]
        if changing:
            one.opaque = one.opaque or f"a {type(changing[0]).__name__} that differs from call to call"
    first.input = _form(runs[0][1], runs[1][1])
    return first


def _form(one: Any, two: Any) -> Any:
    """What a leaf is for any batch size, by its two values."""
    if isinstance(one, Tensor):
        sizes = tuple(map(_linear, one.shape, two.shape))
        return Form(sizes, tuple(map(_linear, one.stride(), two.stride())), one.dtype)
    if type(one) is int and one != two:
        return _linear(one, two)
    return one


def _linear(one: int, two: int) -> Linear:
    each = (int(two) - int(one)) // (_BATCHES[1] - _BATCHES[0])
    return Linear(int(one) - each * _BATCHES[0], each)


def _run(
    model: nn.Module, example: Tensor, training: bool, batch: int, output: str | int | None
) -> tuple[Recording, Tensor]:
    mode = detect_fake_mode(list(model.parameters())) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), _uncompiled():
        copied = copy.deepcopy(model, dict(_fake_tensors(model)))
        if training != copied.training:
            copied.train(training)
        named = (*copied.named_parameters(), *copied.named_buffers())
        trace = _Trace({id(tensor): name for name, tensor in named})
        calls = _Calls(copied, trace)
        x = torch.empty(batch, *example.shape[1:], dtype=example.dtype, device=example.device)
        trace.data.add(trace.number(x))
        try:
            with trace, sdpa_kernel(SDPBackend.MATH):  # of which every product is counted
                out = copied(x)
        except Exception as error:
            raise ValueError(
                f"a dry run of {type(model).__name__} on fake tensors of shape {tuple(x.shape)} in {x.dtype}, in "
                f"{'training' if training else 'eval'} mode, failed: {type(error).__name__}: {error}"
            ) from error
        picked = picked_output(out, output)
        assert calls.root is not None
        form = Form((), (), x.dtype)
        return Recording(calls.root, trace.operators, trace.data, trace.number(picked), form), x


def picked_output(out: Any, output: str | int | None) -> Tensor:
    """The tensor that is learned from: what a model returns, or what ``output`` picks of it.

    Raises:
        ValueError: where that is no tensor.
    """
    if isinstance(out, Tensor):
        return out
    found = None
    if isinstance(output, str):
        found = out.get(output) if isinstance(out, dict) else getattr(out, output, None)
    elif isinstance(output, int) and isinstance(out, (tuple, list)) and -len(out) <= output < len(out):
        found = out[output]
    if not isinstance(found, Tensor):
        fields = list(out) if isinstance(out, dict) else getattr(out, "_fields", range(len(out or ())))
        raise ValueError(
            f"the model returns {type(out).__name__}, of which output={output!r} is no tensor: say what is learned "
            f"from, such as output={next(iter(fields), 'logits')!r}"
        )
    return found

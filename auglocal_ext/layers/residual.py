"""Residual blocks recognised by what they compute, whatever their class and parts are called.

While a network runs on an example, a dispatch mode records which operators made a block's output, as an expression.
The block is a basic one or a bottleneck if that expression is ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`` or
its form with three convolutions. The shortcut is x, at most one convolution of x, or x with its sizes made to fit.
Class names do not matter, functional activations are recognised, and tensors without data are enough. A part that
does nothing in eval mode only (dropout, stochastic depth) makes it another form, because it acts in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import BatchNormBase, TorchDispatchMode, schema, storage_id

#: The value of a tensor, as far as the forms below need it: its input "x", or an operator's name, what it was made of,
#: and for a convolution its form.
Expression = tuple[Any, ...]
_X: Expression = ("x",)
_SAME_VALUE = ("alias", "clone", "_to_copy")
_ZEROS = ("zeros", "zeros_like", "new_zeros")
#: What a shortcut may do to the input besides nothing: a projection, and sizes and channels made to fit.
_SHORTCUT = ("conv", "bn", "avg_pool2d", "max_pool2d_with_indices", "slice", "constant_pad_nd", "cat", *_ZEROS)


@dataclass(frozen=True)
class Residual:
    """A residual block: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``, or with three convolutions.

    Attributes:
        kind: ``"basic"``: two 3x3 convolutions; ``"bottleneck"``: 1x1, 3x3, 1x1.
        out_channels, mid_channels: of the last convolution and of the one before it.
        groups: of the 3x3 convolution of a bottleneck.
        expansion: output channels over base width, 1 for a basic block.
        eps, momentum: of its BatchNorm layers.
    """

    kind: Literal["basic", "bottleneck"]
    out_channels: int
    mid_channels: int
    groups: int
    expansion: int
    eps: float = 1e-5
    momentum: float | None = 0.1


@dataclass(frozen=True)
class _Conv:
    """A convolution's form; two-dimensional, dilation 1 and padded by half of its kernel."""

    kernel: int
    out_channels: int
    groups: int


class _Trace(TorchDispatchMode):
    """Notes of every tensor what it was made of, by operators of PyTorch's core; works on tensors without data too."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._expressions: dict[int, Expression] = {id(x): _X}
        self._kept: list[Tensor] = [x]  # so that no id is used twice

    def of(self, tensor: Tensor) -> Expression:
        return self._expressions.get(id(tensor), ("?",))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [each for value in args for each in (value if isinstance(value, tuple | list) else (value,))]
        inputs = [self.of(value) for value in flat if isinstance(value, Tensor)]
        out = func(*args, **(kwargs or {}))
        made = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(made, Tensor):
            if schema(func).is_mutable:
                self._forget_views(made)
            name = schema(func).name.removeprefix("aten::").rstrip("_")
            self._expressions[id(made)] = _expression(name, inputs, args, kwargs or {})
            self._kept.append(made)
        return out

    def _forget_views(self, written: Tensor) -> None:
        """Nothing is known of tensors that share the memory of one that was written to."""
        storage = storage_id(written.untyped_storage())
        for tensor in self._kept:
            if tensor is not written and storage_id(tensor.untyped_storage()) == storage:
                self._expressions[id(tensor)] = ("?",)


def _expression(name: str, inputs: list[Expression], args: Any, kwargs: Any) -> Expression:
    if name == "convolution":
        return ("conv", inputs[0], _conv(*args))
    if "batch_norm" in name:
        return ("bn", inputs[0])
    if name in _SAME_VALUE:
        return inputs[0]
    if name in _ZEROS:
        return (name,)
    if name == "add" and (len(inputs) != 2 or kwargs):  # of a number, or with a factor
        return ("add of something else", *inputs)
    return (name, *inputs)


def _conv(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> _Conv | None:
    size = tuple(weight.shape[2:])
    if transposed or len(size) != 2 or size[0] != size[1] or set(dilation) != {1} or set(padding) != {size[0] // 2}:
        return None
    return _Conv(size[0], int(weight.shape[0]), int(rest[1]))


def _chain(value: Expression) -> list[_Conv | None] | None:
    """Convolutions of ``bn(conv(relu(bn(conv(... x)))))``, the first one first; None for another form."""
    found: list[_Conv | None] = []
    while True:
        if value[0] != "bn" or value[1][0] != "conv":
            return None
        found.append(value[1][2])
        value = value[1][1]
        if value == _X:
            return found[::-1]
        if value[0] != "relu":
            return None
        value = value[1]


def _depth(value: Expression, known: dict[int, int]) -> int:
    """How many convolutions an expression is made of at most in a row; ``known`` of what was looked at before."""
    if id(value) not in known:
        inner = max((_depth(part, known) for part in value[1:] if isinstance(part, tuple)), default=0)
        known[id(value)] = inner + (value[0] == "conv")
    return known[id(value)]


def _is_shortcut(value: Expression) -> bool:
    """Whether a value is the input, with at most one convolution, and its sizes made to fit."""
    found: set[str] = set()
    seen: set[int] = set()
    rest = [value]
    while rest:
        part = rest.pop()
        if id(part) not in seen:
            seen.add(id(part))
            found.add(part[0])
            rest += [each for each in part[1:] if isinstance(each, tuple)]
    return "x" in found and found <= {"x", *_SHORTCUT} and _depth(value, {}) <= 1


def _form(value: Expression) -> tuple[str, list[_Conv]] | None:
    """Kind and convolutions of ``relu(chain(x) + shortcut(x))``."""
    if value[0] != "relu" or value[1][0] != "add":
        return None
    for main, shortcut in (value[1][1:], value[1][:0:-1]):
        convs = _chain(main)
        if convs is None or not _is_shortcut(shortcut) or any(conv is None for conv in convs):
            continue
        known = [conv for conv in convs if conv is not None]
        form = [(conv.kernel, conv.groups == 1) for conv in known]
        if form == [(3, True), (3, True)]:
            return "basic", known
        if [kernel for kernel, _ in form] == [1, 3, 1] and form[0][1] and form[2][1]:
            return "bottleneck", known
    return None


class _Dropouts(TorchFunctionMode):
    """Notes whether dropout was asked for, which does nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            self.found = self.found or (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) != 0
        return func(*args, **kwargs)


def _norm_settings(block: nn.Module) -> tuple[float, float | None] | None:
    """eps and momentum of a block's BatchNorm layers; None if they differ, or one has no weights or no statistics."""
    norms = [part for part in block.modules() if isinstance(part, BatchNormBase)]
    plain = all(isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats for norm in norms)
    settings = {(norm.eps, norm.momentum) for norm in norms}
    if not norms:  # functional ones, of parameters of the block's own
        return 1e-5, 0.1
    return next(iter(settings)) if plain and len(settings) == 1 else None


def _acts_in_training_alone(part: nn.Module, args: Any, output: Any) -> bool:
    """Whether a part that has done nothing, in eval mode, may do more in training: dropout, stochastic depth."""
    did_nothing = len(args) == 1 and output is args[0] and not getattr(part, "inplace", False)
    return did_nothing and not isinstance(part, nn.Identity | nn.Sequential) and getattr(part, "p", None) != 0


class ResidualFinder:
    """Looks for residual blocks among the parts of modules while they run once, in eval mode and without gradients.

    ::

        with ResidualFinder(modules) as finder:
            ...  # run them
        finder.found[block]

    Attributes:
        found: by block.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.found: dict[nn.Module, Residual] = {}
        self._modules = modules

    def __enter__(self) -> ResidualFinder:
        self._traces: list[tuple[_Trace, _Dropouts]] = []
        self._other_in_training: set[nn.Module] = set()
        self._handles = []
        for block in dict.fromkeys(part for module in self._modules for part in module.modules()):
            if not _may_be_residual(block):
                continue
            self._handles.append(block.register_forward_pre_hook(self._begin))
            self._handles.append(block.register_forward_hook(self._end))
            for part in block.modules():
                if part is not block and not list(part.children()):
                    self._handles.append(part.register_forward_hook(self._note))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        while self._traces:  # a block that has failed
            for mode in self._traces.pop():
                mode.__exit__(None, None, None)

    def _begin(self, block: nn.Module, args: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return
        self._traces.append((_Trace(args[0]), _Dropouts()))
        for mode in self._traces[-1]:
            mode.__enter__()

    def _note(self, part: nn.Module, args: Any, output: Any) -> None:
        if _acts_in_training_alone(part, args, output):
            self._other_in_training.add(part)

    def _end(self, block: nn.Module, args: Any, output: Any) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return
        trace, dropouts = self._traces.pop()
        trace.__exit__(None, None, None)
        dropouts.__exit__(None, None, None)
        norms = _norm_settings(block)
        if dropouts.found or norms is None:
            return
        try:
            form = _form(trace.of(output)) if isinstance(output, Tensor) else None
        except RecursionError:  # thousands of operators one after another: no block of these forms
            form = None
        if form is None or not self._other_in_training.isdisjoint(block.modules()):
            return
        kind, convs = form
        out, mid = convs[-1].out_channels, convs[-2].out_channels
        expansion = 1
        if kind == "bottleneck":
            said = getattr(block, "expansion", None)
            expansion = said if isinstance(said, int) and said > 0 and out % said == 0 else max(1, out // mid)
        self.found[block] = Residual(kind, out, mid, convs[-2].groups, expansion, *norms)  # type: ignore[arg-type]


def _may_be_residual(block: nn.Module) -> bool:
    """Whether a module holds as many convolutions as one of the forms has, and is no mere container."""
    if isinstance(block, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return 2 <= sum(isinstance(part, nn.Conv2d) for part in block.modules()) <= 4

"""Modules run one after another on an example, and which axis of their outputs holds the channels.

Some layers tell an axis: convolutions, BatchNorm and pooling use axis 1; linear layers, LayerNorm and attention use
the last. Hooks on them record which layer made or took the very tensor that passes between two children. Identity
decides, even where C = H = W. Where no such layer touches the tensor, as with the sum at the end of a block, layers
inside that made a tensor of the same shape decide, unless axes were permuted since and the sizes do not show which is
which. The axes of the input are those of the first such layer, if nothing was permuted before it. If layers disagree,
or none tells, the axis is unknown; a rule that needs it then raises and names ``layout=`` as the remedy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .._torch import ConvBase, NormBase, TorchDispatchMode, schema
from ..segments import Ghost
from .features import Features, Layout
from .groups import starts_layer

Axis = Literal[1, -1]
FIRST: Axis = 1
LAST: Axis = -1
_NAMES: dict[int, Layout] = {FIRST: "channels_first", LAST: "channels_last"}
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{axes}d")
    for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax", "LP")
    for axes in (1, 2, 3)
)
_CHANNELS_FIRST = (ConvBase, NormBase, nn.GroupNorm, nn.LocalResponseNorm, *_POOLS)


def channel_axis(module: nn.Module) -> Axis | None:
    """Which axis a layer takes for the channels; None where its type does not tell.

    A LayerNorm or RMSNorm with a forward of its own may permute first, so it tells nothing.
    """
    if isinstance(module, _CHANNELS_FIRST):
        return FIRST
    if isinstance(module, nn.Linear | nn.Embedding):
        return LAST
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        return LAST if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) else None
    if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return LAST
    return None


@dataclass(frozen=True)
class Handed:
    """What a module hands on to the next.

    Attributes:
        shape: without the batch.
        exact: axes of the channels, by layers that have made just this tensor or take it.
        similar: axes by layers that have made a tensor of this shape, or of these positions, on the way.
    """

    shape: tuple[int, ...]
    exact: frozenset[int] = frozenset()
    similar: frozenset[int] = frozenset()

    def features(self, layout: Layout | None = None) -> Features | None:
        """The features, as ``layout`` says or as the layers tell; None where neither does, or layers disagree.

        Raises:
            ValueError: where the layers contradict ``layout``.
        """
        if len(self.shape) == 1:
            return Features(self.shape)
        told = self.exact if self.exact else self.similar
        if layout is None:
            return Features(self.shape, _NAMES[next(iter(told))]) if len(told) == 1 else None
        said = FIRST if layout == "channels_first" else LAST
        if said not in told and (self.exact or len(told) == 1):
            raise ValueError(
                f"layout={layout!r} is said of features of shape {self.shape}, but a layer beside them takes axis "
                f"{'1' if FIRST in told else '-1'} of (N, ...) for the channels"
            )
        return Features(self.shape, layout)

    @property
    def why_unknown(self) -> str:
        """Why nothing is known of the axes."""
        if len(self.exact or self.similar) > 1:
            return "the layers around it disagree about"
        return "no layer around it tells"


class _Permutations(TorchDispatchMode):
    """Counts the operators that change the order of axes; those of matrices, such as weights, do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        permutes = schema(func).name in ("aten::permute", "aten::transpose")
        if permutes and args[0].dim() > 2 and not isinstance(args[0], Ghost):
            self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Made:
    """What a layer that tells the axis has made, and how many permutations there had been by then."""

    axis: int
    tensor: weakref.ref[Tensor]
    shape: tuple[int, ...]
    permutations: int

    def tells(self, shape: tuple[int, ...], permutations: int) -> bool:
        """Whether the axis holds for a tensor like this one: nothing was permuted since, or the sizes would tell."""
        return self.permutations == permutations or not (
            _channels_among_positions(self.shape, self.axis) or _channels_among_positions(shape, self.axis)
        )


class _Evidence:
    """Hooks on the layers that tell an axis; asked after each module about the tensor between it and the next.

    Attributes:
        permutations: since the module has started.
        first: axis by the first layer of all that tells one, if it takes something with as many axes as the network's
            input and nothing was permuted before; empty if not.
    """

    def __init__(self, modules: Sequence[nn.Module], axes: int) -> None:
        self.permutations = _Permutations()
        self.first: set[int] | None = None
        self._axes = axes
        self._permuted = False
        self._made: list[_Made] = []
        self._between: Tensor | None = None
        self._takers: set[int] = set()
        self._handles = [
            part.register_forward_hook(self._note, with_kwargs=True)
            for part in dict.fromkeys(part for module in modules for part in module.modules())
            if channel_axis(part) is not None
        ]

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        axis = channel_axis(module)
        assert axis is not None
        if any(value is self._between for value in (*args, *kwargs.values()) if isinstance(value, Tensor)):
            if not isinstance(module, nn.Embedding):  # it takes numbers of tokens, which have no channels
                self._takers.add(axis)
        if self.first is None:
            taken = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            alike = taken is not None and taken.dim() == self._axes and not isinstance(module, nn.Embedding)
            self.first = {axis} if alike and not self._permuted and not self.permutations.count else set()
        made = output[0] if isinstance(output, tuple) else output
        if isinstance(made, Tensor):
            self._made.append(_Made(axis, weakref.ref(made), tuple(made.shape[1:]), self.permutations.count))

    def start(self, between: Tensor) -> None:
        """A new module runs, on ``between``."""
        self._between = between
        self._takers = set()
        self._made = []
        self._permuted = self._permuted or self.permutations.count > 0
        self.permutations.count = 0

    def takers(self) -> set[int]:
        """Axes by the layers that have taken what was between."""
        return self._takers

    def makers(self, out: Tensor) -> tuple[set[int], set[int]]:
        """Axes by the layers that have made ``out``, and by those that have made something like it."""
        shape = tuple(out.shape[1:])
        exact = {made.axis for made in self._made if made.tensor() is out}
        telling = [made for made in self._made if made.tells(shape, self.permutations.count)]
        similar = {made.axis for made in telling if made.shape == shape}
        if not similar:
            similar = {
                made.axis
                for made in telling
                if len(made.shape) == len(shape) > 1
                and _positions(made.shape, made.axis) == _positions(shape, made.axis)
            }
        return exact, similar

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _positions(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[1:] if axis == FIRST else shape[:-1]


def _channels_among_positions(shape: tuple[int, ...], axis: int) -> bool:
    """Whether there are as many channels as positions along some axis, so that a permutation may keep the sizes."""
    return shape[0 if axis == FIRST else -1] in _positions(shape, axis)


def observe(
    modules: Sequence[nn.Module], x: Tensor, failed: Callable[[int, Tensor, Exception], Exception] | None = None
) -> list[Handed]:
    """``modules`` one after another on ``x`` ``(1, ...)``: the input, then what each hands on.

    The caller has put the modules in eval mode and has turned gradients off.

    Args:
        failed: ``failed(index, h, error)`` makes the error to raise where a module does not take its input ``h``; None
            raises what the module did.

    Raises:
        ValueError: for a module that does not return one tensor, or whose output has another batch size.
    """
    evidence = _Evidence(modules, x.dim())
    exact: list[set[int]] = [set()]
    similar: list[set[int]] = [set()]
    shapes = [tuple(int(size) for size in x.shape[1:])]
    h = x
    try:
        for index, module in enumerate(modules):
            evidence.start(h)
            try:
                with evidence.permutations:
                    out = module(h)
            except Exception as error:
                if failed is None:
                    raise
                raise failed(index, h, error) from error
            if not isinstance(out, Tensor):
                raise ValueError(
                    f"layers[{index}] ({type(module).__name__}) returns {type(out).__name__}; "
                    "each layer must map one tensor to one tensor"
                )
            if out.dim() < 2 or len(out) != len(x):
                raise ValueError(
                    f"layers[{index}] ({type(module).__name__}) returns a shape of {tuple(out.shape)} for one input; "
                    "each layer must keep the batch as the first axis"
                )
            exact[-1] |= evidence.takers()
            makers = evidence.makers(out)
            # An activation or dropout keeps the axes.
            if out.shape == h.shape and not starts_layer(module) and not evidence.permutations.count:
                makers = makers[0] | (exact[-1] if out is h else set()), makers[1] or exact[-1] or similar[-1]
            exact.append(makers[0])
            similar.append(makers[1])
            shapes.append(tuple(int(size) for size in out.shape[1:]))
            h = out
    finally:
        evidence.remove()
    similar[0] |= evidence.first or set()
    handed = zip(shapes, exact, similar, strict=True)
    return [Handed(shape, frozenset(a), frozenset(b)) for shape, a, b in handed]

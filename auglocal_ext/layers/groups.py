"""Which children of an ``nn.Sequential`` form a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import MODULE_HOOKS, ConvBase, NormBase
from ..nn import eager_type
from ..segments import Segment

_NORMS = (
    NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
#: Weights that mix channels however few of them there are.
_MIXING = (ConvBase, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module is a normalisation, or an activation or scale with parameters, by its structure.

    All its parameters are one number per channel (or one in all): no parameter has two sizes above 1. So PReLU, RMSNorm
    and your own normalisations are, and so is a container of nothing else.
    """
    owners = [part for part in module.modules() if part._parameters]
    for part in owners:
        if isinstance(part, _MIXING):
            return False
        if isinstance(part, _NORMS):
            continue
        if any(sum(size > 1 for size in p.shape) > 1 for p in part._parameters.values() if p is not None):
            return False
    return bool(owners)


def starts_layer(module: nn.Module) -> bool:
    """Whether a layer starts with this child: it has parameters, and not only those of normalisations.

    Of a segment those of submodules count; one that the forward uses by itself, such as a position embedding, does not.
    """
    return any(has_parameters(each) and not is_elementwise(each) for each in modules_of(module))


def modules_of(child: nn.Module) -> tuple[nn.Module, ...]:
    """The submodules that a segment runs; any other child itself."""
    return child.whole if isinstance(child, Segment) else (child,)


def _first_children(layers: nn.Sequential) -> list[int]:
    """Positions of the children that start a layer, then that of the classifier if it is a child of its own."""
    if not isinstance(layers, nn.Sequential):
        way = (
            "nn.Sequential(*layers) makes one"
            if isinstance(layers, list | tuple | nn.ModuleList)
            else "write its stages as nn.Sequential(stem, *blocks, classifier). What its forward does between them, "
            "such as flattening, must be a child too or go into a block. localize(model, ...) wraps it as it is"
        )
        raise TypeError(
            f"layers must be an nn.Sequential whose children are the layers, got {type(layers).__name__}; {way}"
        )
    starts = [i for i, child in enumerate(layers) if starts_layer(child)]
    if not starts:
        raise ValueError("layers has no child with parameters, so there is nothing to train")
    return starts


def group_children(layers: nn.Sequential) -> list[tuple[int, int]]:
    """Ranges ``(start, stop)`` of children that form one layer each.

    A child with parameters starts a layer. Children without parameters (activation, pooling, flatten, dropout), and
    those whose parameters are one number per channel (normalisations of torch or your own, PReLU), join the layer
    before them, leading ones the first layer. The last child with other parameters is the network's classifier and
    belongs, with what surrounds it, to the last layer.

    Raises:
        TypeError: if ``layers`` is no ``nn.Sequential``.
        ValueError: if no child has parameters.
    """
    starts = _first_children(layers)
    starts = starts[:-1] or starts
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(layers)], strict=True))


def classifier_start(layers: nn.Sequential) -> int:
    """Position of the child with which the network's classifier starts: the last one with parameters.

    ``len(layers)`` where one layer is all there is. Raises as :func:`group_children`.
    """
    starts = _first_children(layers)
    return starts[-1] if len(starts) > 1 else len(layers)


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Submodules through nested ``nn.Sequential`` only: other containers, and those with a forward, are opaque."""
    if is_sequence(module):
        for child in module.children():
            yield from leaves(child)
    elif isinstance(module, Segment):
        for part in module.whole:
            yield from leaves(part)
    else:
        yield module


def is_sequence(module: nn.Module) -> bool:
    """Whether a module calls its children one after another and does nothing else."""
    return isinstance(module, nn.Sequential) and eager_type(module).forward is nn.Sequential.forward


def first_leaves(children: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """Modules that run the first ``count`` leaves of ``children``, which they are parts of; names stay."""
    kept: list[nn.Module] = []
    for child in children:
        inside = len(list(leaves(child)))
        if count <= 0:
            break
        if inside <= count or not is_sequence(child):
            kept.append(child)
        else:
            names = list(dict(child.named_children()))
            parts = first_leaves(list(child.children()), count)
            kept.append(nn.Sequential(OrderedDict(zip(names, parts, strict=False))))
        count -= inside
    return kept


def nesting_hint(layers: nn.Sequential) -> str:
    """What to do where one child holds most of a network, which makes it one layer; empty where none does."""
    for index, child in enumerate(layers):
        inside = [part for part in child.children() if has_parameters(part)]
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(inside) > 2:
            name = type(child).__name__
            return (
                f"; layers[{index}] ({name} of {len(list(child.children()))}) holds most of the network and is one "
                f"layer: unnest it, nn.Sequential(..., *layers[{index}], ...)"
            )
    return ""


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within the context every submodule is in eval mode and no gradient is recorded; modes are restored after.

    So are other attributes, such as a cache that a module fills in eval mode and would keep in training mode, and the
    hooks, which a model may add when it is first called.
    """
    parts = [part for module in modules for part in module.modules()]
    models = {segment.model for segment in parts if isinstance(segment, Segment)}
    parts += [part for model in models for part in model.modules()]
    held = [(part, _attributes(part)) for part in parts]
    try:
        for part in parts:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, attributes in held:
            _restore(part, attributes)


_OF_MODULES = frozenset(vars(nn.Module())) - {"training", *MODULE_HOOKS}


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds beside parameters, buffers and submodules; of a container also its contents."""
    return {
        key: (value, value.copy() if type(value) in (dict, OrderedDict, list, set) else None)
        for key, value in vars(module).items()
        if key not in _OF_MODULES
    }


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    own = vars(module)
    for key in [key for key in own if key not in _OF_MODULES and key not in attributes]:
        del own[key]
    for key, (value, content) in attributes.items():
        own[key] = value
        if content is None:
            continue
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(content)


def probe_input(module: nn.Module, shape: Sequence[int], batch: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros ``(batch, *shape)`` on the device and, unless told otherwise, in the dtype of the first parameter."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.zeros(batch, *shape, dtype=dtype)
    return torch.zeros(batch, *shape, device=parameter.device, dtype=parameter.dtype if dtype is None else dtype)

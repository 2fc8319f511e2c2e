"""Fresh copies of modules: of the same structure, with every value initialised anew.

Parameters and buffers of a copy are new tensors, so that no value of the source can be left in them. The
``reset_parameters()`` of its parts fill them, then the ``_init_weights(module)`` of the model around them, which models
of Hugging Face have. Whether they fill every element is found on a second copy on the meta device, where writes are
recorded: fake and meta networks, which have no values, are refused as others are. What a part holds besides
parameters, buffers and submodules is refused, as it would be copied with its values or be shared.

A segment is copied with the model whose forward it runs. Of that model's tensors the copy has those that the segment
uses.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._torch import (
    MODULE_HOOKS,
    RESETS,
    FakeTensor,
    is_compiled,
    non_persistent,
    tree_leaves,
    without_dispatch_modes,
)
from ..nn.written import Written
from ..segments import Segment
from .constructors import initialise_as_constructor
from .copied_segment import CopiedSegment
from .untouched import Untouched

#: The way out, in messages.
FACTORY = "AugLocal(block=factory) with a factory(in_channels, out_channels, stride, layer) that returns an nn.Module"
_REGISTERED = ("_parameters", "_buffers", "_modules", *MODULE_HOOKS)


def fresh_copy(source: nn.Module, what: str, model: nn.Module | None = None) -> nn.Module:
    """A module of the structure of ``source`` with none of its values, in training mode.

    Parts are initialised from the innermost outwards, each by its class's ``reset_parameters()``, which torch's layers
    have; that of BatchNorm resets the statistics too. Some classes of torchvision and timm without one are known. Then
    each is given to the method ``_init_weights(module)`` of the innermost module around it that has one. What follows
    from the structure is copied: buffers in no state dict, and integers and booleans with at least one axis, such as an
    index of relative positions. Hooks are left out. Every parameter of floating point is trainable.

    Args:
        source: not changed. The copy of a segment runs the forward of a model of its own.
        what: it, in words for messages.
        model: which ``source`` is a part of; None: ``source`` itself.

    Raises:
        ValueError: for a parameter or buffer that nothing initialises, for parts that are parametrized, compiled or
            scripted, and for tensors and modules that are no parameters, buffers and submodules.
    """
    around = _root(source) if model is None else model
    methods = _init_methods(around)
    _refuse_hidden(source, what)
    _refuse_missed(source, what, methods)
    made = _copied(source, lambda tensor, kept: tensor.detach().clone() if kept else torch.empty_like(tensor))
    tensors = [tensor for _, tensor, _ in _tensors(made)]
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):  # they have no values
        return _finished(made)
    device = tensors[0].device if tensors else torch.device("cpu")
    reads = (
        f"{what} is initialised by an _init_weights() that reads parameters or buffers of the network. Pass {FACTORY}"
    )
    with torch.no_grad(), device, Untouched(around, reads):
        _initialise(made, source, methods)
    for name, tensor, owner in _tensors(made):
        if not tensor.is_meta and _has_fractions(tensor) and bool(tensor.isnan().any()):
            why = f"which the {_filler(owner, methods)} makes of its former values"
            raise ValueError(f"{what} has {name!r}, {why}, so that {_no_copy(owner)}")
    return _finished(made)


def _finished(made: nn.Module) -> nn.Module:
    if isinstance(made, CopiedSegment):
        made.drop_unused()
    return made.train()


def _no_copy(owner: str) -> str:
    return (
        f"no fresh copy of it can be made for an auxiliary block. Give {owner} a reset_parameters() that fills it, as "
        f"torch's layers have, or pass {FACTORY}"
    )


def _filler(owner: str, methods: dict[nn.Module, Any]) -> str:
    return f"reset_parameters() of {owner}" + (" or _init_weights() of the model" if methods else "")


def _init_methods(model: nn.Module) -> dict[nn.Module, Callable[[nn.Module], Any]]:
    """For each module in ``model`` the ``_init_weights(module)`` of the innermost one around it, or of itself."""
    found: dict[nn.Module, Any] = {}

    def walk(module: nn.Module, method: Any) -> None:
        own = getattr(module, "_init_weights", None)
        found[module] = own if callable(own) and _takes_one(own) else method
        for child in module.children():
            if child not in found:
                walk(child, found[module])

    walk(model, None)
    return {module: method for module, method in found.items() if method is not None}


def _takes_one(method: Any) -> bool:
    try:
        inspect.signature(method).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _initialise(made: nn.Module, source: nn.Module, methods: dict[nn.Module, Callable[[nn.Module], Any]]) -> None:
    """Initialise the parts of a copy, then itself, each as its class does, and then as the model around them does."""
    sources = dict(zip(_root(made).modules(), _root(source).modules(), strict=True))
    run = set(_running(source))
    parts = [part for part in _inside_out(_root(made), set()) if sources[part] in run]
    for part in parts:
        for name in RESETS:
            if callable(getattr(part, name, None)):
                getattr(part, name)()
                break
        initialise_as_constructor(part)
    for part in parts:
        if sources[part] in methods:
            methods[sources[part]](part)


def _inside_out(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    seen.add(module)
    for child in module.children():
        if child not in seen:
            yield from _inside_out(child, seen)
    yield module


def _root(module: nn.Module) -> nn.Module:
    """What is copied: of a segment the model whose forward it runs."""
    return module.model if isinstance(module, Segment) else module


def _running(module: nn.Module) -> Iterable[nn.Module]:
    return module.running if isinstance(module, Segment) else module.modules()


def _refuse_missed(source: nn.Module, what: str, methods: dict[nn.Module, Callable[[nn.Module], Any]]) -> None:
    """ValueError for a parameter or buffer that :func:`_initialise` does not fill, found on a copy without data."""
    with without_dispatch_modes(), torch.device("meta"), torch.no_grad():
        made = _copied(
            source, lambda tensor, kept: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        )
        before = [tensor for _, tensor, _ in _tensors(made)]
        kept = _structural(made)
        with Written(before) as written:
            try:
                _initialise(made, source, methods)
            except Exception as error:
                raise ValueError(
                    f"{what} cannot be initialised anew for an auxiliary block: {type(error).__name__}: {error}. Pass "
                    f"{FACTORY}"
                ) from error
        for name, tensor, owner in _tensors(made):
            if id(tensor) not in kept and written.misses(tensor):
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                why = f"which no {_filler(owner, methods)} fills"
                raise ValueError(f"{what} has the {kind} {name!r}, {why}, so that {_no_copy(owner)}")


def _refuse_hidden(source: nn.Module, what: str) -> None:
    root = _root(source)
    parts = set(root.modules())
    registered = {id(tensor) for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())}
    used = _used(source)
    for path, part in root.named_modules():
        where = f"{what}, in {path or 'itself'} ({type(part).__name__}),"
        if part in used and parametrize.is_parametrized(part):
            raise ValueError(f"{where} has parametrized weights, which a fresh copy would not have. Pass {FACTORY}")
        if isinstance(part, torch.jit.ScriptModule) or is_compiled(part):
            raise ValueError(
                f"{where} is compiled or scripted, so that no fresh copy of it can be made for an auxiliary block: "
                f"compile it in place by its compile(), or pass {FACTORY}"
            )
        for name, leaf in _unregistered(part):
            stranger = isinstance(leaf, nn.Module) and leaf not in parts
            if isinstance(leaf, Tensor):
                known = id(leaf) in registered or part not in used
                stranger = not known and (leaf.dim() == 0 or _has_fractions(leaf))
            if stranger:
                raise ValueError(
                    f"{where} holds a {type(leaf).__name__} as {name!r} that is no parameter, buffer or submodule "
                    "of it, so that no fresh copy can be made for an auxiliary block. Register it, or pass "
                    f"{FACTORY}"
                )


def _unregistered(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """What hangs on a module besides parameters, buffers, submodules and hooks."""
    for name, value in vars(part).items():
        if name not in _REGISTERED:
            yield from ((name, leaf) for leaf in tree_leaves(value))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Every parameter and buffer once, with its name and the class that holds it."""
    seen: set[int] = set()
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for path, part in _root(module).named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and id(tensor) in own and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}".lstrip("."), tensor, type(part).__name__


def _structural(module: nn.Module) -> set[int]:
    """Ids of the buffers that follow from the structure, and not from training."""
    return {
        id(buffer)
        for part in _root(module).modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and (name in non_persistent(part) or (buffer.dim() > 0 and not _has_fractions(buffer)))
    }


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _copied(source: nn.Module, make: Callable[[Tensor, bool], Tensor]) -> nn.Module:
    """A copy without hooks, with what ``make(tensor, structural)`` returns for parameters and buffers.

    What of a segment's model the segment does not use is on the meta device.
    """
    structural, root = _structural(source), _root(source)
    memo: dict[int, Any] = {}
    for _, tensor, _ in _tensors(source):
        made = make(tensor.detach(), id(tensor) in structural)
        if id(tensor) not in structural and _has_fractions(made):
            made.fill_(math.nan)  # so that what stays of it shows
        memo[id(tensor)] = nn.Parameter(made, _has_fractions(made)) if isinstance(tensor, nn.Parameter) else made
    used = _used(source)
    for part in root.modules():
        memo.update((id(getattr(part, name)), OrderedDict()) for name in MODULE_HOOKS)
        left: list[Any] = [*part._parameters.values(), *part._buffers.values()]
        if part not in used:
            left += [leaf for _, leaf in _unregistered(part)]
        for each in left:
            if isinstance(each, Tensor) and id(each) not in memo:
                memo[id(each)] = _without_data(each)
    copied = copy.deepcopy(root, memo)
    return CopiedSegment(copied, source) if isinstance(source, Segment) else copied


def _without_data(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _used(source: nn.Module) -> set[nn.Module]:
    """The modules whose forward runs, or whose tensors are used."""
    return {*_running(source), *(source.entered if isinstance(source, Segment) else ())}

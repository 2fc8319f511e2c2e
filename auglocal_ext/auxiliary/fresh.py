"""Fresh copies of modules: of the same structure, with every value initialised anew.

Parameters and buffers of a copy are new tensors, so that no value of the source can be left in them. The
``reset_parameters()`` of its parts fill them. Whether they fill every element is found on a second copy on the meta
device, where writes are recorded: fake and meta networks, which have no values, are refused as others are. What a
part holds besides parameters, buffers and submodules is refused, as it would be copied with its values or be shared.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..nn.written import Written
from .constructors import initialise_as_constructor

#: The way out, in messages.
FACTORY = "AugLocal(block=factory) with a factory(in_channels, out_channels, stride, layer) that returns an nn.Module"
_RESETS = ("reset_parameters", "_reset_parameters")
_HOOKS = [name for name, value in vars(nn.Module()).items() if name.endswith("hooks") and isinstance(value, dict)]
_REGISTERED = ("_parameters", "_buffers", "_modules", *_HOOKS)


def fresh_copy(source: nn.Module, what: str) -> nn.Module:
    """A module of the structure of ``source`` with none of its values, in training mode.

    Parts are initialised from the innermost outwards, each by its class's ``reset_parameters()``, which torch's layers
    have; that of BatchNorm resets the statistics too. Some classes of torchvision and timm without one are known. What
    follows from the structure is copied: buffers in no state dict, and integers and booleans with at least one axis,
    such as an index of relative positions. Hooks are left out. Every parameter of floating point is trainable.

    Args:
        source: not changed.
        what: it, in words for messages.

    Raises:
        ValueError: for a parameter or buffer that nothing initialises, for parts that are parametrized, compiled or
            scripted, and for tensors and modules that are no parameters, buffers and submodules.
    """
    _refuse_hidden(source, what)
    _refuse_missed(source, what)
    made = _copied(source, lambda tensor, kept: tensor.detach().clone() if kept else torch.empty_like(tensor))
    tensors = [tensor for _, tensor, _ in _tensors(made)]
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):  # they have no values
        return made.train()
    with torch.no_grad(), tensors[0].device if tensors else torch.device("cpu"):
        _reset(made)
    for name, tensor, owner in _tensors(made):
        if not tensor.is_meta and _has_fractions(tensor) and bool(tensor.isnan().any()):
            why = f"which the reset_parameters() of {owner} makes of its former values"
            raise ValueError(f"{what} has {name!r}, {why}, so that {_no_copy(owner)}")
    return made.train()


def _no_copy(owner: str) -> str:
    return (
        f"no fresh copy of it can be made for an auxiliary block. Give {owner} a reset_parameters() that fills it, as "
        f"torch's layers have, or pass {FACTORY}"
    )


def _reset(module: nn.Module, seen: set[nn.Module] | None = None) -> None:
    """Initialise the parts of a module, then itself, each as its class does."""
    seen = set() if seen is None else seen
    for child in module.children():
        if child not in seen:
            seen.add(child)
            _reset(child, seen)
    for name in _RESETS:
        if callable(getattr(module, name, None)):
            getattr(module, name)()
            break
    initialise_as_constructor(module)


def _refuse_missed(source: nn.Module, what: str) -> None:
    """ValueError for a parameter or buffer that :func:`_reset` does not fill, found on a copy without data."""
    with _disable_current_modes(), torch.device("meta"), torch.no_grad():
        made = _copied(
            source, lambda tensor, kept: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        )
        before = [tensor for _, tensor, _ in _tensors(made)]
        kept = _structural(made)
        with Written(before) as written:
            try:
                _reset(made)
            except Exception as error:
                raise ValueError(
                    f"{what} cannot be initialised anew for an auxiliary block: {type(error).__name__}: {error}. Pass "
                    f"{FACTORY}"
                ) from error
        for name, tensor, owner in _tensors(made):
            if id(tensor) not in kept and written.misses(tensor):
                kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                why = f"which no reset_parameters() of {owner} fills"
                raise ValueError(f"{what} has the {kind} {name!r}, {why}, so that {_no_copy(owner)}")


def _refuse_hidden(source: nn.Module, what: str) -> None:
    parts = set(source.modules())
    registered = {id(tensor) for _, tensor, _ in _tensors(source)}
    for path, part in source.named_modules():
        where = f"{what}, in {path or 'itself'} ({type(part).__name__}),"
        if parametrize.is_parametrized(part):
            raise ValueError(f"{where} has parametrized weights, which a fresh copy would not have. Pass {FACTORY}")
        if isinstance(part, torch.jit.ScriptModule) or hasattr(part, "_orig_mod"):
            raise ValueError(
                f"{where} is compiled or scripted, so that no fresh copy of it can be made for an auxiliary block: "
                f"compile it in place by its compile(), or pass {FACTORY}"
            )
        for name, value in vars(part).items():
            if name in _REGISTERED:
                continue
            for leaf in tree_leaves(value):
                stranger = isinstance(leaf, nn.Module) and leaf not in parts
                if isinstance(leaf, Tensor):
                    stranger = id(leaf) not in registered and (leaf.dim() == 0 or _has_fractions(leaf))
                if stranger:
                    raise ValueError(
                        f"{where} holds a {type(leaf).__name__} as {name!r} that is no parameter, buffer or submodule "
                        "of it, so that no fresh copy can be made for an auxiliary block. Register it, or pass "
                        f"{FACTORY}"
                    )


class Untouched(TorchDispatchMode):
    """Raises where an operator uses the memory of parameters or buffers of ``module``, while it is active."""

    def __init__(self, module: nn.Module, what: str) -> None:
        super().__init__()
        self._storages = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) and _storage(leaf) in self._storages for leaf in tree_leaves((args, kwargs))):
            raise ValueError(
                f"{self._what} holds a function or an object with parameters or buffers of the network, which a copy "
                f"of it would share. Register them as parameters, buffers and submodules, or pass {FACTORY}"
            )
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Every parameter and buffer once, with its name and the class that holds it."""
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}".lstrip("."), tensor, type(part).__name__


def _structural(module: nn.Module) -> set[int]:
    """Ids of the buffers that follow from the structure, and not from training."""
    return {
        id(buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
        and (name in part._non_persistent_buffers_set or (buffer.dim() > 0 and not _has_fractions(buffer)))
    }


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _copied(source: nn.Module, make: Callable[[Tensor, bool], Tensor]) -> nn.Module:
    """A copy without hooks, with what ``make(tensor, structural)`` returns for parameters and buffers."""
    structural = _structural(source)
    memo: dict[int, Any] = {}
    for _, tensor, _ in _tensors(source):
        made = make(tensor.detach(), id(tensor) in structural)
        if id(tensor) not in structural and _has_fractions(made):
            made.fill_(math.nan)  # so that what stays of it shows
        memo[id(tensor)] = nn.Parameter(made, _has_fractions(made)) if isinstance(tensor, nn.Parameter) else made
    for part in source.modules():
        memo.update((id(getattr(part, name)), OrderedDict()) for name in _HOOKS)
    return copy.deepcopy(source, memo)

"""A check that code computes without the parameters and buffers of a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._torch import TorchDispatchMode, storage_id, tree_leaves


class Untouched(TorchDispatchMode):
    """Raises ValueError where an operator uses the memory of parameters or buffers of ``module``, while it is active.

    Args:
        message: of the error.
    """

    def __init__(self, module: nn.Module, message: str) -> None:
        super().__init__()
        self._storages = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._message = message

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) and _storage(leaf) in self._storages for leaf in tree_leaves((args, kwargs))):
            raise ValueError(self._message)
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return storage_id(tensor.untyped_storage())

"""Which tensors a function writes to, without running it on data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import TorchDispatchMode, skipped_init, storage_id, written_tensors


class Written(TorchDispatchMode):
    """Records writes to meta tensors while it is active.

    ::

        with Written() as written:
            module.reset_parameters()  # of a module on the meta device
        written.misses(module.weight)
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        #: Elements of each storage that have been written; storages that are not here were made since.
        self._elements = {_storage(tensor): np.zeros(_elements(tensor), bool) for tensor in tensors}
        self._skipped = _SkippedInit(self)

    def __enter__(self) -> Written:
        super().__enter__()
        self._skipped.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._skipped.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in written_tensors(func, args, kwargs):
            self.note(tensor)
        return out

    def note(self, tensor: Tensor) -> None:
        """``tensor``, or what it is a view of, is written to."""
        written = self._elements.get(_storage(tensor))
        if written is not None:
            _view(written, tensor)[...] = True

    def misses(self, tensor: Tensor) -> bool:
        """Whether some elements of a tensor have not been written; one whose memory was made since misses none."""
        written = self._elements.get(_storage(tensor))
        return written is not None and not bool(_view(written, tensor).all())


class _SkippedInit(TorchFunctionMode):
    """Records the functions of ``torch.nn.init`` that return at once on the meta device."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self._written = written

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if skipped_init(func, out) is not None:
            self._written.note(args[0])
        return out


def _storage(tensor: Tensor) -> int:
    return storage_id(tensor.untyped_storage())


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _view(written: np.ndarray[Any, Any], tensor: Tensor) -> np.ndarray[Any, Any]:
    """The flags of a tensor's elements among those of its storage."""
    return np.lib.stride_tricks.as_strided(written[tensor.storage_offset() :], tensor.shape, tensor.stride())

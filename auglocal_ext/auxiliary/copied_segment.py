"""``CopiedSegment``: a segment with a model of its own, of which it holds only the tensors that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .._torch import current_dispatch_mode
from ..segments import Ghost, Segment
from ..segments.ghost import Standing


@dataclass(frozen=True)
class _Missing:
    """A parameter or buffer that the segment does not use; the forward around it may ask for its shape."""

    path: str
    kind: Literal["_parameters", "_buffers"]
    key: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class CopiedSegment(Segment):
    """``(N, *shape) -> (N, *shape)`` as the segment that it copies, on parameters and buffers of its own.

    Parameters and buffers of the model that the segment does not use are None, and ghosts while it runs: a result that
    depends on one raises.

    Args:
        model: a copy of the source's model, which belongs to this segment alone.
        source: the segment.
    """

    def __init__(self, model: nn.Module, source: Segment) -> None:
        own, _ = source.passage.owned(source.first, source.last)
        super().__init__(model, source.passage, source.first, source.last, own)
        self._missing: tuple[_Missing, ...] = ()
        self._dtype: torch.dtype | None = None
        #: For a device and a dtype, what stands where while the segment runs.
        self._ghosts: dict[Any, list[Standing]] = {}

    def drop_unused(self) -> None:
        """Release the tensors that the segment does not use; called once, when it has its own."""
        own = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        self._dtype = self._floating()
        self._missing = tuple(
            _Missing(path, kind, key, tuple(tensor.shape), tensor.stride(), tensor.dtype)
            for path, part in self.model.named_modules()
            for kind in _KINDS
            for key, tensor in getattr(part, kind).items()
            if tensor is not None and id(tensor) not in own
        )
        for each in self._missing:
            getattr(self.model.get_submodule(each.path), each.kind)[each.key] = None

    def _standing(self, device: torch.device) -> list[Standing]:
        dtype = self._floating()
        if current_dispatch_mode() is not None:  # a fake tensor mode takes none that was made outside
            return self._made(device, dtype)
        if (device, dtype) not in self._ghosts:
            self._ghosts[device, dtype] = self._made(device, dtype)
        return self._ghosts[device, dtype]

    def _made(self, device: torch.device, dtype: torch.dtype | None) -> list[Standing]:
        made = []
        for each in self._missing:
            now = dtype if dtype is not None and each.dtype == self._dtype else each.dtype  # converted since
            shape = torch.empty_strided(each.size, each.stride, dtype=now, device="meta")
            place = getattr(self.model.get_submodule(each.path), each.kind)
            made.append((place, each.key, Ghost(shape, device)))
        return made

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        memo = set() if memo is None else memo
        if self not in memo:
            memo.add(self)
            yield prefix, self
            running = set(self.running)
            inside = self.model.named_modules(memo, prefix + ("." if prefix else "") + "model", remove_duplicate)
            yield from ((name, module) for name, module in inside if module in running)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ghosts": {}}

    def _floating(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)


_KINDS: tuple[Literal["_parameters", "_buffers"], ...] = ("_parameters", "_buffers")

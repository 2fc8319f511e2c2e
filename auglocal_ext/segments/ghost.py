"""``Ghost``: a tensor that is not there. It has a shape, a dtype and a device, but neither memory nor values.

A segment of a model skips what lies before it. What the skipped modules would have returned are ghosts; code between
them runs on ghosts without computing anything. Whatever is computed from a ghost is a ghost, so a result that depends
on something skipped is recognised by its type. Ghosts work beside real and fake tensors and under any dispatch mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._torch import (
    disabled_torch_function,
    make_wrapper_subclass,
    schema,
    tree_flatten,
    tree_unflatten,
    written_tensors,
)

_META = torch.device("meta")


class CrossingError(RuntimeError):
    """A value from before a segment is needed within it."""


class Ghost(Tensor):
    """A tensor without memory; operators on it compute shapes alone.

    Args:
        shape: a tensor on the meta device, of the ghost's sizes, strides and dtype.
        device: where the tensor would be.
    """

    _shape: Tensor
    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: Tensor, device: torch.device) -> Ghost:
        made = make_wrapper_subclass(
            cls,
            shape.shape,
            strides=shape.stride(),
            storage_offset=shape.storage_offset(),
            dtype=shape.dtype,
            device=device,
            storage_size=0,  # so that whoever counts bytes counts none
        )
        made._shape = shape
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Ghost({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        device = next(value.device for value in flat if isinstance(value, Ghost))
        device = kwargs.get("device") or device
        if torch.Tag.inplace_view in func.tags:
            raise CrossingError(f"{func} changes the shape, in place, of a value from before the segment")
        if schema(func).is_mutable:
            # A real tensor that takes in what is not there would be wrong without a sign of it.
            if not all(isinstance(each, Ghost) for each in written_tensors(func, args, kwargs)):
                raise CrossingError(f"{func} writes a value from before the segment into a tensor that is used in it")
        shapes = [_shape_of(value) for value in flat]
        of = {id(shape): value for shape, value in zip(shapes, flat, strict=True) if isinstance(value, Tensor)}
        try:
            args, kwargs = tree_unflatten(shapes, spec)
            out = func(*args, **kwargs)
        except CrossingError:
            raise
        except Exception as error:
            raise CrossingError(f"{func} reads a value from before the segment: {error}") from error
        leaves, spec = tree_flatten(out)
        made = [
            of.get(id(leaf)) if id(leaf) in of else Ghost(leaf, device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        return tree_unflatten(made, spec)


#: A module's parameters or buffers, the name of one, and the ghost that stands in its place.
Standing = tuple[dict[str, Any], str, Ghost]


@contextmanager
def standing(ghosts: Sequence[Standing]) -> Iterator[None]:
    """Within it ghosts stand in the place of parameters and buffers that are not there, or not whole."""
    before = [tensors[key] for tensors, key, _ in ghosts]
    try:
        for tensors, key, ghost in ghosts:
            tensors[key] = ghost
        yield
    finally:
        for (tensors, key, _), tensor in zip(ghosts, before, strict=True):
            tensors[key] = tensor


def _shape_of(value: Any) -> Any:
    if isinstance(value, Ghost):
        return value._shape
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    return _META if isinstance(value, torch.device) else value

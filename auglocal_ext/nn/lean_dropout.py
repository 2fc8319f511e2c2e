"""Dropout whose mask backward draws again from the random state at its call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import FakeTensor
from ..ops.registry import refuse_create_graph
from .norm_act import PLAIN
from .remade import Source, recordable, source_of

_masked = torch.ops.aten.native_dropout_backward.default


def lean_dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p, training=True)`` of a contiguous, recordable x that requires grad, 0 < p < 1.

    It draws the numbers that torch's draws. While a CUDA graph is captured the random state cannot be read: there the
    mask is kept.
    """
    before = source_of(x)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        y, mask = torch.native_dropout(x, p, True)
        if before is not None:
            Source(partial(_masked_again, remake=before.remake, scale=1 / (1 - p)), (mask, *before.tensors)).note(y)
        return y
    state = _random_state(x)
    y = _LeanDropout.apply(x, p, state)
    if before is not None:
        Source(partial(_drawn_again, remake=before.remake, p=p, state=state), before.tensors).note(y)
    return y


def _masked_again(tensors: Sequence[Any], remake: Any, scale: float) -> Tensor:
    mask, *rest = tensors
    made: Tensor = _masked(remake(rest), mask, scale)
    return made


def _drawn_again(tensors: Sequence[Any], remake: Any, p: float, state: Tensor | None) -> Tensor:
    return _dropped(remake(tensors), p, state)


def _random_state(x: Tensor) -> Tensor | None:
    """That of x's device; None for tensors without data, for which nothing is drawn."""
    if x.is_meta or isinstance(x, FakeTensor):
        return None
    module, where = _generator(x)
    state: Tensor = module.get_rng_state(*where)
    return state


def _generator(x: Tensor) -> tuple[Any, tuple[torch.device, ...]]:
    """What has ``get_rng_state`` and ``set_rng_state`` for x's device, and what they take beside the state."""
    return (torch, ()) if x.device.type == "cpu" else (torch.get_device_module(x.device), (x.device,))


@contextmanager
def _random_state_of(x: Tensor, state: Tensor | None) -> Iterator[None]:
    """Within it numbers are drawn from ``state`` on x's device; then the random state is as before."""
    if state is None:
        yield
        return
    module, where = _generator(x)
    now = module.get_rng_state(*where)
    module.set_rng_state(state, *where)
    try:
        yield
    finally:
        module.set_rng_state(now, *where)


def _dropped(x: Tensor, p: float, state: Tensor | None) -> Tensor:
    """Dropout with the mask that was drawn from ``state``; x as it was then in shape, dtype and layout."""
    x = x.contiguous()
    if not aligned(x):
        x = x.clone()
    with _random_state_of(x, state):
        return F.dropout(x, p, True)


def aligned(x: Tensor) -> bool:
    """Whether x begins where a vectorised kernel can; which element gets which random number depends on it."""
    return bool(x.storage_offset() * x.element_size() % 16 == 0)


class _LeanDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, state: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.drawn = p, state
        return F.dropout(x, p, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("a fused dropout", PLAIN)
        # The mask times the gradient is the gradient with elements dropped.
        return None if grad is None else _dropped(grad, *ctx.drawn), None, None


class FusedDropout(nn.Dropout):
    """An ``nn.Dropout`` that :func:`auglocal_ext.fuse` has changed."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.training
            and 0 < self.p < 1
            and not self.inplace
            and recordable(x)
            and x.requires_grad
            and x.is_contiguous()
            and aligned(x)
        ):
            return lean_dropout(x, self.p)
        return super().forward(x)

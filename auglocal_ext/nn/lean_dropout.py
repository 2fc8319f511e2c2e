"""Dropout whose mask backward draws again from the random state at its call."""

from __future__ import annotations

import threading
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
from .remade import Remake, Source, recordable, source_of

_masked = torch.ops.aten.native_dropout_backward.default
#: Held from where a random state is read until numbers are drawn from it: another thread may not draw in between.
_drawing = threading.Lock()


def lean_dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p, training=True)`` of a contiguous, recordable x that requires grad, 0 < p < 1.

    It draws the numbers that torch's draws. While a CUDA graph is captured the random state cannot be read: there the
    mask is kept.
    """
    before = source_of(x)
    if _capturing(x):
        y, mask = torch.native_dropout(x, p, True)
        if before is not None:
            Source(partial(_masked_again, remake=before.remake, scale=1 / (1 - p)), (mask, *before.tensors)).note(y)
        return y
    drawn = Drawn(x, p)
    y = _LeanDropout.apply(x, drawn)
    if before is not None:
        Source(partial(_dropped_again, remake=before.remake, drawn=drawn), before.tensors).note(y)
    return y


def _masked_again(tensors: Sequence[Any], remake: Remake, scale: float) -> Tensor:
    mask, *rest = tensors
    made: Tensor = _masked(remake(rest), mask, scale)
    return made


def _dropped_again(tensors: Sequence[Any], remake: Remake, drawn: Drawn) -> Tensor:
    return drawn.applied(remake(tensors), again=True)


class Drawn:
    """The random numbers of one call of dropout, which can be drawn again.

    torch draws them in an order that depends on the device and on shape, dtype and layout of x.
    """

    def __init__(self, x: Tensor, p: float) -> None:
        self._form, self._dtype, self._device, self.p = x.shape, x.dtype, x.device, p
        self._state: Tensor | None = None
        self._mask: Tensor | None = None

    def first(self, x: Tensor) -> Tensor:
        """Dropout of x in the forward pass.

        On CPU the numbers come from a generator of their own, as in backward, and the device's generator moves on: what
        other threads draw meanwhile changes neither mask.
        """
        with _drawing:
            self._state = _random_state(x)
            if self._state is None or x.is_cuda:
                return F.dropout(x, self.p, True)
            generator = _generator_at(self._state)
            mask = self._noise(generator)
            torch.set_rng_state(generator.get_state())
        return x * mask

    def applied(self, x: Tensor, again: bool) -> Tensor:
        """Dropout of x; ``again``: the mask is kept, as it will be needed once more soon, in dropout's own backward."""
        mask = self._draw() if self._mask is None else self._mask
        self._mask = mask if again else None
        made: Tensor = _masked(x, mask, 1 / (1 - self.p)) if mask.dtype == torch.bool else x * mask
        return made

    def _draw(self) -> Tensor:
        """Of CUDA's kernel the mask; elsewhere what torch multiplies by, the mask divided by 1 - p in x's dtype."""
        if self._device.type != "cuda":
            return self._noise(None if self._state is None else _generator_at(self._state))
        like = torch.empty(self._form, dtype=self._dtype, device=self._device)
        with _random_state_of(like, self._state):
            return torch.native_dropout(like, self.p, True)[1]

    def _noise(self, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty(self._form, dtype=self._dtype, device=self._device)
        return noise.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and not isinstance(x, FakeTensor) and torch.cuda.is_current_stream_capturing()


def _random_state(x: Tensor) -> Tensor | None:
    """That of x's device; None for tensors without data, for which nothing is drawn."""
    if x.is_meta or isinstance(x, FakeTensor):
        return None
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _generator_at(state: Tensor) -> torch.Generator:
    generator = torch.Generator("cpu")
    generator.set_state(state)
    return generator


@contextmanager
def _random_state_of(x: Tensor, state: Tensor | None) -> Iterator[None]:
    """Within it numbers are drawn from ``state`` on x's CUDA device; then the random state is as before."""
    if state is None:
        yield
        return
    with _drawing:
        now = torch.cuda.get_rng_state(x.device)
        torch.cuda.set_rng_state(state, x.device)
        try:
            yield
        finally:
            torch.cuda.set_rng_state(now, x.device)


def _aligned(x: Tensor) -> bool:
    """Whether x begins where a vectorised kernel can; which element gets which random number depends on it."""
    return bool(x.storage_offset() * x.element_size() % 16 == 0)


class _LeanDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drawn: Drawn) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.drawn = drawn
        return drawn.first(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("a fused dropout", PLAIN)
        return None if grad is None else ctx.drawn.applied(grad, again=False), None


class FusedDropout(nn.Dropout):
    """An ``nn.Dropout`` that :func:`auglocal_ext.fuse` has changed."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.training
            and 0 < self.p < 1
            and not self.inplace
            and recordable(input)
            and input.requires_grad
            and input.device.type in ("cpu", "cuda", "meta")  # others' random state is read otherwise, or not at all
            and input.is_contiguous()
            and _aligned(input)
        ):
            return lean_dropout(input, self.p)
        return super().forward(input)

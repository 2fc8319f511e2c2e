"""What crosses a cut beside the tensor that is handed on; it travels on that tensor, as an attribute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_ATTRIBUTE = "_auglocal_carried"


def carry(h: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """``h`` with ``tensors`` on it; what an operator such as ``detach`` makes of it does not have them."""
    if tensors and hasattr(h, _ATTRIBUTE):
        h = h.view_as(h)
    if tensors:
        setattr(h, _ATTRIBUTE, tuple(tensors))
    return h


def carried(h: Tensor) -> tuple[Tensor, ...]:
    """The tensors that :func:`carry` has put on ``h``."""
    tensors: tuple[Tensor, ...] = getattr(h, _ATTRIBUTE, ())
    return tensors


def detached(h: Tensor) -> Tensor:
    """``h.detach()`` with what it carries, detached too."""
    return carry(h.detach(), [tensor.detach() for tensor in carried(h)])


class Carrying(nn.Module):
    """Segments one after another, as a function of all that they take: ``(h, *carried) -> (h, *carried)``."""

    def __init__(self, segments: nn.Sequential) -> None:
        super().__init__()
        self.segments = segments

    def forward(self, h: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        first = getattr(self.segments[0], "first", None)
        overwritten = first is not None and first.overwritten
        # What is kept for the second run must be as it was.
        out = self.segments(carry(h.clone() if overwritten else h.view_as(h), tensors))
        return (out, *carried(out))

"""The blocks of this package, fused."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn.fusable import replaced_call
from ..nn.fuse import register
from ..nn.lean import register_lean
from ..nn.lean_act import gated
from ..nn.lean_attention import split_heads_rotated
from ..nn.lean_linear import FusedLinear
from ..nn.remade import recordable
from ..nn.residual import FusedResidual
from .blocks import BasicBlock, Bottleneck
from .transformer import SelfAttention, SwiGLU, rotary


class FusedBasicBlock(FusedResidual, BasicBlock):
    """:class:`BasicBlock` as :func:`auglocal_ext.fuse` leaves it."""


class FusedBottleneck(FusedResidual, Bottleneck):
    """:class:`Bottleneck` as :func:`auglocal_ext.fuse` leaves it."""

    is_bottleneck = True


class FusedSelfAttention(SelfAttention):
    """:class:`SelfAttention` as :func:`auglocal_ext.fuse` leaves it: q and k are rotated where they lie."""

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Of torch's linear layer it is known that nobody else has its output.
        alone = type(self.qkv) in (nn.Linear, FusedLinear) and replaced_call(self.qkv) is None
        if not (self.rotary_positions and alone and recordable(x)):
            return super().heads_of(x)
        return split_heads_rotated(self.qkv(x), self.heads, _rotate)


def _rotate(x: Tensor, back: bool) -> Tensor:
    return rotary(x, back=back)


class FusedSwiGLU(SwiGLU):
    """:class:`SwiGLU` as :func:`auglocal_ext.fuse` leaves it: ``gate_up(x)`` alone is kept."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(gated(self.gate_up(x)))
        return out


register(BasicBlock, FusedBasicBlock)
register(Bottleneck, FusedBottleneck)
register_lean(SelfAttention, FusedSelfAttention)
register_lean(SwiGLU, FusedSwiGLU, begins=True)

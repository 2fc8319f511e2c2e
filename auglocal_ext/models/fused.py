"""The residual blocks of this package, fused."""

from __future__ import annotations

from ..nn.fuse import register
from ..nn.residual import FusedResidual
from .blocks import BasicBlock, Bottleneck


class FusedBasicBlock(FusedResidual, BasicBlock):
    """:class:`BasicBlock` as :func:`auglocal_ext.fuse` leaves it."""


class FusedBottleneck(FusedResidual, Bottleneck):
    """:class:`Bottleneck` as :func:`auglocal_ext.fuse` leaves it."""

    is_bottleneck = True


register(BasicBlock, FusedBasicBlock)
register(Bottleneck, FusedBottleneck)

"""torchvision's residual blocks, fused. Imports torchvision: only :func:`auglocal_ext.fuse` imports this file."""

from __future__ import annotations

from torchvision.models import resnet

from .fuse import register
from .residual import FusedResidual


class FusedBasicBlock(FusedResidual, resnet.BasicBlock):
    """``torchvision.models.resnet.BasicBlock`` as :func:`auglocal_ext.fuse` leaves it."""


class FusedBottleneck(FusedResidual, resnet.Bottleneck):
    """``torchvision.models.resnet.Bottleneck`` as :func:`auglocal_ext.fuse` leaves it."""

    is_bottleneck = True


register(resnet.BasicBlock, FusedBasicBlock)
register(resnet.Bottleneck, FusedBottleneck)

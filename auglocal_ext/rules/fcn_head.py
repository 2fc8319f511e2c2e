"""The head of a fully convolutional network, for outputs with positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..auxiliary.base import LossSettings
from ..auxiliary.heads import AuxiliaryNetwork, Head
from ..layers import Features
from ..models.blocks import conv_bn_relu
from .base import HEADS, Network, Rule
from .heads import to_channels_first
from .options import option


@dataclass(frozen=True)
class FCNHead(Rule):
    """InfoPro's local head for segmentation: 3x3 convolution to half the channels, BatchNorm, ReLU, dropout, linear.

    The linear layer is at every position for :class:`auglocal_ext.Segmentation`, a 1x1 convolution; for a task without
    positions it follows pooling.

    Args:
        dropout: probability with which a channel is zeroed in training.

    Raises:
        ValueError: for a probability outside 0 .. 1; when wrapped, for a module that puts out anything but maps with
            height and width.

    Source: the released code of Wang et al., ICLR 2021, for Cityscapes.
    """

    dropout: float = option(0.1, "probability with which a channel is zeroed", least=0, most=1)

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        features, settings = network.features(module), network.settings(module)
        if not features.is_2d:
            raise ValueError(
                f"head 'fcn' needs feature maps with height and width, but local module {module} puts out {features}; "
                "use another head, such as 'linear'"
            )
        width = max(1, features.channels // 2)
        block = to_channels_first(features, conv_bn_relu(features.channels, width))
        head = _FCN(Features((width, *features.positions)), settings, self.dropout)
        return AuxiliaryNetwork(nn.Sequential(block), head)


class _FCN(Head):
    """Dropout and the last layer."""

    def __init__(self, features: Features, settings: LossSettings, dropout: float) -> None:
        super().__init__(settings)
        self.read = features
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Linear(features.channels, settings.task.outputs)

    def features(self, h: Tensor) -> Tensor:
        return self.dropout(h)


HEADS["fcn"] = FCNHead

"""Networks of torchvision as ``nn.Sequential`` of their layers: the other backbones of AugLocal's paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from _torch_private import unset_fake_temporarily
from torch import nn


def _blocks(stages: Iterable[nn.Module], stage: type[nn.Module]) -> list[nn.Module]:
    """The blocks of all stages; what is no stage counts as one block."""
    return [block for each in stages for block in (each.children() if type(each) is stage else (each,))]


def _ended(blocks: list[nn.Module], classifier: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier))


def mobilenet_v2() -> nn.Sequential:
    from torchvision.models import mobilenet_v2 as make

    net = make()
    return _ended(list(net.features), net.classifier)


def efficientnet_b0() -> nn.Sequential:
    from torchvision.models import efficientnet_b0 as make

    net = make()
    return _ended(_blocks(net.features, nn.Sequential), net.classifier)


def regnet_x_400mf() -> nn.Sequential:
    from torchvision.models import regnet

    with unset_fake_temporarily():  # it computes widths with tensors
        sizes = regnet.BlockParams.from_init_params(depth=22, w_0=24, w_a=24.48, w_m=2.54, group_width=16)
    net = regnet.RegNet(sizes)
    return _ended([net.stem, *_blocks(net.trunk_output, regnet.AnyStage)], net.fc)


#: 19, 18 and 23 local layers; the outputs are those of torchvision's models with the same weights.
BACKBONES: dict[str, Callable[[], nn.Sequential]] = {
    "torchvision:mobilenet_v2": mobilenet_v2,
    "torchvision:efficientnet_b0": efficientnet_b0,
    "torchvision:regnet_x_400mf": regnet_x_400mf,
}

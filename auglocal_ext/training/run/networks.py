"""The network of a run: by its name, and cut into local modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...local_sequential import LocalSequential, localize
from ...models import default_classes, is_segmentation
from ...partition import Balanced
from ...rules import Rule
from ...tasks import Classification, Segmentation
from ..data.datasets import MASKS
from ..errors import SettingsError


def check_data(network: str, dataset: str, mixes: bool = False) -> None:
    """SettingsError unless the network ``network`` learns what the data set ``dataset`` holds: classes, or masks."""
    if is_segmentation(network):
        if dataset != MASKS:
            raise SettingsError(
                f"--network {network} puts out a class for every pixel, but the data has one class per image: give it "
                "images and masks (train/images, train/masks, test/images, test/masks), or choose another network"
            )
        if mixes:
            raise SettingsError("--mixup and --cutmix mix images that have one class each, not masks: leave them out")
    elif dataset == MASKS:
        raise SettingsError(
            f"--network {network} puts out one class per image, but the data are images and masks: choose a network "
            "for segmentation, such as torchvision:fcn_resnet50 or torchvision:deeplabv3_resnet50"
        )


def task_of(name: str, num_classes: int | None = None) -> Classification | Segmentation:
    """What the network ``name`` is for, with its own number of classes unless another is said."""
    classes = default_classes(name) if num_classes is None else num_classes
    return Segmentation(classes) if is_segmentation(name) else Classification(classes)


def cut(
    network: nn.Module,
    rule: Rule,
    task: Classification | Segmentation,
    input_shape: Sequence[int],
    modules: int | Sequence[int] | Balanced | None = None,
    *,
    fused: bool = True,
) -> LocalSequential:
    """``network`` cut into local modules: an ``nn.Sequential`` between its children, any other by ``localize``.

    Of the dictionary that torchvision's segmentation networks return ``"out"`` is learned.
    """
    if isinstance(network, nn.Sequential):
        return LocalSequential(network, rule, task=task, input_shape=input_shape, modules=modules, fused=fused)
    return localize(
        network,
        rule,
        task=task,
        input_shape=input_shape,
        modules=modules,
        fused=fused,
        output="out" if isinstance(task, Segmentation) else None,
    )

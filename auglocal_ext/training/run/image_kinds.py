"""Runs on images that have a class each, and on images with masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...models import default_input_shape, network_by_name
from ...tasks import Classification, Segmentation
from ..config.train_config import TrainConfig
from ..data.batches import Batches, make_batches
from ..data.datasets import MASKS, ImageArrays, Images, default_workers, detect, load_data
from ..data.mixing import MixedBatches
from ..data.order import Part
from ..data.text import NAME as TEXT
from ..errors import SettingsError
from ..paths import user_path
from .kind import Data, Kind, RunTask
from .logs import IMAGES
from .processes import Alone


class _OfImages(Kind):
    unit, held_out = IMAGES, "the test images"
    #: What the opening says beside the number of images.
    beside = ""

    @abstractmethod
    def task_of(self, outputs: int) -> Classification | Segmentation:
        """What is learned of so many classes."""

    def load(
        self, config: TrainConfig, bars: bool, team: Alone, before_writing: Callable[[str], None] | None = None
    ) -> Images:
        dataset = detect(user_path(config.data)) if config.dataset == "auto" else config.dataset
        self.check(config, dataset)  # before all of them are read
        return load_data(
            config.data,
            dataset,
            image_size=config.image_size,
            streamed_size=default_input_shape(config.network)[1],
            train_images=config.train_images,
            seed=config.seed,
            workers=config.workers,
            progress=bars,
        )

    def facts(self, data: Data) -> dict[str, Any]:
        images = cast("Images", data)
        return {
            "classes": list(images.classes),
            "train_images": images.train_count,
            "test_images": images.test_count,
            "input_shape": list(images.input_shape),
            "in_memory": isinstance(images, ImageArrays),
        }

    def described(self, facts: Mapping[str, Any]) -> str:
        size = " x ".join(map(str, facts["input_shape"][1:]))
        return (
            f"{facts['train_images']:,} train and {facts['test_images']:,} test images of {size}{self.beside}, "
            f"{len(facts['classes'])} classes"
        )

    def task(self, facts: Mapping[str, Any]) -> RunTask:
        return self.task_of(len(facts["classes"]))

    def network(self, config: TrainConfig, task: RunTask, input_shape: tuple[int, ...]) -> nn.Module:
        return network_by_name(
            config.network,
            task.outputs,
            config.network_weights,
            width=config.width,
            image_size=input_shape[1] if input_shape[1] == input_shape[2] else None,
        )

    def batches(self, config: TrainConfig, data: Data, task: RunTask, device: torch.device, part: Part) -> Batches:
        recipe = config.recipe_values
        batches = make_batches(
            cast("Images", data),
            config.augmentation,
            batch_size=recipe.batch_size,
            seed=config.seed,
            device=device,
            channels_last=config.channels_last,
            workers=default_workers() if config.workers is None else config.workers,
            part=part,
        )
        if not config.mixes:
            return batches
        return MixedBatches(
            batches,
            task.outputs,
            mixup=config.mixup or 0.0,
            cutmix=config.cutmix or 0.0,
            seed=config.seed,
            led=part.led,
        )

    def per_sample(self, input_shape: tuple[int, ...]) -> int:
        return 1

    def tested(self, task: RunTask, targets: Tensor) -> int:
        return len(targets)


class ImageRuns(_OfImages):
    """Images that have one class each."""

    def check(self, config: TrainConfig, dataset: str) -> None:
        if dataset == MASKS:
            raise SettingsError(
                f"--network {config.network} puts out one class per image, but the data are images and masks: choose a "
                "network for segmentation, such as torchvision:fcn_resnet50 or torchvision:deeplabv3_resnet50"
            )
        _refuse_text(config, dataset)

    def task_of(self, outputs: int) -> Classification:
        return Classification(outputs)


class MaskRuns(_OfImages):
    """Images with masks."""

    beside = " with masks"

    def check(self, config: TrainConfig, dataset: str) -> None:
        _refuse_text(config, dataset)
        if dataset != MASKS:
            raise SettingsError(
                f"--network {config.network} puts out a class for every pixel, but the data has one class per image: "
                "give it images and masks (train/images, train/masks, test/images, test/masks), or choose another "
                "network"
            )
        if config.mixes:
            raise SettingsError("--mixup and --cutmix mix images that have one class each, not masks: leave them out")

    def task_of(self, outputs: int) -> Segmentation:
        return Segmentation(outputs)


def _refuse_text(config: TrainConfig, dataset: str) -> None:
    if dataset == TEXT:
        raise SettingsError(
            f"--network {config.network} takes images, but {config.data} is a text: choose --network gpt, or give it a "
            "folder of images"
        )

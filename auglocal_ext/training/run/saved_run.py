"""A trained network out of its run folder, and the images it was trained on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..config.train_config import TrainConfig, from_dict, pick_device
from ..data.batches import Batches, make_batches
from ..data.datasets import ImageArrays, ImageFiles, Images, MaskFiles, default_workers
from ..data.folder import few
from ..errors import CheckpointError, SettingsError
from ..paths import user_path
from . import saving
from .learner import make_network
from .networks import task_of
from .trainer import load_images


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A run as its checkpoint has it.

    Attributes:
        path: the run folder.
        config: its settings, resolved, as they are stored.
        network: with the trained weights, in eval mode on ``device``; for backpropagation the network itself.
        classes: names of the classes, in the order of the labels.
        input_shape: channels, height, width of an image.
        epochs: how many are finished.
        device: where the network is and batches are made.
    """

    path: Path
    config: TrainConfig
    network: nn.Module
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    epochs: int
    device: torch.device

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def images_config(
        self, data: str | Path | None = None, train_images: int | None = None, seed: int | None = None
    ) -> TrainConfig:
        """The settings that say which images :meth:`images` loads."""
        own = self.config.train_images
        if train_images is not None and own is not None and train_images > own:
            raise SettingsError(
                f"{self.path} was trained on {own} images: choose at most as many training images, not {train_images}"
            )
        # Parts drawn with one seed lie in each other, so a smaller one holds only images the run was trained on.
        draw = self.config.seed if own is not None or seed is None else seed
        return replace(
            self.config,
            data=self.config.data if data is None else str(data),
            train_images=own if train_images is None else train_images,
            seed=draw,
        )

    def images(
        self,
        data: str | Path | None = None,
        train_images: int | None = None,
        seed: int | None = None,
        bars: bool = False,
    ) -> Images:
        """The data set of the run, read from ``data``, or from where it lay when the run was trained.

        ``train_images`` takes fewer training images than the run had, drawn among its own by ``seed``. Raises DataError
        or SettingsError, as :func:`load_data` does, and CheckpointError for images the network was not trained on.
        """
        images = load_images(self.images_config(data, train_images, seed), bars)
        self.check(images)
        return images

    def check(self, images: Images) -> None:
        """CheckpointError if classes or shape of the images are not those the network was trained on."""
        for what, trained, found in (
            ("classes", self.classes, images.classes),
            ("images of shape", self.input_shape, images.input_shape),
        ):
            if tuple(trained) != tuple(found):
                expected, came = (few([*map(str, values)]) for values in (trained, found))
                raise CheckpointError(
                    f"{self.path} was trained on {what} {expected}, this data has {came}; give the folder of its own "
                    "data set"
                )

    def source(
        self,
        data: str | Path | Images | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        train_images: int | None = None,
    ) -> Batches:
        """Batches of the run's images on its device, with its own augmentation and normalisation.

        Args:
            data: where the images now lie, or the images themselves; default as stored.
            batch_size: default that of the run.
            seed: of order and augmentation, and of ``train_images``; default that of the run.
            train_images: fewer training images than the run had, see :meth:`images`; not for images themselves.
        """
        if isinstance(data, ImageArrays | ImageFiles | MaskFiles):
            images = data
            self.check(images)
        else:
            images = self.images(data, train_images, seed)
        recipe = self.config.recipe_values
        return make_batches(
            images,
            recipe.augmentation,
            batch_size=recipe.batch_size if batch_size is None else batch_size,
            seed=self.config.seed if seed is None else seed,
            device=self.device,
            channels_last=self.config.channels_last,
            workers=default_workers() if self.config.workers is None else self.config.workers,
        )


def load_run(path: str | Path, device: str = "auto") -> SavedRun:
    """The network of a run, rebuilt by its stored settings, with the weights of its checkpoint.

    Args:
        path: the run folder, or the checkpoint in it.
        device: ``"auto"`` or torch's name; it need not be the device of the training.

    Raises:
        CheckpointError: if there is no checkpoint, or it is not one of this version.
        SettingsError: for a device that is not there.
    """
    target = pick_device(device)
    path = user_path(path)
    given = os.path.isfile(path) or path.name == saving.FOLDER and os.path.isdir(path)
    file = path if given else saving.find(path)
    if file is None:
        raise CheckpointError(
            f"{path}: expected the folder of a run, as `train --output` makes it, with a {saving.FILE} in it, or a "
            f"folder {saving.FOLDER}; "
            + ("there is none in it" if os.path.isdir(path) else "there is no such file or folder")
        )
    state = saving.read(file)
    facts = state["data"]
    classes, shape = tuple(facts["classes"]), tuple(facts["input_shape"])
    try:
        config = from_dict(state["settings"])
        fresh = replace(config, network_weights=None)  # the checkpoint has the weights
        network = make_network(fresh, shape, task_of(config.network, len(classes)), target)
        saving.load_network(file, state, network)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file's are of no particular kind
        # torch lists every weight that does not fit.
        reason = "\n".join(line[:200] for line in str(error).splitlines()[:3])
        raise CheckpointError(
            f"{file}: its settings no longer make the network of its weights: another version wrote it, train it "
            f"again or analyse it with that version ({reason})"
        ) from error
    epochs = state["progress"]["epochs"]
    return SavedRun(file.parent, config, network.eval(), classes, shape, epochs, target)

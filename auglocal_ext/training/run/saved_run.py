"""A trained network out of its run folder, and the images or the text it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..config.train_config import TrainConfig, from_dict, pick_device
from ..data.batches import Batches
from ..data.datasets import ImageArrays, ImageFiles, Images, MaskFiles
from ..data.folder import few
from ..data.order import WHOLE
from ..data.text import Text
from ..errors import CheckpointError, SettingsError
from ..paths import user_path
from . import saving
from .kind import Data
from .kinds import kind_of
from .learners import make_network
from .processes import Alone


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A run as its checkpoint has it.

    Attributes:
        path: the run folder.
        config: its settings, resolved, as they are stored.
        network: with the trained weights, in eval mode on ``device``; for backpropagation the network itself.
        classes: names of the classes, in the order of the labels; none of a text.
        input_shape: channels, height, width of an image, or the tokens in a window of text.
        facts: of the data, as ``config.json`` has them.
        epochs: how many are finished.
        device: where the network is and batches are made.
    """

    path: Path
    config: TrainConfig
    network: nn.Module
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    facts: Mapping[str, Any]
    epochs: int
    device: torch.device

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def images_config(
        self, data: str | Path | None = None, train_images: int | None = None, seed: int | None = None
    ) -> TrainConfig:
        """The settings that say which images :meth:`images` loads; SettingsError for a run on text."""
        self._refuse_kind(text=True)
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
            output=str(self.path),  # the folder may have been moved
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
        """The images of the run, read from ``data``, or from where they lay when the run was trained.

        ``train_images`` takes fewer training images than the run had, drawn among its own by ``seed``. Raises DataError
        or SettingsError, as :func:`load_data` does, SettingsError for a run on text, and CheckpointError for images the
        network was not trained on.
        """
        config = self.images_config(data, train_images, seed)
        images = kind_of(config.network).load(config, bars, Alone(self.device))
        self.check(images)
        return cast("Images", images)

    def text(self, data: str | Path | None = None, folder: str | Path | None = None, bars: bool = False) -> Text:
        """The text of the run, or the one in ``data``, as tokens of the run's tokenizer.

        The bytes of a file are read where they are, and tokens that the run has written are taken from its folder.

        Args:
            data: a text file or a folder of .txt files; default the run's own, where it lay.
            folder: for ``tokens.bin``, if there is none of this text in the run folder. Without it nothing is written.
            bars: show bars on a terminal.

        Raises:
            SettingsError: for a run on images, and where tokens would have to be written without a ``folder``.
            DataError, OutputError: as :func:`load_text`.
            CheckpointError: for a text whose tokens are not the network's, and without ``data`` for one that has
                changed since the training.
        """
        self._refuse_kind(text=False)
        own = self.config
        config = replace(
            own, data=own.data if data is None else str(data), output=str(self.path if folder is None else folder)
        )

        def refuse(checksum: str) -> None:
            raise SettingsError(
                f"{config.data}: its tokens are not among those in {self.path}, and reading a run writes none: name "
                "another folder for them, text(data, folder=DIR), whose result source() takes too"
            )

        found = kind_of(own.network).load(config, bars, Alone(self.device), refuse if folder is None else None)
        self.check(found)
        text = cast("Text", found)
        if data is None and text.file.checksum != self.facts["checksum"]:
            raise CheckpointError(
                f"{config.data} is not what {self.path} was trained on: it, or the tokenizer, has changed since; to "
                "read it as it is now, name it: text(data) or source(data)"
            )
        return text

    def _refuse_kind(self, *, text: bool) -> None:
        """SettingsError if the run was trained on text, or if not."""
        if self.config.on_text == text:
            held, method = ("text", "text()") if text else ("images", "images()")
            raise SettingsError(f"{self.path} was trained on {held}: call {method}, or source() for batches")

    def check(self, images: Data) -> None:
        """CheckpointError if classes, vocabulary or shape of the data are not those the network was trained on."""
        facts = kind_of(self.config.network).facts(images)
        shape = "windows of" if isinstance(images, Text) else "images of shape"
        for key, what in (("classes", "classes"), ("vocabulary", "a vocabulary of"), ("input_shape", shape)):
            trained, found = self.facts.get(key), facts.get(key)
            if trained != found:
                expected, came = (few([*map(str, _listed(values))]) for values in (trained, found))
                raise CheckpointError(
                    f"{self.path} was trained on {what} {expected}, this data has {came}; give the folder of its own "
                    "data set"
                )

    def source(
        self,
        data: str | Path | Data | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        train_images: int | None = None,
    ) -> Batches:
        """Batches of the run's images on its device, with its own augmentation and normalisation, or of its text.

        Args:
            data: where images or text now lie, or they themselves; default as stored.
            batch_size: default that of the run.
            seed: of order and augmentation, and of ``train_images``; default that of the run.
            train_images: fewer training images than the run had, see :meth:`images`; not for images themselves.

        Raises:
            SettingsError, DataError, CheckpointError: as :meth:`images` and :meth:`text`, and for ``train_images`` of
                images themselves or of a text.
        """
        ready = isinstance(data, ImageArrays | ImageFiles | MaskFiles | Text)
        if train_images is not None and (ready or self.config.on_text):
            what = "images that are passed as they are" if ready else f"{self.path}, which was trained on text"
            raise SettingsError(f"train_images={train_images} cannot be chosen of {what}: leave it out")
        if isinstance(data, ImageArrays | ImageFiles | MaskFiles | Text):
            images: Data = data
            self.check(images)
        elif self.config.on_text:
            images = self.text(data)
        else:
            images = self.images(data, train_images, seed)
        own = self.config
        config = replace(
            own,
            batch_size=own.batch_size if batch_size is None else batch_size,
            seed=own.seed if seed is None else seed,
            mixup=None,
            cutmix=None,
        )
        kind = kind_of(own.network)
        return kind.batches(config, images, kind.task(self.facts), self.device, WHOLE)


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


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
    classes, shape = tuple(facts.get("classes", ())), tuple(facts["input_shape"])
    try:
        config = from_dict(state["settings"])
        fresh = replace(config, network_weights=None)  # the checkpoint has the weights
        network = make_network(fresh, shape, kind_of(config.network).task(facts), target)
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
    return SavedRun(file.parent, config, network.eval(), classes, shape, facts, epochs, target)

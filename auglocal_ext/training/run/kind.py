"""What the trainer asks about what it trains on: images, images with masks, text. Each of them is a kind of run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...tasks import Classification, LanguageModelling, Segmentation
from ..config.train_config import TrainConfig
from ..data.batches import Batches
from ..data.datasets import Images
from ..data.order import Part
from ..data.text import Text
from .processes import Alone

RunTask = Classification | Segmentation | LanguageModelling

#: What a run learns from.
Data = Images | Text


class Kind(ABC):
    """Images, images with masks, or text.

    Attributes:
        unit: what is counted, in the plural; one of ``logs.IMAGES`` and ``logs.TOKENS``.
        held_out: what the test is on, for a person.
    """

    unit: str
    held_out: str

    @abstractmethod
    def check(self, config: TrainConfig, dataset: str) -> None:
        """SettingsError unless the network of ``config`` learns what the data set holds."""

    def foreseen(self, config: TrainConfig) -> Mapping[str, Any] | None:
        """The facts that a network is made by, where loading the data writes files: what is refused comes first.

        Raises DataError or SettingsError as ``load`` does.
        """
        return None

    @abstractmethod
    def load(
        self, config: TrainConfig, bars: bool, team: Alone, before_writing: Callable[[str], None] | None = None
    ) -> Data:
        """The data that ``config`` names; collective. Raises DataError or SettingsError.

        Where that writes files, ``before_writing`` is called first, in one process, with the checksum of the data.
        """

    @abstractmethod
    def facts(self, data: Data) -> dict[str, Any]:
        """What config.json and checkpoints say of the data; with others a run is not resumed."""

    @abstractmethod
    def described(self, facts: Mapping[str, Any]) -> str:
        """The same in a line for a person."""

    @abstractmethod
    def task(self, facts: Mapping[str, Any]) -> RunTask:
        """What is learned of data with these facts."""

    @abstractmethod
    def network(self, config: TrainConfig, task: RunTask, input_shape: tuple[int, ...]) -> nn.Module:
        """The network with fresh weights, or those of its file; ValueError for options that it does not have."""

    @abstractmethod
    def batches(self, config: TrainConfig, data: Data, task: RunTask, device: torch.device, part: Part) -> Batches:
        """The batches of the resolved ``config``, of a replica's part of each; SettingsError if there are none."""

    @abstractmethod
    def per_sample(self, input_shape: tuple[int, ...]) -> int:
        """Units in a sample, an image or a window of text."""

    @abstractmethod
    def tested(self, task: RunTask, targets: Tensor) -> int:
        """Units of a test batch that count, by which its loss is weighted."""

    def bytes_per_token(self, data: Data) -> float:
        """Of a text."""
        return 1.0

    def sampler(self, config: TrainConfig, data: Data) -> Sampler | None:
        """What writes a sample of the network's output after each epoch."""
        return None


class Sampler(ABC):
    """Writes a sample of what the network puts out, a file of the run folder."""

    @abstractmethod
    def open(self, output: Path, epoch: int) -> None:
        """Go on with a run that has come to ``epoch``."""

    @abstractmethod
    def sample(
        self, predict: Callable[[Tensor], Tensor | None], epoch: int, team: Alone, stop: Callable[[], bool]
    ) -> str:
        """A sample, for the terminal; collective.

        Args:
            predict: the network's output, None in processes that do not have it.
            stop: whether this process was asked to stop, which ends a sample early.
        """

    @abstractmethod
    def write(self, output: Path, epoch: int, sample: str) -> None:
        """Add it to the file."""

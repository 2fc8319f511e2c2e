"""A text for a language model: its tokens, split into training and validation, in windows of a context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, SettingsError
from ..paths import user_path
from .order import WHOLE, Part, epoch_order, mixed_seed
from .text_files import TokenFile, token_file

NAME = "text"

IGNORED = -100
"""Target where a window reaches beyond the text."""

VALIDATION = 20
"""One token in so many, the last ones, is for validation."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text as tokens; the last 5 % are for validation.

    A window of T tokens predicts, at each, the next one. Training windows do not overlap and begin at an offset that is
    drawn for each epoch; there is one less of them than fit, so that their number does not depend on it. Those of
    validation follow one upon the other and predict each of its tokens once.

    Attributes:
        file: the tokens.
        context: T.

    Raises:
        DataError: for a text that is too short.
    """

    file: TokenFile
    context: int

    def __post_init__(self) -> None:
        check_length(self.file.path, self.file.tokens, self.context)

    @property
    def name(self) -> str:
        return NAME

    @property
    def test_tokens(self) -> int:
        """Those for validation."""
        return self.file.tokens // VALIDATION

    @property
    def train_tokens(self) -> int:
        return train_tokens(self.file.tokens)

    @property
    def input_shape(self) -> tuple[int]:
        """Of a window."""
        return (self.context,)

    @property
    def train_count(self) -> int:
        """Windows in an epoch."""
        return self.train_tokens // self.context - 1

    @property
    def test_count(self) -> int:
        return -(-self.test_tokens // self.context)

    @property
    def bytes_per_token(self) -> float:
        """Of the whole text."""
        return self.file.source_bytes / self.file.tokens


def train_tokens(tokens: int) -> int:
    """Those of so many that are for training."""
    return tokens - tokens // VALIDATION


def check_length(path: str, tokens: int, context: int) -> None:
    """DataError for a text of too few tokens."""
    if tokens < VALIDATION:
        counted = "1 token is" if tokens == 1 else f"{tokens} tokens are"
        raise DataError(f"{path}: {counted} too few; expected at least {VALIDATION}")
    found, least = train_tokens(tokens), 2 * context
    if found < least:
        raise DataError(
            f"{path}: {tokens} tokens are too few: {found} of them are for training, and windows of --context "
            f"{context} need {least} there; take a longer text or a shorter context"
        )


def load_text(
    data: str | Path, context: int, folder: Path, *, tokenizer: str | None = None, progress: bool = False
) -> Text:
    """The text in a file, or in the .txt files of a folder, as tokens.

    See :func:`auglocal_ext.training.data.text_files.token_file`. Raises DataError for a text that cannot be read or is
    too short.
    """

    def check(tokens: int) -> None:
        check_length(str(user_path(data)), tokens, context)

    return Text(token_file(data, tokenizer, folder, check=check, progress=progress), context)


class TextBatches:
    """Windows of tokens: inputs (B, T) and targets (B, T), int64 on the device, read from the file when they are used.

    In epoch e, training windows begin at ``o + i T`` with an offset o in 0 .. T - 1, in the order of a permutation;
    both follow from seed and epoch alone.
    """

    def __init__(self, text: Text, *, batch_size: int, seed: int, device: torch.device, part: Part = WHOLE) -> None:
        if batch_size % part.count:
            raise SettingsError(
                f"--batch-size {batch_size} is that of all replicas together, and {part.count} replicas cannot have "
                f"equal parts of it: choose a multiple of {part.count}"
            )
        if min(text.train_count, text.test_count) < part.count:
            raise SettingsError(
                f"{text.train_count} training and {text.test_count} validation windows of {text.context} tokens are "
                f"too few for {part.count} replicas"
            )
        self.steps = text.train_count // batch_size + (text.train_count % batch_size >= part.count)
        self._text, self._part = text, part
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._tokens = text.file.mapped()

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(self._text.train_count, self._seed, epoch).numpy()
        offset = self.offset(epoch)
        for step in range(first, self.steps):
            picked = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield self._windows(offset + self._text.context * picked[self._part.train(len(picked))])

    def offset(self, epoch: int) -> int:
        """Where the first window of an epoch begins."""
        return mixed_seed(self._seed, epoch, 0) % self._text.context

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self._text.train_tokens - 1  # its successor is the first token of validation
        for here in self._part.test(self._text.test_count, self._batch_size):
            yield self._windows(begin + self._text.context * np.arange(here.start, here.stop))

    def _windows(self, starts: Sequence[int] | np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        context = self._text.context
        windows = np.full((len(starts), context + 1), IGNORED, np.int64)
        for window, start in zip(windows, starts, strict=True):
            found = self._tokens[start : start + context + 1]
            window[: len(found)] = found
        both = torch.from_numpy(windows)
        if self._device.type == "cuda":
            both = both.pin_memory().to(self._device, non_blocking=True)
        return both[:, :-1].clamp(min=0), both[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass

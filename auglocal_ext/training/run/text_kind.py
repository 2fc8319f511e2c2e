"""Runs on text: a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...models import gpt
from ...tasks import LanguageModelling
from ..config.language_models import DEFAULTS, network_options
from ..config.train_config import TrainConfig
from ..data.batches import Batches
from ..data.datasets import detect
from ..data.order import Part
from ..data.text import IGNORED, NAME, Text, TextBatches, check_length
from ..data.text_files import BYTES, TokenFile, token_file, vocabulary_to_write
from ..errors import SettingsError
from ..paths import user_path
from .kind import Data, Kind, RunTask, Sampler
from .logs import TOKENS
from .processes import Alone
from .text_samples import TextSampler


class TextRuns(Kind):
    """A text, in bytes or in a tokenizer's tokens."""

    unit, held_out = TOKENS, "the validation text"

    def check(self, config: TrainConfig, dataset: str) -> None:
        if dataset != NAME:
            raise SettingsError(
                f"--network {config.network} is a language model, but {config.data} holds images: give it a text file "
                "or a folder of .txt files (with --dataset text if it has folders train and test), or choose another "
                "network"
            )

    def foreseen(self, config: TrainConfig) -> Mapping[str, Any] | None:
        self._check_data(config)
        vocabulary = vocabulary_to_write(config.data, config.tokenizer)
        return None if vocabulary is None else {"vocabulary": vocabulary, "input_shape": [_context(config)]}

    def _check_data(self, config: TrainConfig) -> None:
        unknown = config.dataset == "auto"
        self.check(config, detect(user_path(config.data), text=True) if unknown else config.dataset)

    def load(
        self, config: TrainConfig, bars: bool, team: Alone, before_writing: Callable[[str], None] | None = None
    ) -> Text:
        self._check_data(config)
        context, found = _context(config), list[TokenFile]()
        data, output = user_path(config.data), user_path(config.output)

        def check(tokens: int) -> None:
            check_length(str(data), tokens, context)

        def read() -> None:
            made = token_file(data, config.tokenizer, output, check=check, first=before_writing, progress=bars)
            found.append(made)

        team.on_first(read)
        file = team.everyone(found[0] if found else None)[0]
        return Text(cast("TokenFile", file), context)

    def facts(self, data: Data) -> dict[str, Any]:
        text = cast("Text", data)
        return {
            "vocabulary": text.file.vocabulary,
            "train_tokens": text.train_tokens,
            "test_tokens": text.test_tokens,
            "input_shape": list(text.input_shape),
            "bytes_per_token": text.bytes_per_token,
            "checksum": text.file.checksum,
        }

    def described(self, facts: Mapping[str, Any]) -> str:
        of_bytes = facts["bytes_per_token"] == 1 and facts["vocabulary"] == BYTES
        tokens = "bytes" if of_bytes else f"tokens of {facts['bytes_per_token']:.2f} bytes"
        return (
            f"text of {facts['train_tokens']:,} {tokens} for training and {facts['test_tokens']:,} for validation, "
            f"vocabulary {facts['vocabulary']:,}, windows of {facts['input_shape'][0]}"
        )

    def task(self, facts: Mapping[str, Any]) -> LanguageModelling:
        return LanguageModelling(facts["vocabulary"], ignore_index=IGNORED)

    def network(self, config: TrainConfig, task: RunTask, input_shape: tuple[int, ...]) -> nn.Module:
        return gpt(vocab_size=task.outputs, **network_options(vars(config)))

    def batches(self, config: TrainConfig, data: Data, task: RunTask, device: torch.device, part: Part) -> Batches:
        batch_size = config.recipe_values.batch_size
        return TextBatches(cast("Text", data), batch_size=batch_size, seed=config.seed, device=device, part=part)

    def per_sample(self, input_shape: tuple[int, ...]) -> int:
        return input_shape[0]

    def tested(self, task: RunTask, targets: Tensor) -> int:
        return int(task.counted(targets))

    def bytes_per_token(self, data: Data) -> float:
        return cast("Text", data).bytes_per_token

    def sampler(self, config: TrainConfig, data: Data) -> Sampler | None:
        if not config.sample:
            return None
        text = cast("Text", data)
        return TextSampler(config.sample, text.context, text.file.tokenizer, config.seed)


def _context(config: TrainConfig) -> int:
    return config.context_length or int(DEFAULTS["context_length"])

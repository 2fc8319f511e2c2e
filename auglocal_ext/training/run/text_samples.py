"""A sample of text after each epoch, written by the network token by token."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.order import mixed_seed
from ..data.text_files import open_tokenizer
from ..errors import CheckpointError
from .kind import Sampler
from .processes import Alone
from .writing import replaced, to

SAMPLES = "samples.txt"

_START = "\n"
_HEADING = re.compile(r"^=== epoch (\d+) ===$", re.M)


class TextSampler(Sampler):
    """Draws each token from the network's distribution, given up to T tokens before it; the first follows a line end.

    All T positions are computed again for each token, without a cache of keys and values. Random numbers come from a
    generator of its own, by seed and epoch, so training is the same with and without samples.

    Args:
        length: characters; with a tokenizer at most as many tokens are drawn.
        context: T.
        tokenizer: its file; None for bytes.
        seed: of the run.
    """

    def __init__(self, length: int, context: int, tokenizer: str | None, seed: int) -> None:
        self._length, self._context, self._seed = length, context, seed
        self._tokenizer: Any = None if tokenizer is None else open_tokenizer(tokenizer)

    def open(self, output: Path, epoch: int) -> None:
        """Keep what was sampled up to an epoch."""
        path = output / SAMPLES
        kept = ""
        if epoch and path.is_file():
            try:
                text = path.read_bytes().decode()  # line ends as they were sampled
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; move it away to go on without it") from error
            later = next((found.start() for found in _HEADING.finditer(text) if int(found[1]) > epoch), len(text))
            kept = text[:later]
        with replaced(path) as file:
            file.write(kept.encode())

    def write(self, output: Path, epoch: int, sample: str) -> None:
        path = output / SAMPLES
        with to(path), path.open("a", encoding="utf-8", newline="") as file:
            file.write(f"=== epoch {epoch} ===\n{sample}\n\n")

    def sample(
        self, predict: Callable[[Tensor], Tensor | None], epoch: int, team: Alone, stop: Callable[[], bool]
    ) -> str:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, epoch, 1))
        tokens = self._encoded(_START) or [0]
        first = len(tokens)
        while len(tokens) - first < self._length and len(self._decoded(tokens[first:])) < self._length:
            window = tokens[-self._context :]
            x = torch.zeros(1, self._context, dtype=torch.int64)  # later positions do not reach back to earlier ones
            x[0, : len(window)] = torch.tensor(window)
            logits = predict(x.to(team.device))
            drawn = None
            if logits is not None:
                shares = logits[0, len(window) - 1].double().softmax(0).cpu()
                drawn = int(torch.multinomial(shares, 1, generator=generator))
            told = team.everyone((drawn, stop()))
            tokens.append(next(token for token, _ in told if token is not None))
            if any(asked for _, asked in told):
                break
        return self._decoded(tokens[first:])[: self._length]

    def _encoded(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return list(text.encode())
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _decoded(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return bytes(tokens).decode(errors="replace")
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

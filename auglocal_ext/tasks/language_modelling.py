"""Language modelling: a token for every position."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.features import Features
from ..ops import labels
from ..ops.linear_cross_entropy import linear_cross_entropy
from .base import Scored, Task, check_samples, wide
from .classification import check_options

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LanguageModelling(Task):
    """``CE(output, y) + z logsumexp(output)^2``: the mean over the positions that count, of ``(N, T, vocab_size)``.

    Targets are tokens ``(N, T)``, integers: those to be predicted at each position, so for a decoder the inputs shifted
    by one. Whether a position may depend on later ones is a matter of the network. Auxiliary networks mix no positions
    themselves: heads that pool, and blocks that would need another number of positions, are refused. A batch in which
    every position is ignored has the loss 0 and zero gradients.

    No logits are made in training, nor by :meth:`auglocal_ext.LocalSequential.score`: product and loss are one op,
    :func:`auglocal_ext.ops.linear_cross_entropy`, in heads, and in the network where it ends in an ``nn.Linear``
    without hooks; a model wrapped by ``localize`` must return what that layer makes.
    :attr:`auglocal_ext.LocalOutput.output` then has a shape of ``(N, T, 0)``; ``net(x)`` makes the logits. A subclass
    with a loss, count, score or readout of its own gets logits everywhere.

    The sum of ``-log p`` and the number of right tokens are counted; the metric is the perplexity
    ``exp(mean of -log p)``, in which label smoothing and z-loss have no part.

    Args:
        vocab_size: V, at least 2.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        ignore_index: target of positions that count nowhere.
        z_loss: z, at least 0; 1e-4 in PaLM (Chowdhery et al., 2022).

    Raises:
        ValueError: for an option out of range.
    """

    metric = "perplexity"
    count_shape = (2,)
    dense = True
    keeps_positions = True

    def __init__(
        self, vocab_size: int, *, label_smoothing: float = 0.0, ignore_index: int = -100, z_loss: float = 0.0
    ) -> None:
        super().__init__(vocab_size)
        check_options(self.outputs, label_smoothing, ignore_index, "a vocabulary has at least two tokens")
        if isinstance(z_loss, bool) or not isinstance(z_loss, int | float) or not 0 <= z_loss < math.inf:
            raise ValueError(f"z_loss must be a number of at least 0, got {z_loss!r}")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.z_loss = z_loss

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.outputs

    @property
    def fuses_readout(self) -> bool:
        own = ("readout", "score", "readout_score", "loss", "count")
        return all(getattr(type(self), name) is getattr(LanguageModelling, name) for name in own)

    @property
    def expected_output(self) -> str:
        return f"(N, T, vocab_size) = (N, T, {self.outputs}): logits for every position"

    def check_output(self, shape: tuple[int, ...], whose: str) -> None:
        if len(shape) != 2 or shape[1] != self.outputs:
            found = ", ".join(["N", *map(str, shape)])
            raise ValueError(f"{whose} has shape ({found}), expected {self.expected_output}")

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)
        expected = f"tokens ({samples}, T), integers"
        found = f"got {tuple(target.shape)} in {target.dtype}"
        if target.dim() != 2:
            raise ValueError(f"expected {expected}; {found}: pass the token to be predicted at each position")
        if target.dtype not in _INTEGERS:
            raise TypeError(f"expected {expected}; {found}: convert tokens with target.long()")
        if target.numel() == 0:
            raise ValueError(f"expected {expected}; {found}: there are no positions")

    def invalid(self, target: Tensor) -> Tensor:
        return labels.bad_labels(target.long(), self.outputs, self.ignore_index)

    def complaint(self, target: Tensor, invalid: Tensor) -> str:
        index = tuple(invalid.nonzero()[0].tolist())
        return (
            f"token {int(target[index])} at (sample, position) {index} is out of range: expected "
            f"{labels.expected(self.outputs, self.ignore_index)}; {int(invalid.sum())} of {target.numel()} are wrong. "
            "Check vocab_size, ignore_index and the tokenizer"
        )

    def late_complaint(self, count: int) -> str:
        return (
            f"{count} tokens of earlier batches were out of range: expected "
            f"{labels.expected(self.outputs, self.ignore_index)}. They were treated as ignored. Check vocab_size, "
            "ignore_index and the tokenizer; checking one batch on the CPU names the position"
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits, target = self._flat(output, target)
        total = F.cross_entropy(
            logits, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction="sum"
        )
        counts = target != self.ignore_index
        if self.z_loss:
            total = total + self.z_loss * torch.where(counts, logits.logsumexp(1).square(), 0).sum()
        return total / counts.sum().clamp(min=1)

    def count(self, output: Tensor, target: Tensor) -> Tensor:
        """``(2,)``, float64: the sum of ``-log p`` over the positions that count, and how many of them are right."""
        logits, target = self._flat(output, target)
        nll = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum")
        return _tally(nll, ((logits.argmax(1) == target) & (target != self.ignore_index)).sum())

    def _flat(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N T, V)`` and targets ``(N T,)`` of the loss's dtypes; tokens out of range are ignored."""
        if output.shape[:-1] != target.shape:
            raise ValueError(
                f"there are logits for positions {tuple(output.shape[:-1])}, and tokens for {tuple(target.shape)}"
            )
        logits, target = wide(output).flatten(0, -2), target.long().flatten()
        return logits, labels.ignoring_bad_labels(target, self.outputs, self.ignore_index)

    def counted(self, target: Tensor) -> Tensor:
        """Number of positions that are not ignored."""
        return (target.long() != self.ignore_index).sum()

    def measure(self, counts: Tensor, counted: Tensor | float) -> Tensor:
        """Perplexity of ``counts`` ``(*, 2)`` and :meth:`counted`; nan where no position counts."""
        return self.nats_per_token(counts, counted).exp()

    def nats_per_token(self, counts: Tensor, counted: Tensor | float) -> Tensor:
        """Mean of ``-log p``, float64; nan where no position counts."""
        return self._mean(counts, 0, counted)

    def bits_per_byte(self, counts: Tensor, counted: Tensor | float, bytes_per_token: float = 1.0) -> Tensor:
        """Mean of ``-log2 p`` per byte of text, float64; nan where no position counts.

        Args:
            counts: ``(*, 2)``.
            counted: :meth:`counted`.
            bytes_per_token: bytes of the text, divided by its tokens that count; 1 if tokens are bytes.
        """
        return self.nats_per_token(counts, counted) / (math.log(2) * bytes_per_token)

    def accuracy(self, counts: Tensor, counted: Tensor | float) -> Tensor:
        """Share of right tokens among those that count, float64; nan where no position counts."""
        return self._mean(counts, 1, counted)

    def _mean(self, counts: Tensor, index: int, counted: Tensor | float) -> Tensor:
        total, number = counts.double().select(-1, index), torch.as_tensor(counted, device=counts.device)
        return torch.where((number > 0) & (total >= 0), total / number, torch.nan)

    def score(self, output: Tensor, target: Tensor) -> Scored:
        return Scored(self.loss(output, target), output.detach(), self.count(output.detach(), target))

    def readout(self, x: Tensor, features: Features, linear: nn.Linear) -> Tensor:
        """``linear`` at every position: ``(N, T, C) -> (N, T, vocab_size)``."""
        return linear(self._tokens(x, features))

    def readout_score(self, x: Tensor, features: Features, linear: nn.Linear, target: Tensor) -> Scored:
        if not self.fuses_readout:
            return super().readout_score(x, features, linear, target)
        x = self._tokens(x, features)
        loss, correct, nll = linear_cross_entropy(
            x,
            linear.weight,
            linear.bias,
            target.long(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            check_labels=False,
        )
        return Scored(loss, x.new_empty(*x.shape[:-1], 0), _tally(nll, correct))

    def _tokens(self, x: Tensor, features: Features) -> Tensor:
        """``x`` as ``(N, T, C)``."""
        if len(features.positions) != 1 or features.layout == "class_token":
            raise ValueError(
                f"{self} needs logits for every position, but the last layer of an auxiliary network here receives "
                f"{features}, not tokens of which each is read: take a head such as 'linear', and "
                "layout='channels_last'"
            )
        return features.channels_first(x).movedim(1, -1)

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        raise ValueError("targets of a language model are as long as its inputs: call example_for(...)")

    def example_for(self, inputs: Features | None, samples: int, device: torch.device | None = None) -> Tensor:
        """As many tokens as the inputs have: T of tokens ``(N, T)``, or of features ``(N, T, C)``."""
        if inputs is None or not (inputs.is_vector or inputs.is_tokens):
            raise ValueError(
                f"targets of a language model are as long as the network's inputs, which are {inputs or 'unknown'}"
            )
        return torch.zeros(samples, inputs.shape[0], dtype=torch.int64, device=device)

    def extra_repr(self) -> str:
        return (
            f"vocab_size={self.outputs}, label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
            + (f", z_loss={self.z_loss}" if self.z_loss else "")
        )


def _tally(nll: Tensor, correct: Tensor) -> Tensor:
    return torch.stack([nll.double(), correct.double()])

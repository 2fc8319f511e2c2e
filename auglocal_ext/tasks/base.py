"""What is learned: what a head puts out, which targets are valid, the loss, and what is counted."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.features import Features
from ..layers.groups import is_sequence
from ..layers.readout import split_readout
from ..ops.deferred import check_values


class Scored(NamedTuple):
    """An output compared with its targets.

    Attributes:
        loss: scalar, with graph.
        output: detached.
        tally: what the task counts, summed over the batch, see :meth:`Task.count`; -1 if nothing is counted.
    """

    loss: Tensor
    output: Tensor
    tally: Tensor


class Task(nn.Module, ABC):
    """What is learned; every local module learns the same task.

    An output is ``(N, outputs)``, unless a subclass overrides :meth:`readout` and :meth:`check_output`; it is then
    :attr:`dense` if outputs have positions. A task is an ``nn.Module``, so its buffers move with the network. It has no
    trainable parameters, since all local losses share it.

    A subclass sets the number of ``outputs``, checks targets (:meth:`check_form`, :meth:`invalid`, :meth:`complaint`),
    makes the loss and an example of a target, and may count a metric.

    Attributes:
        outputs: outputs of a head per sample.
        metric: name in logs of :meth:`measure`, such as ``"accuracy"``; empty if nothing is counted.
        count_shape: of what :meth:`count` returns. A head with a task of its own must count in the same shape.
        compares_samples: whether the loss compares the samples of a batch, which it then passes through
            :func:`auglocal_ext.nn.gathered`.
        dense: whether outputs have positions. Heads then keep the positions of their features, and those that cannot
            raise ValueError when they are built.
        keeps_positions: whether what an auxiliary network puts out at a position must come from that position alone, or
            from others by the network's own kinds of layers only. Pooling of positions, and statistics over them, are
            then refused.
        fuses_readout: whether :meth:`readout_score` is to make the last module's loss too, where the network ends in a
            linear layer. Else that is the :meth:`score` of the network's output.
    """

    metric: str = ""
    count_shape: tuple[int, ...] = ()
    compares_samples: bool = False
    dense: bool = False
    keeps_positions: bool = False
    outputs: int

    @property
    def fuses_readout(self) -> bool:
        return False

    def __init__(self, outputs: int) -> None:
        super().__init__()
        try:
            count = 0 if isinstance(outputs, bool) else operator.index(outputs)  # of numpy and of a tensor too
        except TypeError:
            count = 0
        if count < 1:
            raise ValueError(f"{type(self).__name__} needs a number of outputs, at least 1; got {outputs!r}")
        self.outputs = count

    @abstractmethod
    def check_form(self, target: Tensor, samples: int) -> None:
        """Raise TypeError or ValueError unless dtype and shape of ``target`` are right for ``samples`` samples."""

    def invalid(self, target: Tensor) -> Tensor:
        """Which targets, of the right form, are not valid: a mask on their device, made without a host read."""
        return torch.zeros((), dtype=torch.bool, device=target.device)

    def complaint(self, target: Tensor, invalid: Tensor) -> str:
        """Error message for targets on the CPU, given the mask of those that are not valid."""
        return f"{int(invalid.sum())} targets are not valid"

    def late_complaint(self, count: int) -> str:
        """The same for targets of earlier batches on CUDA, of which only the number is known."""
        return f"{count} targets of earlier batches were not valid; checking one batch on the CPU names them"

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss, a scalar, of an output ``(N, outputs)``, differentiable.

        The form of the targets has been checked. On CUDA values that are not valid may be among them (their count
        reaches the host later): they must not stop the device.
        """

    def count(self, output: Tensor, target: Tensor) -> Tensor:
        """What is counted, summed over the batch: a tensor on the device, most often a scalar, without a host read."""
        return torch.full((), -1, device=output.device)

    def counted(self, target: Tensor) -> Tensor | int:
        """Number of targets that :meth:`count` considered."""
        return len(target)

    def measure(self, counts: Tensor, counted: Tensor | float) -> Tensor:
        """:attr:`metric` of ``counts`` and ``counted``, each summed over batches.

        Args:
            counts: one :meth:`count`, or those of K modules with K in front, as ``LocalOutput.module_counts``.
            counted: :meth:`counted`.

        Returns:
            float64, a scalar or ``(K,)``; nan where nothing is counted.
        """
        shares = counts.double() / torch.as_tensor(counted, device=counts.device).clamp(min=1)
        return torch.where(counts < 0, torch.nan, shares)

    @abstractmethod
    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        """Valid targets of ``samples`` samples, for predictions of memory and cost."""

    def example_for(self, inputs: Features | None, samples: int, device: torch.device | None = None) -> Tensor:
        """:meth:`example` for a network whose inputs are ``inputs``, for targets whose shape follows from them."""
        return self.example(samples, device)

    def check(self, target: Tensor, samples: int, *, values: bool = True) -> None:
        """Raise unless ``target`` is valid for ``samples`` samples.

        ``values=False`` leaves out the values, whose check on CUDA is a handful of kernels. They are checked at once on
        the CPU and without a synchronisation, therefore later, on CUDA.

        Raises:
            TypeError: for a dtype the task does not know.
            ValueError: for a wrong shape or value.
        """
        self.check_form(target, samples)
        if values:
            check_values(target, partial(self.invalid, target), partial(self.complaint, target), self.late_complaint)

    def score(self, output: Tensor, target: Tensor) -> Scored:
        """Loss and count of an output."""
        return Scored(self.loss(output, target), output.detach(), self.count(output.detach(), target))

    def readout(self, x: Tensor, features: Features, linear: nn.Linear) -> Tensor:
        """The output of a head: ``linear`` of ``x`` ``(N, *features.shape)``, pooled over its positions."""
        return linear(features.pooled(x))

    def readout_score(self, x: Tensor, features: Features, linear: nn.Linear, target: Tensor) -> Scored:
        """:meth:`score` of :meth:`readout`; a task may do both in one op."""
        return self.score(self.readout(x, features, linear), target)

    def score_of(self, layers: nn.Sequential, x: Tensor, target: Tensor) -> Scored:
        """:meth:`score` of ``layers(x)``, without its output where :attr:`fuses_readout` says so."""
        split = split_readout(list(layers)) if self.fuses_readout and is_sequence(layers) else None
        if split is None:
            return self.score(layers(x), target)
        before, linear = split
        for layer in before:
            x = layer(x)
        return self.readout_score(x, Features(tuple(x.shape[1:]), "channels_last"), linear, target)

    def refuse_parameters(self) -> None:
        """ValueError if a subclass has trainable parameters: every local loss would train them."""
        held = next((name for name, parameter in self.named_parameters() if parameter.requires_grad), None)
        if held is not None:
            raise ValueError(
                f"{type(self).__name__} has a trainable parameter, {held}, which every local module's loss would "
                "train; make it a buffer, or part of the network"
            )

    def check_output(self, shape: tuple[int, ...], whose: str) -> None:
        """ValueError unless an output's shape, without the batch, is that of this task; ``whose`` it is."""
        if shape != (self.outputs,):
            found = ", ".join(["N", *map(str, shape)])
            raise ValueError(f"{whose} has shape ({found}), expected {self.expected_output}")

    @property
    def expected_output(self) -> str:
        """How an output's shape is told in messages."""
        return f"(N, {self.outputs})"

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}"


def check_samples(target: Tensor, samples: int) -> None:
    """Raise unless ``target`` is a tensor of one entry per sample."""
    if not isinstance(target, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(target).__name__}; torch.as_tensor(...) makes one")
    if target.dim() == 0 or len(target) != samples:
        raise ValueError(f"y must hold one target per input, expected {samples}, got a shape of {tuple(target.shape)}")


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype losses are summed in: float32, or float64 for a double."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()

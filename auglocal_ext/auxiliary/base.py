"""What an auxiliary network is to a local module: an output, a loss, and what it needs for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..nn import recomputed
from ..tasks import Scored, Task
from .followed import Followed


@dataclass(frozen=True, eq=False)
class LossSettings:
    """What holds for a run; every auxiliary network, head and term is given it when it is built.

    Attributes:
        task: what is learned: outputs, valid targets, loss (with its label smoothing and ignored label), count.
        recompute: keep the inputs of blocks alone, and run the blocks again for their backward.
    """

    task: Task
    recompute: bool = False


@dataclass(frozen=True, eq=False)
class LossContext:
    """What comes with a batch; every loss is given it at its call.

    Attributes:
        target: of a form the task knows, checked.
        input: the network's input, ``(N, *input_shape)``; None if a loop of your own did not pass it.
    """

    target: Tensor
    input: Tensor | None = None

    @property
    def image(self) -> Tensor:
        """:attr:`input`, where it cannot be done without: ValueError if it was not passed."""
        if self.input is None:
            raise ValueError(
                "this module's loss reconstructs the image: pass the network's input, local_loss(out, y, x)"
            )
        return self.input


class Part(nn.Module):
    """A part of what trains a local module: it is built with settings, and says then which it cannot honour.

    Attributes:
        can_recompute: whether the part runs its blocks through :meth:`run`, or has none.
        compares_samples: whether its loss compares the samples of a batch, which it then passes through
            :func:`auglocal_ext.nn.gathered`.
        settings: those of the run.
    """

    can_recompute: bool = False
    compares_samples: bool = False

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        if not isinstance(settings, LossSettings):
            raise TypeError(f"{type(self).__name__} is built with LossSettings, got {settings!r}")
        settings.task.refuse_parameters()
        self.check(settings)
        self.settings = settings

    def check(self, settings: LossSettings) -> None:
        """Raise ValueError for a setting that the part cannot honour."""
        if settings.recompute and not self.can_recompute:
            raise ValueError(
                f"{type(self).__name__} cannot recompute: it does not run its blocks by run(block, ...). Say "
                'can_recompute = True where it does, or take recompute="none" for this module'
            )

    def check_target(self, target: Tensor) -> None:
        """Raise TypeError or ValueError for a target of a form the part cannot use, though the network's task can."""

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """``block(*inputs)``, which keeps its inputs alone where the settings say so."""
        return recomputed(block, *inputs) if self.settings.recompute else block(*inputs)


class Auxiliary(Part, ABC):
    """Trains a local module: ``loss(h, context)`` of its output, and the task's output by ``forward(h)``.

    Attributes:
        follows_layers: whether it depends on other layers of the network, and not on the module's output alone.
        follows_whole: whether it reads parameters that it follows as a whole, so that they cannot be sharded.
    """

    follows_layers: bool = False
    follows_whole: bool = False

    @abstractmethod
    def loss(self, h: Tensor, context: LossContext) -> Scored:
        """Local loss of the module's output ``h``, with the output and the count of its task."""

    def follows(self) -> Sequence[Followed]:
        """The parameters of other layers that are read, where ``follows_layers`` says so."""
        return ()

    def after_step(self) -> None:
        """Called after each backward of the module, and after its optimizer step where the step is by modules."""


def followed_by(module: nn.Module) -> list[Followed]:
    """What every :class:`Auxiliary` in a module follows."""
    return [followed for part in parts_of(module) if isinstance(part, Auxiliary) for followed in part.follows()]


def parts_of(module: nn.Module) -> list[Part]:
    """Every :class:`Part` in a module, itself included."""
    return [part for part in module.modules() if isinstance(part, Part)]


def can_recompute(part: nn.Module) -> bool:
    """Whether every :class:`Part` in an auxiliary network takes ``recompute``."""
    try:
        for each in parts_of(part):
            each.check(replace(each.settings, recompute=True))
    except ValueError:
        return False
    return True


def set_recompute(parts: list[tuple[Part, bool]]) -> None:
    """Let parts recompute or not; ValueError, with nothing changed, if one cannot."""
    changed = [
        (part, replace(part.settings, recompute=recompute))
        for part, recompute in parts
        if part.settings.recompute != recompute
    ]
    for part, settings in changed:
        part.check(settings)
    for part, settings in changed:
        part.settings = settings

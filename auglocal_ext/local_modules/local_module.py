"""One gradient-isolated local module, as the training pass and a user's own loop see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch import Tensor, nn

from ..auxiliary.base import Auxiliary, LossContext, parts_of
from ..auxiliary.context import ContextSupply
from ..auxiliary.followed import Followed
from ..layers.features import Features
from ..layers.readout import split_readout
from ..nn import FusedSequential, recomputed, run_chain
from ..segments import BeforeReadout, Carrying, Segment, carried, carry, detached, readout_of
from ..tasks import Scored, Task

#: What recomputes in a local module: nothing, the blocks of its auxiliary network, its first n layers, or everything.
Recompute = Literal["none", "auxiliary", "all"] | int
RECOMPUTE: tuple[Literal["none", "auxiliary", "all"], ...] = ("none", "auxiliary", "all")


def recomputes_auxiliary(recompute: Recompute) -> bool:
    """Whether the blocks of the auxiliary network run again for their backward."""
    return recompute in ("auxiliary", "all")


class PassModule(Protocol):
    """What a training pass asks of a module: a :class:`LocalModule` has it, and what stands in for one in a plan."""

    @property
    def index(self) -> int: ...

    @property
    def context(self) -> ContextSupply | None: ...

    def loss_input(self, h: Tensor, history: list[Tensor | None] | None, /) -> Tensor:
        """What :meth:`objective` takes, most often the module's output; its input is added to ``history``."""

    def objective(self, taken: Tensor, context: LossContext, /) -> Scored:
        """Local loss, with the task's output and count."""

    def parts(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that the local loss trains."""

    def after_step(self) -> None:
        """The module's gradients have been used."""


@dataclass(frozen=True, eq=False)
class LocalModule:
    """A run of layers with the context it is supplied and the auxiliary network that trains it.

    It is a view of parts that belong to a :class:`auglocal_ext.LocalSequential`. In a loop of your own::

        h, history = x, []
        for module in net.local_modules:
            out = module(h, history)
            loss = module.local_loss(out, y, x)
            loss.backward()
            h = module.hand_on(out)

    Attributes:
        index: k, from 0.
        groups: for each layer of the module, its children in the primary network; those of the last module include
            the classifier.
        context: encoders of the supplied context; None if the rule has none.
        auxiliary: auxiliary network; None for the last module, which ends in the network's own classifier.
        kept: indices of module inputs that later modules need.
        task: what the network learns.
        weight: of the last module's loss.
        recompute: what keeps only its input and runs again for its backward: ``"none"``; the blocks of the
            ``"auxiliary"`` network, whose settings say so too; a number n: the first n layers and the context encoders;
            or ``"all"``.
        fused: run the layers as one chain (:func:`auglocal_ext.nn.run_chain`), as :func:`auglocal_ext.fuse` does.
        followed: parameters of other layers that the auxiliary network reads.
        segment: runs all layers at once, where they are segments of a model; with recomputed layers they run one by
            one.
    """

    index: int
    groups: tuple[tuple[nn.Module, ...], ...]
    context: ContextSupply | None
    auxiliary: Auxiliary | None
    kept: frozenset[int]
    task: Task
    weight: float = 1.0
    recompute: Recompute = "none"
    fused: bool = False
    followed: tuple[Followed, ...] = ()
    segment: Segment | None = None

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The children of the primary network that form the module, in order."""
        return tuple(child for group in self.groups for child in group)

    @property
    def recomputed_layers(self) -> int:
        """How many layers recompute; they are the first ones."""
        if self.recompute == "all":
            return len(self.groups)
        return self.recompute if isinstance(self.recompute, int) else 0

    def forward(self, h: Tensor, history: list[Tensor | None] | None = None) -> Tensor:
        """Output of the module's layers, ``(N, *shape)``; of the last module that of the network.

        Args:
            h: what :meth:`hand_on` of the previous module returned; the network's input for the first.
            history: inputs of the modules before this one. The module appends its own and releases those that
                no later module needs. Required only if the rule supplies context.
        """
        return self._run(self.supply(h, history), self.groups, self.segment)

    __call__ = forward

    def _run(self, h: Tensor, groups: tuple[tuple[nn.Module, ...], ...], segment: nn.Module | None) -> Tensor:
        """Output of ``groups``, which ``segment`` runs at once where no layer recomputes."""
        again = self.recomputed_layers
        if segment is not None and not again:
            return cast("Tensor", segment(h))
        container = FusedSequential if self.fused else nn.Sequential
        for group in groups[:again]:
            if self.segment is None:
                h = recomputed(container(*group), h)
            else:
                out, *beside = recomputed(Carrying(container(*group)), h, *carried(h))
                h = carry(out, beside)
        kept = tuple(child for group in groups[again:] for child in group)
        if self.fused:
            return run_chain(kept, h)
        for layer in kept:
            h = layer(h)
        return h

    def loss_input(self, h: Tensor, history: list[Tensor | None] | None = None) -> Tensor:
        """What :meth:`objective` takes: the module's output, or the input of the network's readout.

        The latter for the last module, if the task makes logits and loss in one op and the layers, or the forward of
        the model, end in a linear one.
        """
        if self.auxiliary is None and self.task.fuses_readout and self.segment is not None:
            *before, last = self.groups
            groups = (*before, (*last[:-1], BeforeReadout(last[-1])))
            return self._run(self.supply(h, history), groups, BeforeReadout(self.segment))
        split = self._split
        return self(h, history) if split is None else self._run(self.supply(h, history), split[0], None)

    @property
    def _split(self) -> tuple[tuple[tuple[nn.Module, ...], ...], nn.Linear] | None:
        """The groups without the linear layer in which they end, and that layer, where the task applies it."""
        if self.auxiliary is not None or self.segment is not None or not self.task.fuses_readout:
            return None
        split = split_readout(self.groups[-1])
        return None if split is None else ((*self.groups[:-1], split[0]), split[1])

    def hand_on(self, out: Tensor) -> Tensor:
        """What the next module takes: ``out.detach()``, with what skip connections carry over the cut, detached too."""
        return detached(out)

    def supply(self, h: Tensor, history: list[Tensor | None] | None) -> Tensor:
        """``h`` with the module's context added; records the result in ``history``."""
        if self.context is not None:
            if history is None:
                raise ValueError(
                    f"local module {self.index} is supplied with context: pass the list of earlier module inputs as "
                    "history, the same list to each module, starting with an empty one"
                )
            if len(history) != self.index:
                raise ValueError(
                    f"history holds {len(history)} module inputs, expected {self.index}: run the modules in order "
                    "with one list that starts empty for each batch"
                )
            # The history is copied: entries are released before a recomputation reads them.
            beside = carried(h)
            h = recomputed(self.context, h, tuple(history)) if self.recomputed_layers else self.context(h, history)
            h = carry(h, beside)
        if history is not None:
            history.append(h.detach())
            for i in range(len(history)):
                if i not in self.kept:
                    history[i] = None
        return h

    def objective(self, taken: Tensor, context: LossContext) -> Scored:
        """Local loss of :meth:`loss_input`, with the task's output and count; the target has been checked."""
        if self.auxiliary is not None:
            for followed in self.followed:
                followed.begin()
            return self.auxiliary.loss(taken, context)
        return self._weighted(self.score(taken, context.target))

    def score(self, taken: Tensor, target: Tensor) -> Scored:
        """Of the last module: loss, without the module's weight, and count of :meth:`loss_input`."""
        split = self._split
        linear = readout_of(taken) if split is None else split[1]
        if linear is None:
            return self.task.score(taken, target)
        features = Features(tuple(taken.shape[1:]), "channels_last")
        return self.task.readout_score(taken, features, linear, target)

    def _weighted(self, scored: Scored) -> Scored:
        return scored if self.weight == 1 else scored._replace(loss=scored.loss * self.weight)

    def local_loss(self, out: Tensor, target: Tensor, x: Tensor | None = None) -> Tensor:
        """Scalar local loss of this module, to call ``backward()`` on.

        Args:
            out: what :meth:`forward` returned.
            target: of the network's task, such as class indices ``(N,)``.
            x: the network's input, for rules that reconstruct it.

        Raises:
            TypeError, ValueError: for a target that is not valid.
        """
        self.task.check(target, len(out))
        if self.auxiliary is not None:
            for part in parts_of(self.auxiliary):
                part.check_target(target)
            return self.objective(out, LossContext(target, x)).loss
        return self._weighted(self.task.score(out, target)).loss

    def after_step(self) -> None:
        """What the rule does after the module's backward, such as moving averages; a loop of your own calls it then."""
        if self.auxiliary is not None:
            self.auxiliary.after_step()
            for followed in self.followed:
                followed.end()

    def parts(self) -> Iterator[nn.Module]:
        """The modules trained by this module's local loss: context encoders, layers, auxiliary network."""
        if self.context is not None:
            yield self.context
        yield from self.layers
        if self.auxiliary is not None:
            yield self.auxiliary

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters trained by this module's local loss, each once."""
        seen: set[int] = set()
        for part in self.parts():
            for parameter in part.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


class Relay:
    """Hands each local module the output of the one before, and the inputs that it is supplied with.

    The training pass, inference, the exported network and the first run on an example all use it.

    Args:
        modules: the local modules, which are to run in order.
        x: the network's input.

    Attributes:
        h: input of the next module: the output of the last one, unless it is set to something else.
        history: inputs that later modules are supplied with; None where none is.
    """

    def __init__(self, modules: Sequence[PassModule], x: Tensor) -> None:
        self.h = x
        self.history: list[Tensor | None] | None = None
        if any(module.context is not None for module in modules):
            self.history = []

    def through(self, run: Callable[[Tensor, list[Tensor | None] | None], Tensor]) -> Tensor:
        """What a module's ``run`` makes; its input is released, except what autograd and later modules need."""
        self.h = run(self.h, self.history)
        return self.h


def run_forward(
    modules: Sequence[LocalModule], x: Tensor, each: Callable[[LocalModule, Tensor], None] | None = None
) -> Tensor:
    """Output of the whole network, context included, auxiliary networks left out; ``each`` is shown every output."""
    relay = Relay(modules, x)
    for module in modules:
        out = relay.through(module)
        if each is not None:
            each(module, out)
    return relay.h

"""``Followed``: parameters of other layers of the network that an auxiliary network reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Source(Protocol):
    """What brings the parameters from another process; versions are as in :meth:`Followed.version`."""

    def values(self) -> Sequence[Tensor]: ...

    def kept(self, versions: Sequence[int]) -> dict[int, list[Tensor]]: ...

    def resume(self, copies: Mapping[int, list[Tensor]]) -> None: ...


class Followed:
    """Parameters of later layers that an auxiliary network reads, ``lag`` steps old and renewed every ``every`` steps.

    Step u = 0, 1, ... is the u-th training pass of the auxiliary network's local module. In it :meth:`values` are the
    parameters as they were when step ``every * floor((u - lag) / every)`` began, before the layers were updated in that
    step; until there is such a step, the initial ones. With ``every=1, lag=0`` these are the parameters themselves.
    Otherwise copies are kept: at most ``floor(lag / every) + 2`` of them. They are part of what
    :meth:`auglocal_ext.LocalStep.save` writes, and in no state dict.

    In a run over stages the layers may belong to a later stage, which sends their parameters; see
    :class:`auglocal_ext.LocalStep`.

    Args:
        layers: layers of the network, or parts of them. They are read, not owned.
        every: steps from one renewal to the next, at least 1.
        lag: steps from the state that is read to the first step that reads it, at least 0. Above 0 no stage waits for a
            later one as long as it is at most ``lag`` steps ahead of it.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, layers: Iterable[nn.Module], *, every: int = 1, lag: int = 0) -> None:
        for name, value, least in (("every", every, 1), ("lag", lag, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a number of steps, at least {least}; got {value!r}")
        self.layers = tuple(layers)
        self.every = every
        self.lag = lag
        self.steps = 0  # training passes that are over
        self._copies: dict[int, list[Tensor]] = {}
        self._source: Source | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the layers, as they are now."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    @property
    def immediate(self) -> bool:
        """Whether the parameters themselves are read, without copies."""
        return self.every == 1 and self.lag == 0

    def version(self, step: int) -> int:
        """The step at whose begin the parameters were as ``step`` reads them."""
        return max(0, (step - self.lag) // self.every * self.every)

    def values(self) -> Sequence[Tensor]:
        """What is read in this step, in the order and with the shapes of :attr:`parameters`; not to be changed.

        Over stages this waits until the parameters have arrived.
        """
        if self._source is not None:
            return self._source.values()
        if self.immediate or not self.steps + len(self._copies):  # before the first training pass nothing is older
            return [parameter.detach() for parameter in self.parameters]
        version = self.version(self.steps)
        if version not in self._copies:
            raise RuntimeError(
                f"step {self.steps} reads parameters of step {version}, which are not kept here: resume by "
                "LocalStep.load(folder), or load_state_dict of the step and of the network"
            )
        return self._copies[version]

    def begin(self) -> None:
        """A training pass begins: the present parameters are copied where a later step, or this one, reads them."""
        if self.immediate or self._source is not None:
            return
        oldest = self.version(self.steps)
        for version in [v for v in self._copies if v < oldest]:
            del self._copies[version]
        if self.steps % self.every == 0:
            self._copies[self.steps] = [p.detach().clone() for p in self.parameters]

    def end(self) -> None:
        """A training pass, with its backward, is over."""
        self.steps += 1

    def needs(self, steps: int) -> range:
        """The versions that :meth:`kept` returns after ``steps`` training passes."""
        return range(0) if self.immediate else range(self.version(steps), steps, self.every)

    def kept(self) -> dict[int, list[Tensor]]:
        """Copies that steps to come read, by version."""
        needed = self.needs(self.steps)
        if self._source is not None:
            return self._source.kept(needed)
        return {version: self._copies[version] for version in needed}

    def resume(self, steps: int, copies: Mapping[int, list[Tensor]]) -> None:
        """Go on after ``steps`` training passes with what :meth:`kept` returned then."""
        self.steps, self._copies = steps, {}
        if self._source is not None:
            self._source.resume(copies)
        else:
            self._copies = dict(copies)

    def read_from(self, source: Source) -> None:
        """Read what another process sends instead of the layers, which are not held here."""
        self._source = source

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the network is no part of the run.
        return {**self.__dict__, "_source": None}

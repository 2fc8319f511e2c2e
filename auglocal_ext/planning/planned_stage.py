"""A stage without other processes: what it would hold of messages, for a step that is planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import Form, Replicas, crossing_inputs
from ..local_modules import OneStream, PassModule, Relay
from ..step.pipeline import passing


class PlannedStage(OneStream):
    """Local modules ``first`` to ``last``, with the messages that :class:`auglocal_ext.distributed.Stage` holds.

    They are the features of the next batch, which it has requested, and those that it sent last.

    Args:
        first, last: the stage's local modules.
        kept: for each local module of the network the module inputs, by index, that later ones are supplied with.
        arriving: forms of what it receives; None for the first stage.
        sends: whether another stage follows it.
        replicas: how many processes share its gradients.

    Attributes:
        leaving: forms of what it sends, once a step has run.
        sent: bytes of a batch's message to the next stage.
        replicas: averages that exchange nothing; None for one.
    """

    def __init__(
        self,
        first: int,
        last: int,
        kept: Sequence[frozenset[int]],
        arriving: list[Form] | None,
        sends: bool,
        replicas: int,
    ) -> None:
        self.first, self.last = first, last
        self._supplied, self._supplies = crossing_inputs(kept, first), crossing_inputs(kept, last + 1)
        self._arriving, self._sends = arriving, sends
        self.leaving: list[Form] = []
        self.sent = 0
        self.replicas = PlannedReplicas(replicas) if replicas > 1 else None
        self._asked: list[Tensor] = []
        self._sending: list[Tensor] = []

    @property
    def messages(self) -> list[Tensor]:
        """What is in flight."""
        return [*self._asked, *self._sending]

    def begin(self, modules: Sequence[PassModule], x: Tensor) -> Relay:
        """What the first module takes in: received features of the size of the batch ``x``."""
        history: list[Tensor | None] = [None] * self.first
        if self._arriving is None:
            return passing(modules, x, x, history)
        if not self._asked:
            self._ask(x)
        _, *messages = self._asked
        arrived = [form.as_features(message) for form, message in zip(self._arriving, messages, strict=True)]
        del messages
        self._ask(x)
        history[0] = x
        for index, tensor in zip(self._supplied, arrived[1:], strict=True):
            history[index] = tensor
        return passing(modules, x, arrived[0], history)

    def _ask(self, x: Tensor) -> None:
        assert self._arriving is not None
        self._asked = [_number(), *(form.empty(len(x), x.device) for form in self._arriving)]

    def handed_on(self, index: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        if index != self.last or not self._sends:
            return
        supplies = [history[i] for i in self._supplies]
        tensors = [h, *(tensor for tensor in supplies if tensor is not None)]
        self.leaving = [Form.of(tensor) for tensor in tensors]
        self._sending.clear()
        self._sending.append(_number())
        for form, tensor in zip(self.leaving, tensors, strict=True):
            self._sending.append(form.as_message(tensor.detach()))
        self.sent = sum(message.nbytes for message in self._sending)


class PlannedReplicas(Replicas):
    """Copies gradients into messages, as :class:`Replicas` does, and sends none.

    Attributes:
        messages: bytes of each local module's.
    """

    def __init__(self, size: int) -> None:
        self.size, self.where, self._first = size, "", True
        self._names: dict[int, str] = {}
        self.messages: dict[int, int] = {}
        self._module = 0

    def _check(self, module: int, trained: tuple[str, ...]) -> None:
        self._module = module
        self.messages[module] = 0

    def _reduce(self, message: Tensor) -> Any:
        self.messages[self._module] += message.nbytes
        return _Done()


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


def _number() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)

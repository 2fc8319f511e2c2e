"""What a captured step does not read anew, compared before every replay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

_TRAINING = attrgetter("training")
_TRAINING_ENTRY = itemgetter("training")
_REQUIRES_GRAD = attrgetter("requires_grad")


class NetworkState:
    """The flags and addresses of a network: if any of them changes, a step must be captured again.

    ``read()`` goes through all of them by ``map``, so that no bytecode runs per parameter: a deep network with its
    auxiliary networks has thousands.

    Args:
        modules: their ``training`` is read.
        parameters: their ``requires_grad`` and their memory.
        gradients: whether the memory of ``.grad`` is read too.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], gradients: bool) -> None:
        self._modules, self._parameters, self._gradients = modules, parameters, gradients
        # A lookup in the dictionary takes half the time of one by attribute. Scripted modules have no such entry.
        self._attributes = [vars(module) for module in modules if "training" in vars(module)]
        self._others = [module for module in modules if "training" not in vars(module)]

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkState:
        return NetworkState(copy.deepcopy(self._modules, memo), copy.deepcopy(self._parameters, memo), self._gradients)

    def read(self) -> tuple[list[Any], ...]:
        """To be compared with an earlier one."""
        return (
            list(map(_TRAINING_ENTRY, self._attributes)),
            list(map(_TRAINING, self._others)),
            list(map(_REQUIRES_GRAD, self._parameters)),
            list(map(Tensor.data_ptr, self._parameters)),
            [None if p.grad is None else p.grad.data_ptr() for p in self._parameters] if self._gradients else [],
        )

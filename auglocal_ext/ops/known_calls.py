"""Calls like one before, which are neither checked nor chosen for again.

Checks and choice of such an op depend on nothing but the form of a call: of each tensor dtype, device, sizes and
strides, of each other argument its value; and on ``AUGLOCAL_PROVIDER`` and what has been decided. The library of nodes
compares forms in less time than Python takes to look at a tensor. Without it every call is new.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import native
from . import providers, registry, tuning


class KnownCalls:
    """The calls of one op that are known.

    Attributes:
        again: ``again(provider, providers.asked(), tuning.generation, *inputs)`` runs the op as :func:`registry.run`
            does, or returns None where the call is new.
    """

    def __init__(self, op: str) -> None:
        self.again: Callable[..., Any] = _new
        self._op = op

    def run(self, overload: Any, provider: str | None, *inputs: Any) -> Any:
        """``registry.run(overload, *inputs)`` of a call that has been checked, which is known from now on.

        ``overload`` is what :func:`registry.chosen` has found for the first input.
        """
        node: Any = registry.recorder(overload)
        number = node.number(*inputs)
        if number is not None and registry.is_settled(self._op, inputs[0], provider):
            library: Any = native.nodes()
            library.remember(number, [self._op, provider, providers.asked(), tuning.generation, *inputs])
            self.again = partial(library.again, self._op)
        return node(*inputs)


def _new(*call: Any) -> None:
    """In place of ``again``, where no call is known."""

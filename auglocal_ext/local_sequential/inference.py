"""``InferenceNetwork``: what is left of a network for inference where a rule supplies context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from ..auxiliary.context import ContextSupply
from ..local_modules import LocalModule, run_forward


class InferenceNetwork(nn.Module):
    """The primary network with its context encoders, for inference: ``(N, *input_shape) -> (N, outputs)``."""

    def __init__(self, primary: nn.Module, modules: Sequence[LocalModule], context: nn.ModuleDict) -> None:
        super().__init__()
        self.primary = primary
        self.context = context
        plain = {"context": None, "auxiliary": None, "recompute": "none"}
        # Segments run the primary network they were made for; children are looked up at each call.
        self._plain = tuple(replace(m, groups=(), **plain) for m in modules)  # type: ignore[arg-type]
        self._lengths = tuple(len(module.layers) for module in modules)

    def forward(self, x: Tensor) -> Tensor:
        # Children are looked up at each call: one may have been replaced, to be quantised for example.
        children = list(self.primary) if isinstance(self.primary, nn.Sequential) else []
        modules, start = [], 0
        for plain, length in zip(self._plain, self._lengths, strict=True):
            key = str(plain.index)
            context = cast("ContextSupply", self.context[key]) if key in self.context else None
            modules.append(
                replace(plain, groups=(tuple(children[start : start + length]),), context=context, fused=False)
            )
            start += length
        return run_forward(modules, x)

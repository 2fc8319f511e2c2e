"""Run a module keeping only its inputs: the rest is computed again when backward needs it.

This is ``torch.utils.checkpoint`` whose second run works on copies of the buffers, so that BatchNorm's running
statistics are updated once. It applies to one auxiliary block, loss term, copied block (MAN) or layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .._torch import version
from .remade import forget


def recomputed(module: nn.Module, *inputs: Any) -> Any:
    """``module(*inputs)`` under gradient checkpointing; without gradients just the call.

    Equal to the plain call: the second run works on copies of the buffers, so BatchNorm's running statistics move
    once, and it repeats the random state and autocast of the first, so dropout repeats. Not so while a CUDA graph is
    captured, where the random state cannot be read: a module that draws random numbers must not be recomputed there.

    Raises:
        RuntimeError: for a module that changes an input in place, which a second run would not find as it was.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)
    runs = 0
    versions = _versions(inputs)

    def run(*inputs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            out = module(*inputs)
            if _versions(inputs) != versions:
                raise RuntimeError(
                    f"{_name(module)} changes its input in place, so it cannot be run again for its backward: use "
                    'inplace=False in what it begins with, or recompute "none" or "auxiliary" in this local module'
                )
            return out
        copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return functional_call(module, copies, inputs)

    out = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=not _capturing(inputs))
    if not torch.compiler.is_compiling():
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                forget(tensor)
    return out


def _versions(inputs: Any) -> list[int]:
    if torch.compiler.is_compiling():
        return []
    return [version(value) for value in inputs if isinstance(value, Tensor) and not value.is_inference()]


def _name(module: nn.Module) -> str:
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    return ", ".join(type(part).__name__ for part in parts)


def _capturing(inputs: Any) -> bool:
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in inputs)
    return on_cuda and torch.cuda.is_current_stream_capturing()

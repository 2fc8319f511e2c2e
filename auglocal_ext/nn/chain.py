"""Runs of layers in which a BatchNorm, its activation and the convolution or max pooling after it are one node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..ops import batch_norm_act, batch_norm_act_max_pool
from .fusable import (
    activation_of,
    conv_arguments,
    conv_hindrance,
    must_be_eager,
    norm_arguments,
    norm_hindrance,
    pool_arguments,
    pool_hindrance,
    replaced_call,
)
from .norm_act_conv import norm_act_conv


@dataclass(frozen=True, eq=False)
class Unit:
    """``conv(act(norm(x)))`` or ``pool(act(norm(x)))``, the parts that are there; else ``call``, called as it is."""

    call: nn.Module | None = None
    norm: nn.BatchNorm2d | None = None
    act: nn.Module | None = None
    conv: nn.Conv2d | None = None
    pool: nn.MaxPool2d | None = None

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """What is fused, in the order of the layers."""
        return tuple(part for part in (self.norm, self.act, self.conv, self.pool) if part is not None)

    def run(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return cast(nn.Module, self.call)(x)
        activation = None if self.act is None else activation_of(self.act)
        name, slope = activation or ("none", 0.0)
        norm = norm_arguments(self.norm, x)
        if self.pool is not None:
            pool = pool_arguments(self.pool)
            return batch_norm_act_max_pool(x, **norm, **pool, activation=name, negative_slope=slope)
        if self.conv is None:
            return batch_norm_act(x, **norm, activation=name, negative_slope=slope)
        return norm_act_conv(x, **norm, **conv_arguments(self.conv), activation=name, negative_slope=slope)


def is_container(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its children one after another, and nothing else."""
    if not isinstance(module, nn.Sequential) or replaced_call(module) is not None:
        return False
    return type(module).forward in (nn.Sequential.forward, FusedSequential.forward)


def flattened(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers in the order they are called, through containers."""
    for module in modules:
        if is_container(module):
            yield from flattened(cast(nn.Sequential, module))
        else:
            yield module


def units(modules: Iterable[nn.Module]) -> Iterator[Unit]:
    """``modules``, called one after another, as units; what cannot be fused is a unit of its own."""
    norm: nn.BatchNorm2d | None = None
    act: nn.Module | None = None
    for module in flattened(modules):
        if norm is not None:
            if act is None and activation_of(module) is not None:
                act = module
                continue
            conv = cast(nn.Conv2d, module) if conv_hindrance(module) is None else None
            pool = cast(nn.MaxPool2d, module) if pool_hindrance(module) is None else None
            yield Unit(norm=norm, act=act, conv=conv, pool=pool)
            norm = act = None
            if conv is not None or pool is not None:
                continue
        if norm_hindrance(module) is None:
            norm = cast(nn.BatchNorm2d, module)
        else:
            yield Unit(call=module)
    if norm is not None:
        yield Unit(norm=norm, act=act)


def run_chain(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``modules`` called one after another on x, fused where they can be; the results are those of the calls."""
    if must_be_eager(x):
        for module in modules:
            x = module(x)
        return x
    for unit in units(modules):
        x = unit.run(x)
    return x


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that :func:`auglocal_ext.fuse` has changed: the same children, run by :func:`run_chain`."""

    def forward(self, x: Tensor) -> Tensor:
        return run_chain(self, x)

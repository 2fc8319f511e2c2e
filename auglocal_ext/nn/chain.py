"""Runs of layers in which a BatchNorm, its activation and the convolution or max pooling after it are one node.

``norm_act_conv`` is one autograd node for ``conv(act(bn(x) + residual))`` that stores the raw x and per-channel
vectors. Forward makes the normalised map, runs the library's convolution on it and drops it. Backward makes it again,
asks the library for the convolution's gradients, drops it, and ends with one reduction and one input-gradient pass.
``norm_shortcut_act`` ends a block whose shortcut has its own convolution and BatchNorm. A block therefore stores its
input and its raw convolution outputs: one tensor per convolution.

- **A chain runs through containers.** The layers of nested ``nn.Sequential`` are flattened, unless a container has
  hooks or its own forward. A stack of ``conv, bn, relu`` blocks then also stores one tensor per convolution.
  ``LocalModule`` runs its layers the same way.
- **The host's work is limited.** A unit of convolution, BatchNorm and ReLU takes at most 19 calls of this package's
  Python functions and three crossings into its ops, forward and backward (``tests/nn/test_host_work.py``). The
  provider is chosen once for each shape, layout, dtype and device of maps and value of ``AUGLOCAL_PROVIDER``, which is
  read once per run of units on equal maps; backward uses that of forward. The nodes replace the autograd of
  ``batch_norm_act``, which torch also builds for tracers. ``num_batches_tracked`` is counted inside the op that makes
  the statistics, so it costs no launch and is right at any time.
- **Casts under autocast are made inside the node.** Autocast's weight cache would keep a cast that was made without a
  graph. A weight is cast once and the cast is kept from forward to backward: two bytes per parameter of the local
  module that runs, where its maps are megabytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops.batch_norm_act_max_pool import batch_norm_act_max_pool
from ..ops.batch_norm_passes import passes, stand_in
from .fusable import (
    NOTHING,
    Activation,
    NormCall,
    activation_of,
    conv_call,
    conv_hindrance,
    counted,
    must_be_eager,
    norm_call,
    norm_hindrance,
    pool_arguments,
    pool_hindrance,
    replaced_call,
)
from .norm_act import count_as_updated, norm_act_call
from .norm_act_conv import norm_act_conv_call


class Unit(NamedTuple):
    """``conv(act(norm(x)))`` or ``pool(act(norm(x)))``, the parts that are there; else ``call``, called as it is."""

    call: nn.Module | None = None
    norm: nn.BatchNorm2d | None = None
    act: nn.Module | None = None
    conv: nn.Conv2d | None = None
    pool: nn.MaxPool2d | None = None
    activation: Activation = NOTHING

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """What is fused, in the order of the layers."""
        return tuple(part for part in (self.norm, self.act, self.conv, self.pool) if part is not None)


def is_container(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its children one after another, and nothing else."""
    if not isinstance(module, nn.Sequential) or replaced_call(module) is not None:
        return False
    return type(module).forward in (nn.Sequential.forward, FusedSequential.forward)


def flattened(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers in the order they are called, through containers."""
    for module in modules:
        if isinstance(module, nn.Sequential) and is_container(module):
            yield from flattened(module)
        else:
            yield module


def units(modules: Iterable[nn.Module]) -> Iterator[Unit]:
    """``modules``, called one after another, as units; what cannot be fused is a unit of its own."""
    norm: nn.BatchNorm2d | None = None
    act: nn.Module | None = None
    activation = NOTHING
    for module in flattened(modules):
        if norm is not None:
            if act is None:
                found = activation_of(module)
                if found is not None:
                    act, activation = module, found
                    continue
            conv: Any = module if type(module) is nn.Conv2d and conv_hindrance(module) is None else None
            pool: Any = module if type(module) is nn.MaxPool2d and pool_hindrance(module) is None else None
            yield Unit(None, norm, act, conv, pool, activation)
            norm = act = None
            activation = NOTHING
            if conv is not None or pool is not None:
                continue
        if isinstance(module, nn.BatchNorm2d) and norm_hindrance(module) is None:
            norm = module
        else:
            yield Unit(module)
    if norm is not None:
        yield Unit(None, norm, act, None, None, activation)


def run_chain(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``modules`` called one after another on x, fused where they can be; the results are those of the calls."""
    if must_be_eager(x):
        for module in modules:
            x = module(x)
        return x
    # All is looked at before anything runs: between the operators the same Python takes several times as long.
    steps = [
        (
            unit,
            None if unit.norm is None else norm_call(unit.norm),
            None if unit.conv is None else conv_call(unit.conv),
        )
        for unit in units(modules)
    ]
    count_as_updated(norm for _, norm, _ in steps if norm is not None)
    run, form = None, None
    for unit, norm, conv in steps:
        if norm is None:
            x, run = unit.call(x), None  # type: ignore[misc]
            continue
        unit.norm._check_input_dim(x)  # type: ignore[union-attr]
        if run is None or form != (x.shape, x.stride(), x.dtype):
            run, form = passes(x), (x.shape, x.stride(), x.dtype)
            autocast = run.autocast_dtype()
        if conv is not None:
            x = norm_act_conv_call(run, x, norm, unit.activation.slope, conv, autocast)
        elif unit.pool is None:
            x = norm_act_call(run, x, norm, unit.activation.slope)
        elif stand_in() is not None:  # the op with the pooling has passes of its own
            x, run = unit.pool(norm_act_call(run, x, norm, unit.activation.slope)), None
        else:
            x = _pooled(x, norm, unit.activation, unit.pool)
    return x


def _pooled(x: Tensor, norm: NormCall, activation: Activation, pool: nn.MaxPool2d) -> Tensor:
    weight, bias, mean, var, batches, training, momentum, eps, _ = counted(norm)
    return batch_norm_act_max_pool(
        x,
        weight,
        bias,
        mean,
        var,
        **pool_arguments(pool),
        num_batches_tracked=batches,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation.name,
        negative_slope=activation.slope,
    )


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that :func:`auglocal_ext.fuse` has changed: the same children, run by :func:`run_chain`."""

    def forward(self, input: Tensor) -> Tensor:
        return run_chain(self, input)

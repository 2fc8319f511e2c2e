"""``MemoryPlan``: what was chosen, what it costs, what it was made for, and the table that shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import shapes_of
from ..local_modules import RECOMPUTE, LocalModule, Recompute
from ..local_sequential import LocalSequential
from .empty_batch import channels_last
from .updates import Clip

#: Options of an optimizer that a plan does not depend on, and those of its form, which is compared by itself.
_INDEPENDENT = ("params", "lr", "foreach", "fused", "capturable")

#: Their fused forms run on CPUs, so also on fake tensors; those of others are planned as for-loops.
FUSED_ON_CPU = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)

_UPDATE = "update of parameter group"
_FORM_HINT = ". On a GPU optimizers are fused unless they say otherwise: to plan for one on a CPU, pass fused=True"


@dataclass(frozen=True)
class MemoryPlan:
    """Recomputation and overlap of a training step with its predicted memory; ``str()`` is a table.

    Attributes:
        recompute: of each local module.
        overlap: whether modules overlap.
        predicted_bytes: peak of a step. With overlap what both streams need, which the allocator reserves.
        base_bytes: live between steps: parameters, buffers, optimizer state, the batch, kept gradients.
        module_peaks: for each module and way of recomputation the live bytes at its peak without overlap. Ways that a
            part of the module cannot honour are left out, and numbers of layers of which none had to be chosen.
        module_flops: for each module and way FLOPs of its part of a step, 2 per multiply-accumulate, of convolutions
            and matrix products alone.
        batch_size: images per call, at most.
        budget_bytes: what was asked for; None if nothing was.
        made_for: the network and the settings of the step it was made for, as plain values by name
            (:func:`step_facts`).
    """

    recompute: tuple[Recompute, ...]
    overlap: bool
    predicted_bytes: int
    base_bytes: int
    module_peaks: tuple[Mapping[Recompute, int], ...]
    module_flops: tuple[Mapping[Recompute, int], ...]
    batch_size: int
    budget_bytes: int | None
    made_for: Mapping[str, Any] = field(repr=False)

    def check(self, facts: Mapping[str, Any]) -> None:
        """ValueError if a step with these facts is not the one that the plan was made for."""
        for name in dict.fromkeys([*self.made_for, *facts]):
            planned, here = (of.get(name, "nothing") for of in (self.made_for, facts))
            if planned != here:
                hint = _FORM_HINT if name.startswith(_UPDATE) else ""
                raise ValueError(
                    f"the plan was made for another step, which differs in {name}: planned {planned}, here {here}. "
                    f"Call plan_memory with the network, the optimizer and the options of this step{hint}"
                )

    def check_batch(self, samples: int) -> None:
        """ValueError for a batch larger than the planned one."""
        if samples > self.batch_size:
            raise ValueError(
                f"the plan is for batches of at most {self.batch_size} samples, and this one has {samples}: plan for "
                f"the largest batch, plan_memory(net, {samples}, optimizer, ...)"
            )

    @property
    def step_flops(self) -> int:
        """FLOPs of a step without recomputation."""
        return sum(flops["none"] for flops in self.module_flops)

    @property
    def recomputed_flops(self) -> int:
        """FLOPs that the plan adds to them."""
        return sum(f[way] - f["none"] for f, way in zip(self.module_flops, self.recompute, strict=True))

    @property
    def recomputed_share(self) -> float:
        """Recomputed FLOPs over those of a step without recomputation."""
        return self.recomputed_flops / self.step_flops if self.step_flops else 0.0

    def __str__(self) -> str:
        return "\n".join([*self._table(), self._summary()])

    def _table(self) -> list[str]:
        """A line for each run of modules that look alike."""
        rows = []
        for k, (peaks, flops, chosen) in enumerate(
            zip(self.module_peaks, self.module_flops, self.recompute, strict=True)
        ):
            cells = [f"{peaks[way] / 1e6:,.1f}" if way in peaks else "-" for way in RECOMPUTE]
            extra = 100 * (flops[chosen] - flops["none"]) / flops["none"] if flops["none"] else 0.0
            rows.append((k, (*cells, _said(chosen), f"{peaks[chosen] / 1e6:,.1f}", f"{extra:.1f} %")))
        table = [("modules", *RECOMPUTE, "chosen", "its peak", "FLOPs added")]
        for cells, run in groupby(rows, key=lambda row: row[1]):
            indices = [k for k, _ in run]
            name = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
            table.append((name, *cells))
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return ["peak of each local module in MB (1e6 bytes), by what it recomputes", *lines]

    def _summary(self) -> str:
        budget = "" if self.budget_bytes is None else f" of a budget of {amount(self.budget_bytes)}"
        return (
            f"predicted {amount(self.predicted_bytes)}{budget} at batch size {self.batch_size}, without library "
            f"workspaces\nbetween steps {amount(self.base_bytes)}; recomputation adds {self.recomputed_share:.1%} of "
            f"the step's FLOPs; overlap {'on' if self.overlap else 'off'}"
        )


def step_facts(
    net: LocalSequential,
    optimizer: torch.optim.Optimizer,
    *,
    autocast: torch.dtype | None,
    clip_norm: float | None,
    clip: Clip,
    accumulate: int,
) -> dict[str, Any]:
    """What the memory of a step depends on besides the batch size and the choice of recomputation, by name.

    The device is no part of it: a plan made without a GPU is a plan for one whose optimizer updates in the same form.

    Args:
        net, autocast, clip_norm, clip, accumulate: as :class:`auglocal_ext.LocalStep` has them.
        optimizer: of the parameters that it trains, of ``net`` or of a copy.
    """
    names = {id(module): name for name, module in net.primary.named_modules()}
    return {
        "rule": _lasting(repr(net.rule)),
        "task": _lasting(repr(net.task)),
        "sample": f"{net.network.input_dtype or 'floating point'} {list(net.network.input_shape)}",
        "number of local modules": net.num_modules,
        **{f"local module {module.index}": _content(module, names) for module in net.local_modules},
        **shapes_of((*net.named_parameters(), *net.named_buffers())),
        "memory format": "channels last" if channels_last(net) else "contiguous",
        "autocast": str(autocast),
        "clipping": "none" if clip_norm is None else clip,
        "accumulate": accumulate,
        **{f"parameter group {k}": _group(optimizer, group) for k, group in enumerate(optimizer.param_groups)},
        **{f"{_UPDATE} {k}": _form(optimizer, group) for k, group in enumerate(optimizer.param_groups)},
        **{f"module {name}": _module(part) for name, part in net.named_modules() if name},
    }


def _lasting(text: str) -> str:
    """Without addresses, which differ between equal objects."""
    return re.sub(r" at 0x\w+", "", text)


def _module(part: nn.Module) -> str:
    """Its class and options, such as a stride, on which sizes of activations depend."""
    return _lasting(f"{type(part).__name__}({part.extra_repr()})")


def _form(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> str:
    """How torch updates the parameters, on which temporaries depend."""
    if group.get("fused") and isinstance(optimizer, FUSED_ON_CPU):
        return "fused"
    foreach = group.get("foreach", False)
    if foreach is None:  # torch's own choice
        foreach = group.get("fused") is None and not group.get("differentiable")
        foreach = foreach and all(p.is_cuda for p in group["params"])
    return "foreach" if foreach else "for-loop"


def _content(module: LocalModule, names: Mapping[int, str]) -> str:
    layers = ", ".join(names.get(id(layer), type(layer).__name__) for layer in module.layers)
    size = sum(p.numel() for p in module.parameters())
    return f"{layers} of {size:,} parameters{', fused' if module.fused else ''}"


def _group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> str:
    """The optimizer's class, which of its options are on, and how many parameters it holds."""
    on = [name for name, value in group.items() if name not in _INDEPENDENT and _is_on(value)]
    size = sum(p.numel() for p in group["params"])
    return f"{type(optimizer).__name__}({', '.join(sorted(on))}) of {size:,} parameters"


def _is_on(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)


def _said(recompute: Recompute) -> str:
    if isinstance(recompute, str):
        return recompute
    return "first layer" if recompute == 1 else f"first {recompute} layers"


def amount(size: int) -> str:
    """Bytes for a person: ``"0.346 GB (345,895,424 bytes)"``."""
    return f"{size / 1e9:.3f} GB ({size:,} bytes)"

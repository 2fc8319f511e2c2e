"""``MemoryPlan``: what was chosen, what it costs, and the table that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from ..local_modules import RECOMPUTE, Recompute


@dataclass(frozen=True)
class MemoryPlan:
    """Recomputation and overlap of a training step with its predicted memory; ``str()`` is a table.

    Attributes:
        recompute: of each local module.
        overlap: whether modules overlap.
        predicted_bytes: peak of a step. With overlap what both streams need, which the allocator reserves.
        base_bytes: live between steps: parameters, buffers, optimizer state, the batch, kept gradients.
        module_peaks: for each module and way of recomputation the live bytes at its peak without overlap. Ways that a
            part of the module cannot honour are left out.
        module_flops: for each module and way FLOPs of its part of a step, 2 per multiply-accumulate, of convolutions
            and matrix products alone.
        batch_size: images per call.
        budget_bytes: what was asked for; None if nothing was.
    """

    recompute: tuple[Recompute, ...]
    overlap: bool
    predicted_bytes: int
    base_bytes: int
    module_peaks: tuple[Mapping[Recompute, int], ...]
    module_flops: tuple[Mapping[Recompute, int], ...]
    batch_size: int
    budget_bytes: int | None

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
        """A line for each run of modules that look alike; in the bracketed column is what was chosen."""
        rows = []
        for k, (peaks, flops, chosen) in enumerate(
            zip(self.module_peaks, self.module_flops, self.recompute, strict=True)
        ):
            cells = [f"{peaks[way] / 1e6:,.1f}" if way in peaks else "-" for way in RECOMPUTE]
            extra = 100 * (flops[chosen] - flops["none"]) / flops["none"] if flops["none"] else 0.0
            rows.append((k, (*cells, chosen, f"{extra:.1f} %")))
        table = [("modules", *RECOMPUTE, "chosen", "FLOPs added")]
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


def amount(size: int) -> str:
    """Bytes for a person: ``"0.346 GB (345,895,424 bytes)"``."""
    return f"{size / 1e9:.3f} GB ({size:,} bytes)"

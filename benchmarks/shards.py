"""Bytes that a rank holds where replicas shard a network: parameters, momentum, and what is whole while modules run.

    python benchmarks/shards.py                              # ResNet-101, AugLocal d = 5, 1 to 8 replicas
    python benchmarks/shards.py --network resnet110 --depth 2 --replicas 2 3

Nothing is measured: ``LocalStep(shard=True)`` is built as the first rank of so many, the others of which are not there
(torch's "fake" process group), takes an optimizer step, and the bytes of its tensors are counted. Prints a table;
writes it and a JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _networks import auglocal
from _resume import write_text
from _tables_markdown import markdown
from _torch_private import fake_store
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import LocalSequential, LocalStep
from auglocal_ext.nn import deferred

MB = 1e6


def sgd(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def held(tensors: Iterable[Any]) -> int:
    """Bytes of tensors that are here; of sharded ones those of the shard."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def build(network: str, depth: int) -> LocalSequential:
    with deferred(seed=0):
        return auglocal(network, depth, fused=True)[0]


def count(network: str, depth: int, replicas: int) -> dict[str, int]:
    """Bytes of the first rank by what they are."""
    net = build(network, depth)
    modules = [held(module.parameters()) for module in net.local_modules]
    gathered = max((a + b for a, b in pairwise(modules)), default=modules[0])
    if replicas == 1:  # all of it, and its momentum is as large
        return {"replicas": 1, "parameters": held(net.parameters()), "momentum": held(net.parameters()), "gathered": 0}
    torch.distributed.init_process_group("fake", rank=0, world_size=replicas, store=fake_store())
    try:
        mesh = init_device_mesh("cpu", (replicas,), mesh_dim_names=("replica",))
        step = LocalStep(net, sgd, mesh=mesh, shard=True)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        type(step.optimizer).step(step.optimizer)
        state = [t for each in step.optimizer.state.values() for t in each.values() if isinstance(t, Tensor)]
        sizes = {"parameters": held(net.parameters()), "momentum": held(state)}
    finally:
        torch.distributed.destroy_process_group()
    return {"replicas": replicas, **sizes, "gathered": gathered}


def page(report: dict[str, Any]) -> str:
    lines, kinds = [], ("parameters", "momentum", "gathered")
    for row in report["rows"]:
        total = sum(row[kind] for kind in kinds)
        whole = sum(report["rows"][0][kind] for kind in kinds)
        cells = [f"{row[kind] / MB:,.0f}" for kind in kinds]
        lines.append([str(row["replicas"]), *cells, f"{total / MB:,.0f}", f"{100 * total / whole:.0f}%"])
    heads = ["replicas", "parameters, MB", "momentum, MB", "gathered at a time, MB", "sum, MB", "of one replica"]
    return f"# Shards\n\n{report['note']}\n\n{markdown(heads, lines)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet101")
    parser.add_argument("--depth", type=int, default=5, help="of AugLocal's auxiliary networks")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8], help="the first is compared with")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the files")
    options = parser.parse_args(arguments)
    if min(options.replicas) < 1:
        parser.error(f"--replicas must be positive, got {options.replicas}")
    net = build(options.network, options.depth)
    total, primary = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (net, net.primary))
    note = (
        f"{options.network}, AugLocal d = {options.depth}, {net.num_modules} local modules: {total:.1f} M parameters, "
        f"{primary:.1f} M of them without auxiliary networks. fp32. Counted from the tensors of the first rank."
    )
    rows = [count(options.network, options.depth, replicas) for replicas in options.replicas]
    settings = {"network": options.network, "depth": options.depth, "replicas": options.replicas}
    report = {
        "benchmark": "shards",
        "kind": "counted",
        "note": note,
        "settings": settings,
        **environment(),
        "rows": rows,
    }
    write_text(options.output / "shards.json", json.dumps(report, indent=1) + "\n")
    write_text(options.output / "shards.md", page(report))
    print(page(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

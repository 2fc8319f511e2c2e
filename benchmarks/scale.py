"""A training run over stages and replicas on paper: local learning beside pipelined and data-parallel backpropagation.

    python benchmarks/scale.py                               # ResNet-110, AugLocal d = 2, 1 to 1,024 ranks
    python benchmarks/scale.py --network resnet34 --rule "AugLocal d=5" --batch 2048 --slow 1.5
    python benchmarks/scale.py --measure                     # 2 and 3 processes on this CPU beside the model

The table is a model, not a measurement: FLOPs and bytes of each module are counted on fake tensors, times are
FLOPs / (FLOP/s) and bytes / bandwidth + latency. ``--measure`` puts measured times of modules and link into it, and
compares what it says with the images per second of a real pipeline on gloo; for a machine with nothing else to do.
Writes Markdown, JSON and, of the model, a PNG.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _resume import write_text
from _scale_counts import MAKERS, layers, local_modules
from _scale_measure import Settings, measure
from _scale_model import ACCUMULATED, Machine, Run, data_parallel, local, pipelined
from _tables_markdown import markdown

from auglocal_ext import pictures as style

COLORS = {"BP 1F1B": "#2e86ab", "BP zero bubble": "#5c6bc0", "BP data parallel": "#8a94a0"}
LOCAL_COLORS = "#d1495b", "#e3a857", "#7b6d8d"
GB = 1e9


def meshes(stages: int, replicas: int) -> list[tuple[int, int]]:
    """From one rank on, stages are doubled, then replicas."""
    return [(n, 1) for n in _doubled(stages)] + [(stages, n) for n in _doubled(replicas)[1:]]


def _doubled(most: int) -> list[int]:
    return sorted({2**i for i in range(most.bit_length())} | {most})


def runs(options: argparse.Namespace, stages: int, replicas: int, machine: Machine) -> Iterator[Run]:
    """All methods on ``stages`` x ``replicas`` ranks; a local one is named by its rule and number of modules."""
    network, images = options.network, options.batch // replicas
    # BatchNorm needs two images in a call.
    micro = max(n for n in range(1, min(options.microbatches, images // 2) + 1) if images % n == 0)
    for count in options.modules:
        for calls in (1, micro) if stages > 1 and micro > 1 else (1,):
            modules = local_modules(network, options.rule, count or None, images // calls)
            run = local(modules, stages, replicas, calls, machine)
            yield run._replace(method=run.method.replace("local", f"{options.rule}, {len(modules)} modules"))
    for zero in (False, True) if stages > 1 else ():
        yield pipelined(layers(network), stages, replicas, images, micro, machine, zero)
    yield data_parallel(layers(network), stages * replicas, images / stages, machine)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    flops = options.flops * 1e12 * options.utilisation
    for bandwidth in options.bandwidth:
        link = bandwidth * GB, options.latency * 1e-6
        one = {run.method: run.seconds for run in runs(options, 1, 1, Machine(flops, *link))}
        for stages, replicas in meshes(options.stages, options.replicas):
            for run in runs(options, stages, replicas, Machine(flops, *link, options.slow)):
                alone = one.get(run.method.removesuffix(ACCUMULATED), one["BP data parallel"])
                place = {"bandwidth": bandwidth, "ranks": stages * replicas, "stages": stages, "replicas": replicas}
                speed = {"images_per_second": options.batch / run.seconds}
                found.append({**place, **run._asdict(), **speed, "efficiency": alone / run.seconds / stages / replicas})
    return found


def page(report: dict[str, Any]) -> str:
    """The Markdown of a report: the ends of the run of ranks first, then all of it."""
    settings, found = report["settings"], report["rows"]
    shapes = [(1, 1), (settings["stages"], 1), (settings["stages"], settings["replicas"])]
    ends = [row for row in found if (row["stages"], row["replicas"]) in shapes]
    return (
        f"# Scale on paper\n\n{report['note']}\n\n{_table(settings, ends)}\n\nAll ranks:\n\n{_table(settings, found)}\n"
    )


def _table(settings: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    first, *others = settings["bandwidth"]
    heads = ["ms per batch", "images/s", "efficiency", "idle", "traffic, GB per batch", "peak, MB per rank"]
    lines = []
    for row in (row for row in found if row["bandwidth"] == first):
        place = row["ranks"], row["stages"], row["method"]
        also = [o for o in found if (o["ranks"], o["stages"], o["method"]) == place and o["bandwidth"] != first]
        cells = [f"{1e3 * row['seconds']:.2f}", f"{row['images_per_second']:,.0f}"]
        cells += [f"{100 * row['efficiency']:.0f}%", f"{100 * row['idle']:.0f}%"]
        cells += [f"{row['traffic'] / GB:.2f}", f"{row['peak'] / 1e6:,.0f}"]
        cells += [f"{other['images_per_second']:,.0f}" for other in also]
        lines.append([f"{row['ranks']:,} = {row['stages']} × {row['replicas']}", row["method"], *cells])
    slower = [f"images/s at {bandwidth:g} GB/s" for bandwidth in others]
    return markdown(["ranks = stages × replicas", "method", *heads, *slower], lines, text=2)


def draw(path: Path, report: dict[str, Any]) -> Path:
    """Images/s per rank for each bandwidth, and the peak per rank, over the number of ranks."""
    settings, found = report["settings"], report["rows"]
    ranks = sorted({row["ranks"] for row in found})
    methods = dict.fromkeys(row["method"] for row in found if row["ranks"] == ranks[-1])
    ours = [method for method in methods if method not in COLORS and not method.endswith(ACCUMULATED)]
    colors = COLORS | dict(zip(ours, itertools.cycle(LOCAL_COLORS), strict=False))
    figure, ((*speeds, peaks),) = style.new_figure(1, len(settings["bandwidth"]) + 1, (13.5, 5.2))
    for axes, bandwidth in zip([*speeds, peaks], [*settings["bandwidth"], settings["bandwidth"][0]], strict=True):
        for method in methods:
            line = [row for row in found if row["method"] == method and row["bandwidth"] == bandwidth]
            values = [row["peak"] / GB if axes is peaks else row["images_per_second"] / row["ranks"] for row in line]
            look = {"color": colors[method.removesuffix(ACCUMULATED)], "marker": "o", "markersize": 4}
            dash = "--" if method.endswith(ACCUMULATED) else "-"
            axes.plot([row["ranks"] for row in line], values, dash, label=method, **look)
        title = (
            "GB per rank, activations and gradients" if axes is peaks else f"images/s per rank at {bandwidth:g} GB/s"
        )
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=style.INK)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks[::2], [f"{n:,}" for n in ranks[::2]])
        axes.set_xlabel("ranks", fontsize=9, color=style.QUIET)
        style.plain(axes, "y")
        if axes is speeds[0]:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
    legend = {"frameon": False, "fontsize": 9, "labelcolor": style.INK}
    figure.legend(*peaks.get_legend_handles_labels(), loc="outside lower center", ncols=4, **legend)
    subtitle = report["note"].split(". Pipelines")[0]
    return style.write(figure, path, f"{settings['network']} over many ranks, on paper", subtitle)


def note(options: argparse.Namespace) -> str:
    slow = "" if options.slow == 1 else f", one rank {options.slow:g} times slower"
    return (
        f"A model; nothing is measured. {options.network}, batch {options.batch:,}, fp32, devices of {options.flops:g} "
        f"TFLOP/s at {100 * options.utilisation:g} % utilisation, links of {options.bandwidth[0]:g} GB/s each way and "
        f"{options.latency:g} µs{slow}. Pipelines take at most {options.microbatches} "
        "microbatches of at least two images; accumulated steps take as many calls. Efficiency: images/s, over "
        "those of as many ranks that train alone by the same method. Idle: share of the time in which the busiest rank "
        "waits. Peak: activations and gradients."
    )


def measured_note(options: argparse.Namespace) -> str:
    return (
        f"Images/s measured on a CPU, one thread per rank: {options.network}, {options.rule}, batch {options.batch}. "
        "In parentheses the least and the most. The ideal is the slowest stage alone; where ranks share cores, the "
        "work of all stages over the cores. The model adds the link."
    )


def measured_page(report: dict[str, Any]) -> str:
    batch, lines = report["settings"]["batch"], []
    for found in report["runs"]:
        seconds = statistics.median(found["measured"])
        spread = f"{batch / max(found['measured']):.1f} to {batch / min(found['measured']):.1f}"
        busy = max(stage["together"] for stage in found["stages"])
        cells = [batch / sum(found["one_process"]), batch / found["ideal"], batch / busy, batch / found["predicted"]]
        ratios = [f"{found['ideal'] / seconds:.2f}", f"{100 * (found['predicted'] / seconds - 1):+.1f}%"]
        where = f"{found['ranks']} on {found['cores']} cores{'' if found['pinned'] else ', not pinned'}"
        lines.append([where, *(f"{cell:.1f}" for cell in cells), f"{batch / seconds:.1f} ({spread})", *ratios])
    heads = ["ranks", "one process", "ideal", "slowest stage, all at work", "model", "measured"]
    return f"# Stages on gloo\n\n{report['note']}\n\n{markdown([*heads, 'of ideal', 'from model'], lines)}\n"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", help="default resnet110; resnet32 with --measure")
    parser.add_argument("--rule", default="AugLocal d=2", help=f"one of {', '.join(MAKERS)}")
    parser.add_argument("--modules", type=int, nargs="+", help="numbers of local modules; 0: as AugLocal has them")
    parser.add_argument("--batch", type=int, help="images over all replicas; default 4096; 32 with --measure")
    parser.add_argument("--stages", type=int, default=8, help="at most; further ranks are replicas")
    parser.add_argument("--replicas", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=32, help="of a pipeline, per replica")
    parser.add_argument("--bandwidth", type=float, nargs="+", default=[25, 0.125], help="of a link each way, GB/s")
    parser.add_argument("--latency", type=float, default=10, help="of a link, microseconds")
    parser.add_argument("--flops", type=float, default=156, help="TFLOP/s of a device; default: an A100's in TF32")
    parser.add_argument("--utilisation", type=float, default=0.1, help="the share of them that is reached")
    parser.add_argument("--slow", type=float, default=1, help="how many times slower one rank is")
    parser.add_argument("--measure", type=int, nargs="*", metavar="RANKS", help="real processes, default 2 3")
    parser.add_argument("--batches", type=int, default=10, help="of a timed run of --measure")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of --measure")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the files")
    return parser


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fills in what depends on ``--measure``; ends with a message for what does not fit."""
    measuring = options.measure is not None
    options.network = options.network or ("resnet32" if measuring else "resnet110")
    options.batch = options.batch or (32 if measuring else 4096)
    if options.rule not in MAKERS and not re.fullmatch(r"AugLocal d=\d+", options.rule):
        parser.error(f"--rule is one of {', '.join(MAKERS)}; got {options.rule!r}. MAN's messages are not modelled")
    options.modules = options.modules or ([0, 16] if options.rule.startswith("AugLocal") and not measuring else [16])
    for name in ("batch", "stages", "replicas", "microbatches", "flops", "utilisation", "batches", "repeats"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    if min(options.bandwidth) <= 0 or options.latency < 0 or options.slow < 1:
        parser.error("--bandwidth must be positive, --latency not negative and --slow at least 1")
    for stages, replicas in [] if measuring else meshes(options.stages, options.replicas):
        if options.batch % (stages * replicas) or options.batch < 2 * replicas:
            parser.error(f"--batch must be a multiple of {stages} stages x {replicas} replicas; got {options.batch}")
    if measuring and min(options.measure or [2]) < 2:
        parser.error(f"--measure takes numbers of ranks, at least 2; got {options.measure}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    check(options, parser)
    names = ["network", "rule", "modules", "batch"]
    try:
        if options.measure is None:
            names += ["stages", "replicas", "microbatches", "bandwidth", "latency", "flops", "utilisation", "slow"]
            head, found = {"kind": "model", "note": note(options)}, {"rows": rows(options)}
            text, stem = page, options.output / "scale"
        else:
            names += ["batches", "repeats"]
            network = options.network, options.rule, options.modules[0] or None
            run = Settings(*network, options.batch, options.batches, options.repeats)
            head = {"kind": "measured", "note": measured_note(options)}
            found = {"runs": [measure(run, ranks) for ranks in options.measure or (2, 3)]}
            text, stem = measured_page, options.output / "scale-measured"
    except ValueError as error:  # of a network or a rule that does not go with the other options
        parser.error(str(error))
    settings = {name: getattr(options, name) for name in names}
    report = {"benchmark": "scale", **head, "settings": settings, **environment(), **found}
    write_text(stem.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    write_text(stem.with_suffix(".md"), text(report))
    print(text(report))
    if options.measure is None:
        draw(stem.with_suffix(".png"), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

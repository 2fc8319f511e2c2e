"""The tables of README.md and docs/ as Markdown, by name; ``benchmarks/tables.py`` lists the names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from _tables_results import (
    ANALYSES,
    GB,
    KERNELS,
    UnknownNameError,
    analysis,
    base_of,
    expect,
    fields,
    first_table,
    host_rows,
    kernel_ratios,
    kernel_span,
    memory_fields,
    network_rows,
    pick,
    read,
    scaling_rows,
    split_dtype,
)
from _token_counts import COUNTED

NETWORKS = {"resnet32": "ResNet-32", "resnet110": "ResNet-110", "resnet34": "ResNet-34", "resnet101": "ResNet-101"}
NETWORKS |= {"vgg13": "VGG13", "torchvision:mobilenet_v2": "MobileNetV2"}
NETWORKS |= {"torchvision:efficientnet_b0": "EfficientNet-B0", "torchvision:regnet_x_400mf": "RegNetX-400MF"}
NETWORKS |= {"torchvision:vit_b_16": "ViT-B/16", "torchvision:resnet50": "ResNet-50"}
NETWORKS |= {"torchvision:mobilenet_v3_large": "MobileNetV3-Large", "torchvision:regnet_y_400mf": "RegNetY-400MF"}
NETWORKS |= {"torchvision:densenet121": "DenseNet-121", "timm:mixer_b16_224": "Mixer-B/16 (timm)"}
NETWORKS |= {"timm:resnetv2_50": "ResNetV2-50 (timm)", "torchvision:convnext_tiny": "ConvNeXt-T"}
NETWORKS |= {"timm:efficientnet_b0": "EfficientNet-B0 (timm)", "torchvision:swin_t": "Swin-T"}
NETWORKS |= {"vit-b16": "ViT-B/16", "gpt-24x1024": "GPT 24 x 1024", "gpt2-24x1024": "GPT-2 24 x 1024"}
OVERVIEW = (
    "BP",
    "BP checkpointing",
    "AugLocal d=2",
    "AugLocal d=6",
    "AugLocal d=6 recompute",
    "ContSup R1E",
)
LABELS = {
    "BP": "backpropagation",
    "BP fused": "backpropagation, `fuse(net)`",
    "BP checkpointing": "gradient checkpointing per block",
    "BP plain logits": "backpropagation, plain logits",
    "BP checkpointing fused": "checkpointing, fused",
    "BP checkpointing fused, update in backward": "checkpointing, fused, update in backward",
    "BP checkpointing plain logits": "checkpointing, plain logits",
}
RULES = {
    "BP": "backpropagation",
    "AugLocal d=2": "`AugLocal(depth=2)`",
    "AugLocal d=3": "`AugLocal(depth=3)`",
    "AugLocal d=6": "`AugLocal(depth=6)`",
    "ContSup R0": '`ContSup("R0")`',
    "ContSup R1": '`ContSup("R1")`',
    "ContSup E": '`ContSup("E")`',
    "ContSup R1E": '`ContSup("R1E")`',
    "InfoPro softmax": "`InfoPro(first, last)`",
    "InfoPro contrast": '`InfoPro(first, last, loss="contrast")`',
    "PredSim": "`PredSim()`",
    "DGL mlp-sr": "`DGL()`",
    "MAN": "`MAN()`",
    "Greedy": "`Greedy()`",
    "MAN + DGL": "`MAN(head=DGL())`",
    "ContSup R1E + InfoPro": '`ContSup("R1E", head=InfoPro(first, last))`',
    "ContSup R1E + AugLocal d=2": '`ContSup("R1E", head=AugLocal(depth=2))`',
    "InfoPro contrast + AugLocal d=2": '`InfoPro(first, last, loss="contrast", head=AugLocal(depth=2))`',
}
RUNS = {
    "bp": "BP",
    "bp-2": "BP, other seed",
    "auglocal": "AugLocal d = 2",
    "contsup": "ContSup R1E",
    "greedy": "greedy",
}


def table(words: Sequence[str]) -> str:
    """The lines of a table. Raises UnknownNameError."""
    if not words:
        raise UnknownNameError(f"has no name; there are {', '.join(TABLES)}")
    return pick(TABLES, words[0], "table")(words[1:])


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """The first ``text`` columns to the left, the others, which are numbers, to the right."""
    lines = [columns, ["---"] * text + ["--:"] * (len(columns) - text), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory(words: Sequence[str], only: Sequence[str] = ()) -> str:
    networks, dtype = split_dtype(words)
    if not networks:
        raise UnknownNameError("names no network; expected NETWORK... [bf16]")
    found = [memory_fields(network, dtype) for network in networks]
    lines = []
    for name in only or found[0]:
        cells = [pick(rows, name, "row") for rows in found]
        peaks = [f"{cell['peak']} ({cell['share']}%)" for cell in cells]
        lines.append([_label(name), *peaks, " / ".join(cell["flops"] for cell in cells)])
    titles = [NETWORKS.get(network, network) for network in networks]
    short = " / ".join(title.removeprefix("ResNet-") for title in titles)
    return markdown(["method", *(f"{title}, GB (of BP)" for title in titles), f"FLOPs, × BP ({short})"], lines)


def _backbones(words: Sequence[str]) -> str:
    expect(words, "")
    columns = ["network", "method", "parameters, M (trained / deployed)", "MACs, M (training / inference)"]
    lines = []
    for network in read("backbones")["networks"]:
        for name, found in memory_fields(network, "fp32").items():
            if name.endswith(" eager"):
                continue
            pairs = [f"{found['trained']} / {found['deployed']}", f"{found['training']} / {found['inference']}"]
            lines.append(
                [NETWORKS[network], _label(name), *pairs, found["flops"], f"{found['peak']} ({found['share']}%)"]
            )
    return markdown([*columns, "FLOPs, × BP", "peak, GB (of BP)"], lines, text=2)


def _localized(words: Sequence[str]) -> str:
    expect(words, "")
    found = {network: network_rows("localized", network) for network in read("localized")["networks"]}
    names = list(max(found.values(), key=len))
    lines = []
    for network, rows in found.items():
        cells = []
        for name in names:
            if name not in rows:
                cells.append("not predicted yet")
            elif rows[name]["error"]:
                cells.append("refused")
            else:
                values = fields(rows[name], rows["BP"])
                cells.append(f"{values['peak']} ({values['share']}%)")
        lines.append([NETWORKS[network], *cells])
    return markdown(["network, GB (of BP)", *map(_label, names)], lines)


def _tokens(words: Sequence[str]) -> str:
    expect(words, "")
    found = {network: network_rows("tokens", network) for network in read("tokens")["networks"]}
    lines = []
    for name in max(found.values(), key=len):
        cells, flops = [_label(name)], []
        for rows in found.values():
            values = fields(rows[name], rows["BP"]) if name in rows else {}
            cells += [f"{values['peak']} ({values['share']}%)", values["adds"]] if values else ["", ""]
            flops += [values["flops"]] if values else []
        lines.append([*cells, " / ".join(flops)])
    columns = [column for name in found for column in (f"{NETWORKS[name]}, GB (of BP)", "step adds, GB")]
    return markdown(["method", *columns, "FLOPs, × BP"], lines)


def _counted(words: Sequence[str]) -> str:
    """Predictions in pure bf16, without optimizer state, beside what had been counted."""
    expect(words, "")
    columns = ["network", "method", "counted, GB", "predicted, GB", "difference, GB", "parameters of heads, GB"]
    lines = []
    for network, counts in COUNTED.items():
        rows = network_rows("tokens-pure", network)
        whole = rows["BP"]["predicted"]["categories"]["parameters"]
        for name, counted in counts.items():
            fields(pick(rows, name, "row"), rows["BP"])  # raises for a row that failed
            parts = rows[name]["predicted"]["categories"]
            predicted = (rows[name]["predicted"]["peak_bytes"] - parts["optimizer state"]) / GB
            heads = (parts["parameters"] - whole) / GB
            difference = f"{predicted - counted:+.2f}".replace("-", "−")
            figures = [f"{counted:.2f}", f"{predicted:.2f}", difference, f"{heads:.2f}"]
            lines.append([NETWORKS[network], _label(name), *figures])
    return markdown(columns, lines, text=2)


def _overview(words: Sequence[str]) -> str:
    if list(words) not in ([], ["bf16"]):
        raise UnknownNameError(f"takes bf16 or nothing, got {' '.join(words)}")
    return _memory(["resnet32", "resnet110", *words], OVERVIEW)


def _rules(words: Sequence[str]) -> str:
    (network,) = expect(words, "NETWORK")
    rows = network_rows("rules", network)
    unnamed = set(rows) - set(RULES) - {"BP fused"}
    if unnamed:
        raise UnknownNameError(f"has rows without a name in RULES: {', '.join(sorted(unnamed))}")
    columns = ["rule", "parameters, M (trained / deployed)", "MACs, M (training / inference)", "FLOPs, × BP"]
    lines = []
    for name, label in RULES.items():
        found = fields(pick(rows, name, "row"), rows["BP"])
        pairs = [f"{found['trained']} / {found['deployed']}", f"{found['training']} / {found['inference']}"]
        lines.append([label, *pairs, found["flops"], f"{found['peak']} ({found['share']}%)"])
    return markdown([*columns, "peak, GB (of BP)"], lines)


def _step(words: Sequence[str]) -> str:
    expect(words, "")
    found = {network: network_rows("step", network) for network in read("step")["networks"]}
    # Without CUDA a row "graph" runs the step of the row "per-module" before it.
    names = [name for name in next(iter(found.values())) if not name.endswith(" graph")]
    columns, lines = ["row", "adds"], []
    for network in found:
        columns += [f"{NETWORKS.get(network, network)}, GB", "operators"]
    for name in names:
        cells = [f"`{name}`", next(iter(found.values()))[name]["adds"]]
        for rows in found.values():
            values = fields(rows[name], base_of(rows, rows[name]))
            cells += [values["peak"], values["operators"]]
        lines.append(cells)
    return markdown(columns, lines, text=2)


def _scaling(over: str, heading: str) -> Callable[[Sequence[str]], str]:
    def lines(words: Sequence[str]) -> str:
        expect(words, "")
        found = scaling_rows(over)
        names = list(next(iter(found.values())))
        rows = [
            [f"{int(at):,}", *(fields(rows[name], rows["BP bf16"])["peak"] for name in names)]
            for at, rows in found.items()
        ]
        return markdown([heading, *(f"`{name}`, GB" for name in names)], rows)

    return lines


def _kernels(words: Sequence[str]) -> str:
    (which,) = expect(words, "cpu|steps|host|static")
    static = partial(first_table, "kernels-static.md")
    known = {"cpu": _kernels_cpu, "steps": _kernels_steps, "host": _kernels_host, "static": static}
    return pick(known, which, "table of kernels")()


def _kernels_cpu() -> str:
    columns = ["op", "cases", "fused: time, × eager", "`torch.compile`: time, × eager", "fused: memory, × eager"]
    cases = {op: str(len(found)) for op, found in kernel_ratios("cpu").items()}
    lines = [[f"`{op}`", count, *(kernel_span(op, what) for what in KERNELS)] for op, count in cases.items()]
    return markdown(columns, lines)


def _kernels_steps() -> str:
    lines = []
    for row in read("fused-step")["results"]:
        times = [f"{row[side]['median'] * 1e3:.0f}" for side in ("fused", "eager")]
        names = [row[name] for name in ("network", "rule", "layout", "dtype")]
        lines.append([*names, *times, f"{row['ratio']:.2f}", f"{row['fused_peak'] / row['eager_peak']:.2f}"])
    columns = ["network", "rule", "layout", "dtype", "fused, ms", "eager, ms", "time, × eager", "memory, × eager"]
    return markdown(columns, lines, text=4)


def _kernels_host() -> str:
    lines = []
    for row in host_rows():
        times = [f"{row[side]['median'] * 1e6:,.0f}" for side in ("fused", "eager")]
        lines.append([f"`{row['name']}`", row["replaces"], *times, f"{row['ratio']:.2f}"])
    return markdown(["fused", "in place of", "fused, µs", "eager, µs", "fused, × eager"], lines, text=2)


def _accuracy(words: Sequence[str]) -> str:
    expect(words, "")
    return first_table("accuracy/cpu/accuracy.md")


def _analysis(words: Sequence[str]) -> str:
    (which,) = expect(words, "cka|probes|information")
    found, digits = analysis(which), ANALYSES[which].digits
    runs = [run for run in RUNS if (which, run) != ("cka", "bp")]  # similarity is to this run itself
    lines = [[f"`{layer}`", *(format(found[run][layer], digits) for run in runs)] for layer in found["bp"]]
    return markdown(["layer", *(RUNS[run] for run in runs)], lines)


def _scale(words: Sequence[str]) -> str:
    if not words:
        return first_table("scale/scale.md")
    expect(words, "measured")
    return first_table("scale/scale-measured.md")


def _shards(words: Sequence[str]) -> str:
    expect(words, "")
    return first_table("shards/shards.md")


def _language(words: Sequence[str]) -> str:
    expect(words, "")
    return first_table("text/language.md")


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("d=", "d = ").replace("K=", "K = "))


TABLES: dict[str, Callable[[Sequence[str]], str]] = {
    "overview": _overview,
    "memory": _memory,
    "backbones": _backbones,
    "localized": _localized,
    "rules": _rules,
    "tokens": _tokens,
    "counted": _counted,
    "step": _step,
    "depth": _scaling("depth", "layers"),
    "batch": _scaling("batch", "images"),
    "kernels": _kernels,
    "accuracy": _accuracy,
    "analysis": _analysis,
    "scale": _scale,
    "shards": _shards,
    "language": _language,
}

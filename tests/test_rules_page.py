"""docs/rules.md: rules and options are named as the code has them, its lines run, its figures are the result file's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import auglocal_ext
from auglocal_ext import (
    Classification,
    ContSup,
    InfoPro,
    LocalSequential,
    Regression,
    Rule,
    rules,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = re.sub("<!--.*?-->", "", (ROOT / "docs" / "rules.md").read_text())  # markers of benchmarks/tables.py
#: Headings and what stands below them, up to the next heading of any level.
SECTIONS = {
    found[1]: found[2] for found in re.finditer(r"^#{2,3} (.+?)\n(.*?)(?=^#{1,3} |\Z)", PAGE, flags=re.M | re.S)
}
EXPORTED = [each for name in rules.__all__ if isinstance(each := getattr(rules, name), type) and issubclass(each, Rule)]
CLASSES = [each for each in EXPORTED if each is not Rule]
CODE = {
    name: block for name, text in SECTIONS.items() for block in re.findall(r"```python\n(.*?)```", text, flags=re.S)
}


def table(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of the table whose first column is headed ``first``."""
    found = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)*)", text, flags=re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()] if found else []


@pytest.mark.parametrize("rule", CLASSES, ids=lambda rule: rule.__name__)
def test_every_option_is_named_with_its_default(rule):
    found = {cells[0].strip("`"): cells[1].strip("`") for cells in table(SECTIONS[rule.__name__], "option")}
    missing = dataclasses.MISSING
    assert found == {
        each.name: "required" if each.default is missing else repr(each.default) for each in dataclasses.fields(rule)
    }


@pytest.mark.parametrize("rule", rules.RULES.values(), ids=lambda rule: rule.__name__)
def test_every_rule_is_told_of_in_full(rule):
    text = SECTIONS[rule.__name__]
    flags = {each.field: "`--" + each.name.replace("_", "-") + "`" for each in rule.options()}
    if rule is InfoPro:  # whose four weights are one option there
        flags |= {"first": flags[""], "last": flags[""]}
    found = {cells[0].strip("`"): cells[-1] for cells in table(text, "option")}
    assert found == {each.name: flags.get(each.name, "") for each in dataclasses.fields(rule)}
    for part in ("```mermaid\n", "\n$$", "\n**Costs**\n", "- **Take it** ", "- **Leave it** ", "\nSource: "):
        assert part in text, part
    assert re.search(r"^Source: .*\]\(https://", text, flags=re.M)


def test_the_pages_order_and_what_it_promises():
    names = list(SECTIONS)
    assert set(names) >= {each.__name__ for each in CLASSES} | {"Backpropagation", "Combinations"}
    assert len(re.findall(r"^\d\. ", SECTIONS["How to choose"], flags=re.M)) == 6
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


def test_all_pictures_speak_one_language():
    pictures = re.findall(r"```mermaid\n(.*?)```", PAGE, flags=re.S)
    assert len(pictures) == len(rules.RULES) + 2
    styles = {}
    for picture in pictures:
        lines = picture.splitlines()
        assert lines[0] == "flowchart LR"
        for line in lines[1:]:
            if line.startswith("  classDef"):
                _, style, look = line.split()
                assert styles.setdefault(style, look) == look
        nodes = set(re.findall(r"\b(\w+)[\[(]", picture))
        edges = [line for line in lines[1:] if "->" in line or "<=" in line]
        bare = re.sub(r"\[.*?\]|\(.*?\)+|-->\|sg\||-\.->\|weights\||-->|<==>", " ", " ".join(edges))
        assert set(bare.split()) <= nodes, picture
        classed = [name for names in re.findall(r"^  class (\S+) ", picture, flags=re.M) for name in names.split(",")]
        assert set(classed) <= nodes and len(classed) == len(set(classed))


@pytest.mark.parametrize("name", [name for name in CODE if name != "Reading this page"])
def test_every_line_of_code_runs(name):
    assert CODE[name].count("\n") == 1
    small = re.sub(r"models\.resnet\w*\(.*?\)", "models.resnet_cifar(14, width=4)", CODE[name]).replace(
        "32, 32", "16, 16"
    )
    names: dict = {}
    exec(CODE["Reading this page"].replace("32, 32", "16, 16"), names)
    exec(small, names)
    net = names["net"]
    net(names["x"], names["y"]).loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert net.num_modules == 1 if name == "Backpropagation" else net.num_modules > 2
    if name in {each.__name__ for each in CLASSES}:
        assert getattr(rules, name) in [type(rule) for rule in net.rule.with_heads]


def test_costs_are_those_of_the_result_file(load_benchmark):
    load_benchmark("memory")
    import _rule_rows

    network, weights = "resnet32", rules.INFOPRO_WEIGHTS["cifar10", "resnet32"][16]
    costed = {name: make(network) for name, (_, make) in _rule_rows.RULES.items()}
    costed |= {name: make(network) for name, make in _rule_rows.COMBINATIONS.items()}
    costed |= {f"ContSup {context}": ContSup(context) for context in ("R0", "R1", "E", "R1E")}
    costed |= {f"AugLocal d={depth}": rules.AugLocal(depth) for depth in _rule_rows.AUGLOCAL_DEPTHS}
    report = json.loads((ROOT / "benchmarks" / "results" / "rules" / "rules-predicted.json").read_text())
    rows = {row["name"]: row for row in report["networks"][network]}
    base = rows["BP"]["predicted"]
    unwrapped = re.sub(r"\n +(?=[^\s-])", " ", PAGE)
    lines = re.findall(r"^- `(.+?)`: parameters (.*)\.$", unwrapped, flags=re.M)
    known = {name: getattr(auglocal_ext, name) for name in ("AugLocal", "ContSup", "DGL", "Greedy", "InfoPro", "MAN")}
    known |= {"PredSim": auglocal_ext.PredSim, "first": weights[0], "last": weights[1]}
    seen = set()
    for label, figures in lines:
        rule = None if label == "modules=1" else eval(label, known)
        (name,) = ["BP"] if rule is None else [name for name, other in costed.items() if other == rule]
        row, predicted = rows[name], rows[name]["predicted"]
        assert figures == (
            f"{row['parameters_trained'] / 1e6:.2f} / {row['parameters_deployed'] / 1e6:.2f} M, "
            f"MACs {row['macs_training'] / 1e6:.1f} / {row['macs_inference'] / 1e6:.1f} M, "
            f"FLOPs {predicted['flops'] / base['flops']:.2f}, peak {predicted['peak_bytes'] / 1e9:.2f} GB "
            f"({100 * predicted['peak_bytes'] / base['peak_bytes']:.0f} %)"
        ), label
        seen.add(name)
    assert seen == set(rows) - {"BP fused"}


# What each rule takes


class Mean(nn.Module):
    """The mean over the tokens."""

    def forward(self, h):
        return h.mean(1)


def conv(kind, pool):
    layers = []
    for width in (3, 8, 8):
        layers += [kind(width, 8, 3, padding=1), nn.ReLU()]
    return [*layers, pool(1), nn.Flatten(), nn.Linear(8, 5)]


def linear(norm, *pool):
    layers = []
    for width in (3, 8, 8):
        layers += [nn.Linear(width, 8), *norm(), nn.ReLU()]
    return [*layers, nn.Sequential(*pool, nn.Linear(8, 5))]


NETWORKS = {
    "2-D maps": lambda: (conv(nn.Conv2d, nn.AdaptiveAvgPool2d), (3, 8, 8)),
    "vectors": lambda: (linear(list), (3,)),
    "tokens": lambda: (linear(lambda: [nn.LayerNorm(8)], Mean()), (6, 3)),
    "1-D and 3-D maps": lambda: (conv(nn.Conv3d, nn.AdaptiveAvgPool3d), (3, 4, 4, 4)),
}
#: The rule as it stands, and what its cells name where they say neither yes nor no.
TAKERS = {
    "AugLocal": ("AugLocal(2, joint_tail=False)", []),
    "ContSup": ("ContSup('R0')", ["ContSup('R0', '0c1f')", "ContSup('R0', '0c2f')"]),
    "InfoPro": ("InfoPro((1, 1), (1, 1))", []),
    "PredSim": ("PredSim()", []),
    "DGL": ("DGL()", []),
    "MAN": ("MAN()", ["MAN(head='linear')", "MAN(head='0c1f')", "MAN(head='0c2f')"]),
    "Greedy": ("Greedy()", []),
    "SOLO": ("SOLO()", []),
}


def trains(network, rule, task=None, y=None):
    layers, shape = NETWORKS[network]()
    task = Classification(5) if task is None else task
    net = LocalSequential(
        nn.Sequential(*layers), eval(rule, vars(auglocal_ext) | {"nn": nn}), task=task, input_shape=shape
    )
    net(torch.rand(4, *shape), torch.tensor([0, 0, 1, 1]) if y is None else y).loss.backward()


@pytest.mark.parametrize("row", table(SECTIONS["What each rule takes"], "rule"), ids=lambda row: row[0])
def test_what_a_rule_takes(row):
    name, *cells, targets = row
    rule, others = TAKERS[name]
    for network, cell in zip(NETWORKS, cells, strict=True):
        if cell.startswith("yes"):
            trains(network, rule)
            continue
        with pytest.raises(ValueError):
            trains(network, rule)
        for other in others if cell != "no" else []:
            trains(network, other)
    images = [(Regression(5), torch.randn(4, 5)), (None, torch.full((4, 5), 0.2))]
    for task, y in images:
        if targets.startswith("any"):
            trains("2-D maps", rule, task, y)
        contrast = "InfoPro((1, 1), (1, 1), loss='contrast')"
        if targets.endswith("class indices"):
            with pytest.raises((TypeError, ValueError), match="compares samples by class"):
                trains("2-D maps", contrast if name == "InfoPro" else rule, task, y)


def test_every_rule_has_a_row():
    assert [row[0] for row in table(SECTIONS["What each rule takes"], "rule")] == list(TAKERS) and set(TAKERS) == {
        each.__name__ for each in rules.RULES.values()
    }

"""``python -m auglocal_ext cuts``."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from auglocal_ext.cli import main


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 + i, 1) for i in range(5))
        self.head = nn.Linear(11, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.one(x)
        return self.head(torch.relu(self.three(torch.relu(self.two(x))) + x))


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("models_of_a_user")
    made.skip, made.dense, made.number = Skip, Dense, lambda: 3
    monkeypatch.setitem(sys.modules, "models_of_a_user", made)


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_row_for_each_place(capsys):
    assert main(["cuts", "--network", "resnet8"]) == 0
    lines = lines_of(capsys)
    assert lines[0].startswith("resnet8 on 3 x 32 x 32: it can be cut at ")
    row = next(line.split() for line in lines if line.startswith("layer2_0 "))
    # two 3x3 convolutions and the 1x1 one of the shortcut, on 16 x 16 positions
    flops = 2 * 256 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
    assert row[1:] == ["32", "x", "16", "x", "16", f"{32 * 16 * 16 * 4:,}", f"{flops / 1e6:,.1f}", "M"]
    assert lines[-1].startswith("(the output)")


def test_a_function_that_makes_a_network_and_what_crosses(module, capsys):
    assert main(["cuts", "--network", "models_of_a_user:skip", "--input-shape", "6", "--all"]) == 0
    lines = lines_of(capsys)
    assert "it can be cut at 1 of 3 places" in lines[0]
    crossing = "the output of one, which add in the forward of the model uses later, crosses it"
    assert f"two: {crossing}" in lines and f"three: {crossing}" in lines


def test_where_skips_may_be_detached(module, capsys):
    assert main(["cuts", "--network", "models_of_a_user:skip", "--input-shape", "6", "--skips", "detach"]) == 0
    lines = lines_of(capsys)
    assert "it can be cut at 3 of 3 places" in lines[0]
    assert lines[1].endswith("crossing beside it, bytes per sample")
    assert [line.split()[0] for line in lines[2:5]] == ["one", "two", "three"]
    assert lines[2].endswith(" M") and lines[3].endswith("M  one 24") and lines[4].endswith("M  one 24")
    assert main(["cuts", "--network", "models_of_a_user:dense", "--input-shape", "6", "--skips", "detach"]) == 0
    beside = "M  the input 24, layers.0 4, layers.1 4 and 1 more, 36 in all"
    assert next(line for line in lines_of(capsys) if line.startswith("layers.3 ")).endswith(beside)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models_of_a_user:skip"], "--input-shape is missing"),
        (["models_of_a_user:absent", "--input-shape", "6"], "absent"),
        (["models_of_a_user:number", "--input-shape", "6"], "returns int"),
        (["resnet7"], "unknown network 'resnet7'"),
        (["gpt"], "gpt is a language model, made of layers with a cut after any of them: --modules of train and plan"),
        (["models_of_a_user:skip", "--input-shape", "5"], "a dry run of Skip"),
        (["resnet8", "--input-shape", "3", "8", "-8"], "--input-shape is sizes of at least 1; got 3 8 -8"),
    ],
)
def test_what_is_not_understood_is_refused(module, capsys, arguments, message):
    assert main(["cuts", "--network", *arguments]) == 1
    assert message in capsys.readouterr().err

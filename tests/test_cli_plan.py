"""``python -m auglocal_ext plan`` as a user meets it."""

from __future__ import annotations

import re

import pytest

from auglocal_ext.cli import main

SMALL = ["plan", "--network", "resnet8", "--width", "4", "--depth", "2", "--batch-size", "8"]


def predicted(text):
    return int(re.search(r"predicted [\d.]+ GB \(([\d,]+) bytes\)", text)[1].replace(",", ""))


def test_a_table_for_each_way(capsys):
    sizes = {}
    for way in (None, "none", "all", "peak"):
        assert main([*SMALL, *(["--recompute", way] if way else [])]) == 0
        said = capsys.readouterr()
        assert said.err == "" and "modules" in said.out and "batch size 8" in said.out
        assert said.out.startswith("resnet8, width 4 on 3 x 32 x 32, 10 outputs\nauglocal: 3 local modules; depth 2\n")
        sizes[way] = predicted(said.out)
    assert sizes[None] == sizes["none"] >= sizes["all"] >= sizes["peak"]


def test_numbers_of_layers(capsys):
    sizes = {}
    for way in ("none", "1", "1,1,all"):
        assert main([*SMALL, "--recompute", way]) == 0
        said = capsys.readouterr().out
        sizes[way] = predicted(said)
        assert ("first layer" in said) == ("adds 0.0%" not in said) == ("1" in way)
    assert sizes["none"] >= sizes["1"] >= sizes["1,1,all"]
    for way, message in (
        ("3", "--recompute 3 names the first 3 layers of local module 0, which has 1"),
        ("1,all", "got (1, 'all')"),
    ):
        assert main([*SMALL, "--recompute", way]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_options_reach_the_step(capsys):
    def size(*options):
        assert main([*SMALL, *options]) == 0
        return predicted(capsys.readouterr().out)

    plain = size()
    assert size("--amp", "bf16") < plain < size("--eager")
    assert size("--image-size", "48") > plain
    assert size("--overlap", "on") > plain
    assert size("--classes", "2") < plain
    size("--channels-last", "--no-joint-tail")
    assert main(["plan", "--network", "resnet8", "--rule", "contsup", "--context", "E", "--batch-size", "8"]) == 0


def test_backpropagation_is_one_eager_module(capsys):
    assert main([*SMALL[:5], "--rule", "bp", "--batch-size", "8"]) == 0
    bp = predicted(capsys.readouterr().out)
    assert main([*SMALL, "--modules", "1", "--eager"]) == 0
    assert bp == predicted(capsys.readouterr().out)
    for options in (["--recompute", "peak"], ["--memory-budget", "1GB"], ["--overlap", "on"]):
        assert main([*SMALL[:5], "--rule", "bp", "--batch-size", "8", *options]) == 1
        assert "to the local rules, not to bp" in capsys.readouterr().err


def test_budget(capsys):
    assert main([*SMALL, "--memory-budget", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "of a budget of 1.000 GB" in said and "overlap on" in said
    assert main([*SMALL, "--memory-budget", "1KB"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no choice of recomputation fits") and "the least is" in error
    assert "by --recompute peak and overlap off" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--memory-budget", "1GB", "--recompute", "peak"],
            "--memory-budget chooses the least recomputation that fits",
        ),
        (["--memory-budget", "1GB", "--recompute", "all"], "it takes no --recompute all beside it"),
        (["--context", "E"], "--context belongs to the rule contsup"),
        (["--network", "resnet18"], "width applies to CIFAR ResNets"),
        (["--modules", "99"], "99"),
    ],
)
def test_wrong_input_is_one_message_and_status_1(capsys, arguments, said):
    assert main([*SMALL, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--batch-size", "8", "--rule", "nonsense"]])
def test_wrong_call_is_explained(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m auglocal_ext" in capsys.readouterr().err


def test_stages(capsys):
    assert main([*SMALL, "--stages", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 stages: predicted bytes per process" in said and "at most 1." in said
    assert main([*SMALL, "--stages", "2", "--replicas", "2", "--shard", "--amp", "bf16", "--recompute", "1,all,1"]) == 0
    assert "2 stages of 2 replicas, sharded: predicted" in capsys.readouterr().out
    for options, message in (
        (["--stages", "9"], "9 stages need as many local modules"),
        (["--stages", "2", "--shard"], "shard divides parameters among replicas"),
        (["--stages", "2", "--recompute", "peak"], "are for one process"),
        (["--replicas", "3"], "does not divide into 3 replicas"),
        (["--replicas", "2", "--memory-budget", "1GB"], "are for one process"),
        (["--stages", "2", "--overlap", "on"], "are for one process"),
    ):
        assert main([*SMALL, *options]) == 1
        assert message in capsys.readouterr().err
    assert main([*SMALL[:5], "--rule", "bp", "--batch-size", "8", "--stages", "2"]) == 1
    assert "--stages is for local modules, which bp has none of" in capsys.readouterr().err


def test_a_language_model(capsys):
    options = "--network gpt --layers 2 --width 16 --heads 2 --context 8 --batch-size 4"
    assert main(["plan", *options.split(), "--rule", "greedy"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("gpt, width 16 on windows of 8 tokens, 256 outputs\ngreedy: 3 local modules")
    assert main(["plan", *options.split(), "--image-size", "8"]) == 1
    assert "--image-size belongs to a run on images" in capsys.readouterr().err

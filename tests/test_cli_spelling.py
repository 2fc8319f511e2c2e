"""Messages of the library name options as the command line spells them; numbers are read with their limits."""

from __future__ import annotations

import argparse

import pytest

from auglocal_ext.cli import main
from auglocal_ext.cli.spelling import as_options, seed, size, too_large, whole

OPTIONS = {
    "head",
    "recompute",
    "overlap",
    "memory_budget",
    "stage_cuts",
    "depth",
    "joint_tail",
    "modules",
    "fused",
    "loss",
}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("choose depth <= 3, joint_tail=False, or", "choose depth <= 3, --no-joint-tail, or"),
        ("AugLocal(depth=6, joint_tail=True) trains", "AugLocal(depth=6, joint_tail=True) trains"),
        ('by recompute="peak" and overlap=True, of', "by --recompute peak and --overlap on, of"),
        ("memory_budget takes no recompute='all' beside it", "--memory-budget takes no --recompute all beside it"),
        ("such as stage_cuts=(4, 9), or", "such as --stage-cuts 4,9, or"),
        ("got recompute=(2, 'all'), which", "got --recompute 2,all, which"),
        ("leave modules= out", "leave --modules out"),
        ("fused=False runs", "--eager runs"),
        ("in a head infopro:loss=contrast,depth=3", "in a head infopro:loss=contrast,depth=3"),
        ("--stage-cuts is for stages, in runs/memory_budget", "--stage-cuts is for stages, in runs/memory_budget"),
        (
            "head=MAN(m=0.9, head=DGL(a=(), depth=2), depth=3) may",
            "--head MAN(m=0.9, head=DGL(a=(), depth=2), depth=3) may",
        ),
        (
            "unknown head 'MAN(a, depth=2, joint_tail, x()'; pass depth=3",
            "unknown head 'MAN(a, depth=2, joint_tail, x()'; pass --depth 3",
        ),
        ('the module\'s "in depth=2 ": depth=2', 'the module\'s "in depth=2 ": --depth 2'),
        ("head='infopro:loss=contrast, depth=3' makes", "--head infopro:loss=contrast,depth=3 makes"),
        ("head=DGL() and memory_budget", "--head DGL() and --memory-budget"),
    ],
)
def test_python_becomes_options(message: str, expected: str) -> None:
    assert as_options(message, OPTIONS, ("overlap",)) == expected


def test_numbers_have_limits() -> None:
    assert seed(str(2**64 - 1)) == 2**64 - 1
    assert whole("-3") == -3 and size("0.4GiB") == "0.4GiB" and size("400") == "400"
    for read, text, message in (
        (whole, "1e3", "expected a whole number, got '1e3'"),
        (whole, "9" * 20, r"expected a number below 2\^63"),
        (seed, str(2**64), r"expected a whole number from 0 to 2\^64 - 1, got 18446744073709551616"),
        (seed, "-1", r"from 0 to 2\^64 - 1, got -1"),
        (seed, "first", r"from 0 to 2\^64 - 1, got first"),
        (size, "1kb", r"expected bytes, such as 400MB .* got '1kb'"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            read(text)


def test_other_errors_of_torch_stay_errors() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        too_large(RuntimeError("shapes cannot be multiplied"))


def test_a_rule_in_a_message_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--network", "resnet8", "--batch-size", "4", "--rule", "auglocal", "--head"]
    assert main([*arguments, "man:head=auglocal:depth=2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --head MAN(") and error.count("--") == 1 and "joint_tail=True" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--width", "1000000"), "the network or the batch is too large to be made here: "),
        (("--batch-size", str(2**62)), "--batch-size must be at most 2147483647"),
        (("--image-size", str(2**62)), "--image-size must be at most 2147483647"),
    ],
)
def test_sizes_beyond_memory_are_one_line(
    options: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--network", "resnet8", "--rule", "greedy", "--batch-size", "4", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("command", [["train", "--delay", "1"], ["plan", "--batch-size", "4", "--delay=1"]])
def test_arguments_of_a_step_that_are_no_options_are_explained(command, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "LocalStep(..., mesh=mesh, delay=D), see docs/many-devices.md" in said

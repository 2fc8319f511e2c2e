"""``python -m auglocal_ext <command>``: what a person runs."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__

_COMMANDS = ("train", "analyze", "plan", "cuts", "info")

_GUIDE = f"""\
auglocal_ext {__version__}: train networks module by module, with local losses

train    a network on images, DIR/train/CLASS/*.png and DIR/test/CLASS/*.png
             python -m auglocal_ext train --data DIR --rule auglocal --depth 3
analyze  what the layers of trained networks represent
             python -m auglocal_ext analyze --checkpoint runs/resnet32-auglocal
plan     the memory of a training step, predicted
             python -m auglocal_ext plan --network resnet110 --batch-size 256
cuts     where a network can be cut into local modules
             python -m auglocal_ext cuts --network timm:vit_tiny_patch16_224
info     versions, devices, and what is missing     python -m auglocal_ext info
Options: python -m auglocal_ext COMMAND --help. Docs: README.md and docs/."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong first, then one line of usage and where the options are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n{self.format_usage()}options: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, or say which there are; returns its exit status (a wrong call exits with 2)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(_GUIDE)
        return 0
    parser = _Parser(
        prog="python -m auglocal_ext",
        usage="python -m auglocal_ext COMMAND [options]",
        description="Train networks module by module, with local losses.",
    )
    parser.add_argument("--version", action="version", version=f"auglocal_ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=parser.prog)
    # Only the command that runs is imported: `info` must work where `train` does not.
    wanted = arguments[:1] if arguments[0] in _COMMANDS else _COMMANDS
    commands = {name: importlib.import_module(f".{name}", __name__) for name in wanted}
    for command in commands.values():
        command.add_parser(subparsers)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        why = _explained(unknown) if parsed.command in ("train", "plan") else ""
        subparsers.choices[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}{why}")
    with _own_warnings_in_a_line():
        return int(commands[parsed.command].run(parsed))


def _explained(unknown: Sequence[str]) -> str:
    """Why a command has no such option that a step in Python has."""
    from ..training.config.settings import PYTHON_ALONE

    names = [name for name in PYTHON_ALONE if any(each.partition("=")[0] == f"--{name}" for each in unknown)]
    return "".join(f"\n--{name} {PYTHON_ALONE[name]}" for name in names)


@contextmanager
def _own_warnings_in_a_line() -> Iterator[None]:
    """What the package itself warns of is a line on standard error, without the place in its source."""
    package, show = Path(__file__).resolve().parents[1], warnings.showwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if category is UserWarning and Path(filename).resolve().is_relative_to(package):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = shown
        yield

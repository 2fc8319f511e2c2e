"""``python -m auglocal_ext <command>``: what a person runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

_COMMANDS = ("analyze", "info", "plan", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (argparse itself exits with 2 for a wrong call)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m auglocal_ext", description="Train networks module by module, with local losses."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    # Only the command that runs is imported: `info` must work where `train` does not.
    wanted = arguments[:1] if arguments and arguments[0] in _COMMANDS else _COMMANDS
    commands = {name: importlib.import_module(f".{name}", __name__) for name in wanted}
    for command in commands.values():
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    return commands[parsed.command].run(parsed)

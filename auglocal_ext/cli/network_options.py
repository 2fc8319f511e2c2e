"""Options that follow from the settings of a run: what network is cut by what rule, and how it is trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..models import NAMES
from ..training.config.language_models import DEFAULTS, LANGUAGE_MODELS, check_network
from ..training.config.recomputation import ALLOWED, problem_of_recompute
from ..training.config.rule_options import OPTIONS, help_of
from ..training.config.settings import SETTINGS
from ..training.config.values import reader
from ..training.errors import SettingsError
from .spelling import seed, size, whole


def add_network_options(group: Any, rules: Sequence[str]) -> None:
    """Adds them to a group of arguments; each has the default None, which tells that it was not given.

    Args:
        rules: what ``--rule`` may be.
    """
    add = group.add_argument
    add(
        "--network",
        type=network_name,
        metavar="NAME",
        help=f"{', '.join(NAMES)} (default resnet32); torchvision:NAME or timm:NAME, of the networks of these "
        f"packages; for text {', '.join(LANGUAGE_MODELS)}",
    )
    add(
        "--width",
        type=whole,
        metavar="N",
        help=f"width of a CIFAR ResNet's first stage (default 16), or of gpt (default {DEFAULTS['width']})",
    )
    add(
        "--rule",
        choices=rules,
        help="default auglocal" + ("; bp: backpropagation of the same network" if "bp" in rules else ""),
    )
    for name, option in OPTIONS.items():
        flag, text = "--" + name.replace("_", "-"), help_of(name).replace("%", "%%")  # argparse formats help
        if option.kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            add(flag, type=_typed(option.kind), metavar=option.metavar, help=text)
    add(
        "--eager",
        dest="fused",
        action="store_const",
        const=False,
        help="torch's own layers instead of fused ones, which save memory (and on a CPU not always time)",
    )


def add_settings(group: Any, table: str, without: Sequence[str] = ()) -> None:
    """Adds the settings of a recipe's table to a group of arguments, those that have a help; with the default None."""
    for setting in SETTINGS.values():
        if setting.table != table or setting.help is None or setting.name in without:
            continue
        if setting.kind is bool:
            add = partial(group.add_argument, action=argparse.BooleanOptionalAction, default=None)
        elif setting.choices:
            add = partial(group.add_argument, choices=setting.choices)
        else:
            read = _READ.get(setting.name) or _READ_KIND.get(setting.kind, str)
            add = partial(group.add_argument, type=read, metavar=setting.metavar)
        add(setting.flag, help=setting.help)


def _cuts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None


def recomputation(text: str) -> str:
    """What is recomputed, as argparse reads it."""
    if problem_of_recompute(text) is not None:
        raise argparse.ArgumentTypeError(f"expected {ALLOWED}, got {text!r}")
    return text


_READ_KIND: dict[Any, Callable[[str], Any]] = {int: whole, float: float, tuple[int, ...]: _cuts}
_READ: dict[str, Callable[[str], Any]] = {"memory_budget": size, "recompute": recomputation, "seed": seed}


def network_name(text: str) -> str:
    """The name of a network, as argparse reads it."""
    try:
        check_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def window_as_context(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with ``--context N`` of a language model as its ``context_length``: ContSup's has letters in it."""
    said = str(given.get("context", ""))
    if not said.isdecimal():
        return given
    if given.get("context_length", int(said)) != int(said):
        raise SettingsError(f"--context {said} and --context-length {given['context_length']} are the same option")
    return {name: value for name, value in given.items() if name != "context"} | {"context_length": int(said)}


def _typed(kind: Any) -> Callable[[str], Any]:
    read = reader(kind)

    def value(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return value

"""The rules of ``--rule`` and their options, which the rules' own fields say: help, checks and construction follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layers import group_children
from ..models import build
from ..partition import CONTSUP_BALANCED, cut_points
from ..rules import HEADS, INFOPRO_WEIGHTS, RULES, Rule
from ..rules import Option as RuleOption
from .errors import SettingsError
from .values import reader, write


@dataclass(frozen=True)
class Option:
    """An option of one rule or more: its type, what stands for its value in help, and each rule's own word on it."""

    kind: Any
    metavar: str
    rules: dict[str, RuleOption]


_MODULES = "number of local modules, or index of the last layer of each but the last"


def _options() -> dict[str, Option]:
    kind: Any = int | tuple[int, ...]
    found = {"modules": Option(kind, "K|I,J,..", {rule: RuleOption("modules", kind, _MODULES, "") for rule in RULES})}
    for rule, cls in RULES.items():
        for own in cls.options():
            shared = found.setdefault(own.name, Option(own.kind, own.metavar, {}))
            if shared.kind != own.kind:
                raise TypeError(f"--{own.name} is {own.kind} of {rule} and {shared.kind} of another rule")
            shared.rules[rule] = own
    head = found.pop("head")
    return found | {"head": head}


OPTIONS: dict[str, Option] = _options()

RULE_OPTIONS: dict[str, tuple[str, ...]] = {
    rule: tuple(name for name, option in OPTIONS.items() if rule in option.rules) for rule in RULES
} | {"bp": ()}

#: How a rule as head is written, for help and messages.
HEAD_SYNTAX = "RULE:OPTION=VALUE,OPTION=VALUE,..., such as auglocal:depth=3, with its own head= last"

# Where a rule is looked at before the data set is known.
_ANY_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def help_of(name: str) -> str:
    """What ``--help`` says of an option: its meaning for each rule that has it, with the rule's default."""
    if name == "modules":
        return _MODULES
    texts: dict[str, list[str]] = {}
    for rule, own in OPTIONS[name].rules.items():
        known = f"{own.help} (default {write(own.default)})" if own.default is not None else own.help
        texts.setdefault(known, []).append(rule)
    text = "; ".join(f"{', '.join(owners)}: {known}" for known, owners in texts.items())
    return f"{text}. Heads: {', '.join(HEADS)}. A rule as head: {HEAD_SYNTAX}" if name == "head" else text


def is_rule(head: str) -> bool:
    """Whether a head's text names a rule rather than a kind of classifier."""
    return head.partition(":")[0] in RULES


def parse_head(text: str) -> tuple[str, dict[str, Any]]:
    """``"infopro:loss=contrast,weights=5,0,0.5,1,head=auglocal:depth=3"`` -> the rule's name and options.

    A part without ``=`` continues the value before it; everything after ``head=`` belongs to that head. SettingsError
    for what is no option of the rule, or no value of the option.
    """
    rule, _, rest = text.partition(":")
    rest, cut, head = ("," + rest).partition(",head=")
    parts: list[str] = []
    for part in rest.removeprefix(",").split(",") if rest.strip(",") else []:
        if "=" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += "," + part
    known = [name for name in RULE_OPTIONS[rule] if name != "modules"]
    options: dict[str, Any] = {}
    for part in parts + ([f"head={head}"] if cut else []):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known or not equals:
            raise SettingsError(
                f"--head {text}: {part!r} is no option of {rule}; a rule as head is written {HEAD_SYNTAX}; "
                f"{rule} has {', '.join(known) or 'none'}"
            )
        if name in options:
            raise SettingsError(f"--head {text}: {name} is given twice")
        try:
            options[name] = reader(OPTIONS[name].kind)(value.strip())
        except ValueError as error:
            raise SettingsError(f"--head {text}: {name}: {error}") from error
    return rule, options


def write_head(rule: str, options: dict[str, Any]) -> str:
    """The text that ``parse_head`` reads back."""
    ordered = sorted(options.items(), key=lambda item: item[0] == "head")
    return rule + ":" * bool(options) + ",".join(f"{name}={write(value)}" for name, value in ordered)


def includes(stored: str, given: str) -> bool:
    """Whether the head ``given`` is ``stored``, which may say more (InfoPro's weights are filled in)."""
    if stored == given or not (is_rule(stored) and is_rule(given)):
        return stored == given
    (rule, known), (other, options) = parse_head(stored), parse_head(given)
    return rule == other and all(
        includes(str(known.get(name)), value) if name == "head" else known.get(name) == value
        for name, value in options.items()
    )


def fill_weights(rule: str, options: dict[str, Any], weights: Callable[[], Sequence[float]]) -> dict[str, Any]:
    """``options`` with InfoPro's weights where they were left out, in heads too."""
    options = dict(options)
    if rule == "infopro" and options.get("weights") is None:
        options["weights"] = tuple(weights())
    head = options.get("head")
    if isinstance(head, str) and is_rule(head):
        name, inner = parse_head(head)
        options["head"] = write_head(name, fill_weights(name, inner, weights))
    return options


def make(
    rule: str, options: dict[str, Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Rule:
    """The rule with these options; ``mean`` and ``std`` (0..255) are those the images are normalised by.

    Raises SettingsError for a value the rule refuses.
    """
    options = fill_weights(rule, options, lambda: _ANY_WEIGHTS)
    values = {name: value for name, value in options.items() if value is not None}
    head = values.get("head")
    if isinstance(head, str) and is_rule(head):
        values["head"] = make(*parse_head(head), mean, std)
    try:
        return RULES[rule].of_options(
            values, [m / 255 for m in mean or (0.0, 0.0, 0.0)], [s / 255 for s in std or (255.0, 255.0, 255.0)]
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def values_of(rule: str, made: Rule) -> dict[str, Any]:
    """Every option of a made rule but ``modules``; None for a head that is a rule, whose text is its value."""
    values = made.option_values()
    return {name: None if isinstance(value, Rule) else value for name, value in values.items()}


def infopro_weights(dataset: str, network: str, rule: Rule, modules: int | tuple[int, ...] | None) -> tuple[float, ...]:
    """InfoPro's ``(lambda1, lambda2, lambda1, lambda2)`` for an experiment of its paper; SettingsError for another."""
    if (dataset, network) not in INFOPRO_WEIGHTS:
        raise _unpublished(f"{network} on {dataset}")
    with torch.random.fork_rng(devices=[]):
        layers = len(group_children(build(network)))
    try:
        ends = rule.ends(layers, modules)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    count = len(ends)
    known = INFOPRO_WEIGHTS[dataset, network] if ends == cut_points(layers, count) else {}
    if ends[:-1] == _balanced_cuts(dataset, layers, count):
        known = INFOPRO_WEIGHTS.get((dataset, f"{network}, balanced"), {})
    if count not in known:
        raise _unpublished(f"{network} on {dataset} in {count} modules cut after {', '.join(map(str, ends[:-1]))}")
    first, last = known[count]
    return tuple(float(weight) for weight in (*first, *last))


def _unpublished(experiment: str) -> SettingsError:
    known = "; ".join(
        f"{network} on {dataset} in {', '.join(map(str, table))}"
        for (dataset, network), table in INFOPRO_WEIGHTS.items()
    )
    return SettingsError(
        f"no weights of InfoPro are known for {experiment}: give them (--weights A,B,C,D, or in a head "
        f"infopro:weights=A,B,C,D). Known: {known} modules"
    )


def _balanced_cuts(dataset: str, layers: int, count: int) -> tuple[int, ...] | None:
    # STL-10's three modules of ResNet-110 are cut elsewhere than CIFAR-10's in the released configuration.
    if (dataset, layers, count) == ("stl10", 55, 3):
        return (9, 20)
    return CONTSUP_BALANCED.get((layers, count))

"""The rules of ``--rule`` and their options, which the rules' own fields say: help, checks and construction follow."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rules import HEADS, RULES, Rule
from ...rules import Option as RuleOption
from ..errors import SettingsError
from .values import checked, reader, said, to_toml, write

#: A head in settings: a name, or a table of a rule and its options.
HeadSetting = str | dict[str, Any]


class WrongSetting(SettingsError):
    """A key of a recipe's table that is unknown or has a wrong value.

    Attributes:
        table: its name, as in ``[rule.head]``.
        key: empty for the table itself.
        what: what is wrong with it.
    """

    def __init__(self, table: str, key: str, what: str) -> None:
        super().__init__(f"[{table}]: {key} {what}" if key else f"[{table}] {what}")
        self.table, self.key, self.what = table, key, what


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

# For a rule that is made before the data set is known.
_ANY_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def help_of(name: str) -> str:
    """What ``--help`` says of an option: its meaning for each rule that has it, with the rule's default."""
    if name == "modules":
        return _MODULES
    texts: dict[str, list[str]] = {}
    for rule, own in OPTIONS[name].rules.items():
        known = own.described + (f" (default {write(own.default)})" if own.default is not None else "")
        texts.setdefault(known, []).append(rule)
    text = "; ".join(f"{', '.join(owners)}: {known}" for known, owners in texts.items())
    return f"{text}. Heads: {', '.join(HEADS)}. A rule as head: {HEAD_SYNTAX}" if name == "head" else text


def is_rule(head: str) -> bool:
    """Whether a head's text names a rule rather than a kind of classifier."""
    return head.partition(":")[0] in RULES


def head_options(rule: str) -> tuple[str, ...]:
    """The options of a rule as head: all but ``modules``, which the outer rule has."""
    return tuple(name for name in RULE_OPTIONS[rule] if name != "modules")


def read_head(value: Any, table: str = "rule.head", as_text: bool = True) -> HeadSetting:
    """A head as settings have it: the name of a classifier or of a rule, or a table with options of the rule.

    Args:
        value: a name, a rule as the command line writes it (``"auglocal:depth=3"``), or a table such as
            ``{"rule": "infopro", "loss": "contrast", "head": {"rule": "auglocal", "depth": 3}}``.
        table: its place in a recipe, for messages.
        as_text: whether a rule may be written as on the command line.

    Raises:
        SettingsError: for what is no option of the rule and no value of an option; of a table a :class:`WrongSetting`.
            Names of classifiers are checked by the rule.
    """
    outer, _, key = table.rpartition(".")
    if isinstance(value, str):
        if ":" in value and not as_text:
            what = f"{to_toml(value)} has options: write a table [{table}], with rule = and each option on a line"
            raise WrongSetting(outer, key, what)
        return _read_text(value) if is_rule(value) else value
    if not isinstance(value, Mapping):
        what = f"expected the name of a head, or a table [{table}], got {said(value)}"
        raise WrongSetting(outer, key, what)
    rule = value.get("rule")
    if not isinstance(rule, str) or rule not in RULES:
        came = "nothing" if rule is None else said(rule)
        raise WrongSetting(table, "rule", f"expected one of {', '.join(RULES)}, got {came}")
    known = head_options(rule)
    options: dict[str, Any] = {}
    for name, given in value.items():
        if name == "rule":
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'none'}"
            raise WrongSetting(table, name, f"is no option of {rule}; {hint}")
        if name == "head":
            options[name] = read_head(given, f"{table}.head", as_text)
            continue
        try:
            options[name] = checked(OPTIONS[name].kind, given)
        except ValueError as error:
            raise WrongSetting(table, name, str(error)) from error
    return _table(rule, options)


def _table(rule: str, options: Mapping[str, Any]) -> HeadSetting:
    return {"rule": rule, **options} if options else rule


def parts_of(head: HeadSetting) -> tuple[str, dict[str, Any]]:
    """Rule and options of a head that is a rule."""
    if isinstance(head, str):
        return head, {}
    return head["rule"], {name: value for name, value in head.items() if name != "rule"}


def _read_text(text: str) -> HeadSetting:
    """``"infopro:loss=contrast,weights=5,0,0.5,1,head=auglocal:depth=3"`` as a table.

    A part without ``=`` continues the value before it; everything after ``head=`` belongs to that head.
    """
    rule, _, rest = text.partition(":")
    rest, cut, head = ("," + rest).partition(",head=")
    parts: list[str] = []
    for part in rest.removeprefix(",").split(",") if rest.strip(",") else []:
        if "=" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += "," + part
    known = head_options(rule)
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
        if name == "head":
            options[name] = read_head(value.strip())
            continue
        try:
            options[name] = reader(OPTIONS[name].kind)(value.strip())
        except ValueError as error:
            raise SettingsError(f"--head {text}: {name}: {error}") from error
    return _table(rule, options)


def write_head(head: HeadSetting) -> str:
    """A head as the command line writes it, which ``read_head`` reads back."""
    if isinstance(head, str):
        return head
    rule, options = parts_of(head)
    ordered = sorted(options.items(), key=lambda item: item[0] == "head")
    said = [f"{name}={write_head(value) if name == 'head' else write(value)}" for name, value in ordered]
    return f"{rule}:{','.join(said)}"


def includes(stored: HeadSetting, given: HeadSetting) -> bool:
    """Whether the head ``given`` is ``stored``, which may say more (InfoPro's weights are filled in)."""
    if stored == given or not all(isinstance(head, dict) or is_rule(head) for head in (stored, given)):
        return stored == given
    (rule, known), (other, options) = parts_of(stored), parts_of(given)
    return rule == other and all(
        name in known and (includes(known[name], value) if name == "head" else known[name] == value)
        for name, value in options.items()
    )


def fill_weights(rule: str, options: dict[str, Any], weights: Callable[[], Sequence[float]]) -> dict[str, Any]:
    """``options`` with InfoPro's weights where they were left out, in heads too."""
    options = dict(options)
    if rule == "infopro" and options.get("weights") is None:
        options["weights"] = tuple(weights())
    head = options.get("head")
    if isinstance(head, dict) or (isinstance(head, str) and is_rule(head)):
        name, inner = parts_of(head)
        options["head"] = _table(name, fill_weights(name, inner, weights))
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
    if isinstance(head, dict) or (isinstance(head, str) and is_rule(head)):
        values["head"] = make(*parts_of(head), mean, std)
    try:
        return RULES[rule].of_options(
            values, [m / 255 for m in mean or (0.0, 0.0, 0.0)], [s / 255 for s in std or (255.0, 255.0, 255.0)]
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(_as_settings(rule, str(error))) from error


def _as_settings(rule: str, message: str) -> str:
    """A rule's message about its fields with the names that its options have in settings."""
    for each in RULES[rule].options():
        if each.field and each.field != each.name:
            message = re.sub(rf"(?<![\w.(]){each.field}(?==| \()", each.name, message)
    return message


def check_table(rule: str | None, table: Mapping[str, Any], place: str = "rule") -> None:
    """WrongSetting for what a recipe's table says of a rule and the rule refuses; it names the key that is the reason.

    Args:
        rule: None where it is chosen elsewhere: an option is then refused if every rule that has it refuses it.
        table: options, heads as tables among them, with ``modules`` and the rule's name or without.
        place: name of the table.
    """
    options = {name: value for name, value in table.items() if name not in ("rule", "modules")}
    head = options.get("head")
    if isinstance(head, dict):
        check_table(*parts_of(head), f"{place}.head")
    if rule is None:
        for name, value in options.items():
            refusals = [_refusal(owner, {name: value}) for owner in OPTIONS[name].rules]
            if all(refusals):
                raise _refused(place, name, refusals[0])
        return
    for name in table:
        if name != "rule" and name not in RULE_OPTIONS[rule]:
            owners = " and ".join(owner for owner, known in RULE_OPTIONS.items() if name in known)
            raise WrongSetting(place, name, f"belongs to the rule {owners}, not to {rule}")
    if rule != "bp" and (refusal := _refusal(rule, options)):
        alone = [name for name, value in options.items() if _refusal(rule, {name: value}) == refusal]
        raise _refused(place, alone[0] if alone else "", refusal)


def _refusal(rule: str, options: dict[str, Any]) -> str:
    """What the rule says against its options; empty if nothing."""
    try:
        make(rule, options)
    except SettingsError as error:
        return str(error)
    return ""


def _refused(place: str, key: str, refusal: str) -> WrongSetting:
    named, said_of_it = f"{key} ", refusal.removeprefix("--")
    own = key and said_of_it.startswith(named)
    return WrongSetting(place, key, said_of_it.removeprefix(named) if own else f"is refused: {refusal}")


def values_of(rule: str, made: Rule) -> dict[str, Any]:
    """Every option of a made rule but ``modules``; None for a head that is a rule, which is a table in settings."""
    values = made.option_values()
    return {name: None if isinstance(value, Rule) else value for name, value in values.items()}

"""The rules of ``--rule`` and their options: one table that help, checks and construction follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from ..auxiliary.heads import CONV_HEADS, DGL_HEADS
from ..models import build
from ..partition import CONTSUP_BALANCED, cut_points, group_children
from ..rules import DGL, INFOPRO_WEIGHTS, MAN, SAMPLING, AugLocal, ContSup, Greedy, InfoPro, PredSim, Rule
from .errors import SettingsError
from .values import reader, write

RULES: dict[str, type[Rule]] = {
    "auglocal": AugLocal,
    "contsup": ContSup,
    "dgl": DGL,
    "greedy": Greedy,
    "infopro": InfoPro,
    "man": MAN,
    "predsim": PredSim,
}


@dataclass(frozen=True)
class Option:
    """An option of rules: its type, and per rule that has it what it means there.

    ``field`` is the rule's own name for it, where that is another one.
    """

    kind: Any
    rules: dict[str, str]
    field: str = ""


_OR_RULE = f"{', '.join(CONV_HEADS)}, or a rule"

OPTIONS: dict[str, Option] = {
    "modules": Option(
        int | tuple[int, ...],
        dict.fromkeys(RULES, "number of local modules, or index of the last layer of each but the last"),
    ),
    "depth": Option(int, {"auglocal": "layers of an auxiliary network with its classifier"}),
    "pyramid": Option(float, {"auglocal": "slope of the pyramidal depth, 0..1"}),
    "joint_tail": Option(bool, {"auglocal": "train the last layers, as many as --depth, as one module"}),
    "sampling": Option(str, {"auglocal": ", ".join(SAMPLING)}),
    "downsampling": Option(bool, {"auglocal": "auxiliary blocks take widths and strides of the sampled layers"}),
    "context": Option(str, {"contsup": "R0, E, R1, R1E, R2, R4, R8, R16, ..."}),
    "loss": Option(str, {"infopro": "softmax, contrast"}),
    "weights": Option(
        tuple[float, ...],
        {
            "infopro": "lambda1 and lambda2 (reconstruction, --loss) of the first local module, then of the last; "
            "left out, those of InfoPro's experiments for the data set, network and number of modules"
        },
    ),
    "beta": Option(float, {"predsim": "weight of the similarity loss, 0..1"}),
    "limit": Option(int, {"predsim": "features that the prediction layer is fed, at most"}),
    "scale_classifier": Option(bool, {"predsim": "the last module's cross-entropy has weight 1 - beta too, not 1"}),
    "average_momentum": Option(float, {"man": "m in average = m average + (1 - m) block"}, field="momentum"),
    "head": Option(
        str,
        {
            "auglocal": "linear, vgg",
            "contsup": _OR_RULE,
            "dgl": ", ".join(DGL_HEADS),
            "infopro": _OR_RULE,
            "man": _OR_RULE,
            "predsim": f"its own prediction layer, {_OR_RULE}",
        },
    ),
}

RULE_OPTIONS: dict[str, tuple[str, ...]] = {
    rule: tuple(name for name, option in OPTIONS.items() if rule in option.rules) for rule in RULES
} | {"bp": ()}

#: How a rule as head is written, for help and messages.
HEAD_SYNTAX = "RULE:OPTION=VALUE,OPTION=VALUE,..., such as auglocal:depth=3, with its own head= last"

# Where a rule is looked at before the data set is known.
_ANY_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def help_of(name: str) -> str:
    """What ``--help`` says of an option: its meaning for each rule that has it, with the rule's default."""
    rules = OPTIONS[name].rules
    if name == "modules":
        return next(iter(rules.values()))
    texts: dict[str, list[str]] = {}
    for rule, meaning in rules.items():
        default = _defaults(rule).get(OPTIONS[name].field or name)
        known = f"{meaning} (default {write(default)})" if default is not None else meaning
        texts.setdefault(known, []).append(rule)
    text = "; ".join(f"{', '.join(owners)}: {known}" for known, owners in texts.items())
    return f"{text}. A rule as head: {HEAD_SYNTAX}" if name == "head" else text


def _defaults(rule: str) -> dict[str, Any]:
    known: Any = RULES[rule]
    return {field.name: field.default for field in fields(known) if field.default is not MISSING}


def is_rule(head: str) -> bool:
    """Whether a head's text names a rule rather than a kind of classifier."""
    return head.partition(":")[0] in RULES


def parse_head(text: str) -> tuple[str, dict[str, Any]]:
    """``"infopro:loss=contrast,weights=5,0,0.5,1,head=auglocal:depth=3"`` -> the rule's name and options.

    A part without ``=`` continues the value before it; everything after ``head=`` belongs to that head. SettingsError
    for what is no option of the rule, or no value of the option.
    """
    rule, _, rest = text.partition(":")
    if rule == "contsup":
        raise SettingsError(f"--head {text}: contsup supplies modules with context, which a head has none of")
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
    arguments = {OPTIONS[name].field or name: value for name, value in options.items() if value is not None}
    head = arguments.get("head")
    if isinstance(head, str) and is_rule(head):
        arguments["head"] = make(*parse_head(head), mean, std)
    if rule == "infopro":
        weights = arguments.pop("weights")
        if len(weights) != 4:
            raise SettingsError(
                f"--weights are four numbers, lambda1 and lambda2 of the first local module and of the last; "
                f"got {write(weights)}"
            )
        arguments |= {"first": tuple(weights[:2]), "last": tuple(weights[2:])}
        if mean is not None and std is not None:
            arguments |= {"mean": tuple(m / 255 for m in mean), "std": tuple(s / 255 for s in std)}
    try:
        return RULES[rule](**arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def values_of(rule: str, made: Rule) -> dict[str, Any]:
    """Every option of a made rule but ``modules``; None for a head that is a rule, whose text is its value."""
    values: dict[str, Any] = {}
    for name in RULE_OPTIONS[rule]:
        if name == "weights":
            assert isinstance(made, InfoPro)
            values[name] = (*made.first, *made.last)
        elif name != "modules":
            value = getattr(made, OPTIONS[name].field or name)
            values[name] = None if isinstance(value, Rule) else value
    return values


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

"""A rule's options: their names on the command line and in recipes, their help, and the values they may have."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """An option of a rule.

    Attributes:
        name: on the command line and in recipes.
        kind: type of its values as :mod:`auglocal_ext.training.config.values` reads them: bool, int, float, str,
            ``tuple[float, ...]``, ``int | tuple[int, ...]``, or of a head ``str | dict``: a name, or a rule and its
            options.
        help: a line for ``--help``.
        field: the rule's own name for it.
        default: of the rule; None where it has none.
        metavar: what stands for a value in help.
        choices: all values it may have; empty where they are not listed.
        least: smallest value.
        most: largest value.
        above: a bound that values lie above.
    """

    name: str
    kind: Any
    help: str
    field: str
    default: Any = None
    metavar: str = "X"
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None

    @property
    def described(self) -> str:
        """Its help, with what its values may be."""
        if self.choices:
            return f"{self.help}: {', '.join(self.choices)}"
        if self.least is not None and self.most is not None:
            return f"{self.help}, {self.least:g}..{self.most:g}"
        if self.least is not None:
            return f"{self.help}, at least {self.least:g}"
        return self.help if self.above is None else f"{self.help}, above {self.above:g}"

    def check(self, value: Any) -> None:
        """ValueError for what is no value of it."""
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{self.field} is one of {', '.join(self.choices)}; got {value!r}")
            return
        if self.kind not in _NUMBERS:
            return
        name, kind = _NUMBERS[self.kind]
        right = isinstance(value, kind) and isinstance(value, bool) == (self.kind is bool)
        right = right and -math.inf < value < math.inf  # math.isfinite fails at whole numbers of hundreds of digits
        if right and self.least is not None:
            right = value >= self.least and (self.most is None or value <= self.most)
        if right and self.above is not None:
            right = value > self.above
        if not right:
            raise ValueError(f"{self.field} ({self.help}) is {name}{self._range}; got {value!r}")

    @property
    def _range(self) -> str:
        if self.least is not None and self.most is not None:
            return f" within {self.least:g} .. {self.most:g}"
        if self.least is not None:
            return f" of at least {self.least:g}"
        return "" if self.above is None else f" above {self.above:g}"


_NUMBERS: dict[Any, tuple[str, Any]] = {
    bool: ("True or False", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
}


def option(
    default: Any,
    help: str,
    *,
    name: str = "",
    kind: Any = None,
    metavar: str = "X",
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> Any:
    """A field of a rule's dataclass that is an option of the command line and of recipes too.

    ``Rule.__post_init__`` checks that its value is of its kind and within these bounds.

    Args:
        default: the field's.
        help: a line for ``--help``, which adds what values it may have.
        name: where it is not the field's.
        kind: type of its values, where the field's annotation does not say it.
        metavar: what stands for a value in help.
        choices: all values it may have.
        least: smallest value.
        most: largest value, beside ``least``.
        above: a bound that values lie above.
    """
    said = {"name": name, "help": help, "kind": kind, "metavar": metavar, "choices": tuple(choices)}
    return field(default=default, metadata=said | {"least": least, "most": most, "above": above})


def options_of(rule: type[Any]) -> list[Option]:
    """The options of a rule's class in the order of its fields."""
    hints = get_type_hints(rule)
    found = []
    for each in fields(rule):
        if "help" not in each.metadata:
            continue
        said = dict(each.metadata)
        kind = said.pop("kind") or _not_none(hints[each.name])
        default = None if each.default is MISSING else each.default
        found.append(Option(said.pop("name") or each.name, kind, field=each.name, default=default, **said))
    return found


def head_option(default: Any, help: str = "a head or a rule") -> Any:
    """The field ``head`` of a rule, whose auxiliary network takes the output of the rule's blocks.

    Args:
        default: a head's name, or a rule.
        help: a line for ``--help``.
    """
    return option(default, help, kind=str | dict, metavar="H")


def check_options(rule: Any) -> None:
    """ValueError unless every option of a rule has a value that it may have; None is one where it is the default."""
    for each in options_of(type(rule)):
        value = getattr(rule, each.field)
        if value is not None or each.default is not None:
            each.check(value)


def _not_none(hint: Any) -> Any:
    """``bool`` of ``bool | None``; what is no such union stays."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) is UnionType else []
    return kinds[0] if len(kinds) == 1 else hint

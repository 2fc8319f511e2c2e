"""What a rule's options are called on the command line and in recipes, and what help says of them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """An option of a rule.

    Attributes:
        name: on the command line and in recipes.
        kind: type of its values as :mod:`auglocal_ext.training.values` reads them: bool, int, float, str,
            ``tuple[float, ...]``, ``int | tuple[int, ...]``, or of a head ``str | dict``: a name, or a rule and its
            options.
        help: a line for ``--help``.
        field: the rule's own name for it.
        default: of the rule; None where it has none.
        metavar: what stands for a value in help.
    """

    name: str
    kind: Any
    help: str
    field: str
    default: Any = None
    metavar: str = "X"


def option(default: Any, help: str, *, name: str = "", kind: Any = None, metavar: str = "X") -> Any:
    """A field of a rule's dataclass that is an option of the command line and of recipes too.

    Args:
        default: the field's.
        help: a line for ``--help``.
        name: where it is not the field's.
        kind: type of its values, where the field's annotation does not say it.
        metavar: what stands for a value in help.
    """
    return field(default=default, metadata={"help": help, "name": name, "kind": kind, "metavar": metavar})


def options_of(rule: type[Any]) -> list[Option]:
    """The options of a rule's class in the order of its fields."""
    hints = get_type_hints(rule)
    found = []
    for each in fields(rule):
        if "help" not in each.metadata:
            continue
        said = each.metadata
        kind = said["kind"] or _not_none(hints[each.name])
        default = None if each.default is MISSING else each.default
        found.append(Option(said["name"] or each.name, kind, said["help"], each.name, default, said["metavar"]))
    return found


def head_option(default: Any, help: str = "a head or a rule") -> Any:
    """The field ``head`` of a rule, whose auxiliary network takes the output of the rule's blocks.

    Args:
        default: a head's name, or a rule.
        help: a line for ``--help``.
    """
    return option(default, help, kind=str | dict, metavar="H")


def init_option(others: tuple[str, ...] = ("released",)) -> Any:
    """The field ``init`` of a rule: whose initial values its auxiliary networks have, ``"own"`` or those of ``others``.

    ``"released"`` is the code of the rule's paper, ``"auglocal"`` AugLocal's version of that rule.
    """
    return option("own", f"initial values of the auxiliary networks: {', '.join(('own', *others))}", kind=str)


def check_init(init: str, others: tuple[str, ...] = ("released",)) -> None:
    """ValueError unless ``init`` is ``"own"`` or one of ``others``."""
    if init not in ("own", *others):
        raise ValueError(f"init is one of own, {', '.join(others)}; got {init!r}")


def _not_none(hint: Any) -> Any:
    """``bool`` of ``bool | None``; what is no such union stays."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) is UnionType else []
    return kinds[0] if len(kinds) == 1 else hint

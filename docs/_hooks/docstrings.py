"""How the site reads docstrings: Sphinx roles become links, ``#:`` comments count, and options show their defaults."""

from __future__ import annotations

import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([\w.]+)`")
# Two colons at the end of a paragraph, and the indented block after it.
_LITERAL = re.compile(r"^(?P<lead>[^\n]*?)::\n\n(?P<block>(?: {4}[^\n]*(?:\n|$)|\n)+)", re.M)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, obj: griffe.Object) -> None:
        if obj.docstring is None and isinstance(obj, griffe.Attribute):
            obj.docstring = _comment(obj)
        if obj.docstring is not None:
            text = _LITERAL.sub(_fenced, obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda role: _linked(role[1], obj), text)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.default = _default(parameter.default)
        elif isinstance(obj, griffe.Attribute):
            obj.value = _default(obj.value)
        for member in obj.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)


def _comment(attribute: griffe.Attribute) -> griffe.Docstring | None:
    """The lines above an attribute that start with ``#:``, Sphinx's way to document it."""
    if attribute.lineno is None or not isinstance(attribute.filepath, Path):
        return None
    lines: list[str] = []
    for line in reversed(_lines(attribute.filepath)[: attribute.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        lines.insert(0, line.strip()[2:].strip())
    return griffe.Docstring("\n".join(lines), parent=attribute) if lines else None


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _fenced(found: re.Match[str]) -> str:
    lead = f"{found['lead']}:\n\n" if found["lead"].strip() else ""
    return f"{lead}```python\n{textwrap.dedent(found['block']).strip()}\n```\n\n"


def _linked(name: str, obj: griffe.Object) -> str:
    """A link to ``name`` as seen from ``obj``; plain code where the reference has no entry for it."""
    path = name
    if not name.startswith("auglocal_ext"):
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            pass
    return f'<autoref identifier="{path}" optional><code>{name.removeprefix("auglocal_ext.")}</code></autoref>'


def _default(value: Any) -> Any:
    """The default of a rule's field or of a setting: the first argument of the function that makes it."""
    if not isinstance(value, griffe.ExprCall) or str(value.function) not in ("option", "head_option", "_setting"):
        return value
    first = value.arguments[0]
    return None if isinstance(first, griffe.ExprKeyword) else first

"""Formulas become MathML when the site is built, so that a page needs no script to show them."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.S)


def on_page_content(content: str, **_: object) -> str:
    return _FORMULA.sub(
        lambda found: convert(html.unescape(found[2]).strip(), display="block" if found[1] == "[" else "inline"),
        content,
    )

"""Formulas become MathML while the pages are built, so that reading one needs no script and no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs calls this with the HTML of every page."""
    return _FORMULA.sub(_mathml, content)


def _mathml(formula: re.Match[str]) -> str:
    math = convert(html.unescape(formula["latex"]), display="inline" if formula["tag"] == "span" else "block")
    return math.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em" />')  # browsers set none

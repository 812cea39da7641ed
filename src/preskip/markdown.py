"""Markdown: text that is shown as it is, code, tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

# An underscore between letters or digits starts no emphasis: `lambada_openai` stays readable.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~#$]|(?<![^\W_])_|_(?![^\W_])")
# What would begin a list, a rule or an underlined heading, where the text begins a line.
_FIRST = re.compile(r"^(\d*)([-+=.)])(?=[-= ]|$)")


def escape(text: str) -> str:
    """Text on one line, shown by Markdown as it is, also inside a table."""
    return _FIRST.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", " ".join(text.split())))


def code_block(code: str, language: str) -> str:
    """A fenced block whose fence is longer than any run of backticks inside."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are escaped."""
    lines = [headings, ["---"] * len(headings), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

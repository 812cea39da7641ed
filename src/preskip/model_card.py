"""Model cards: the Hub's metadata, and Markdown that shows names as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

LICENCE = "Licence: the base's licence covers its weights and may bind these; the training adds none of its own."
REGISTERS = "registers the architecture; or pass trust_remote_code=True"
# An underscore between letters or digits starts no emphasis: `lambada_openai` stays readable.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~#$]|(?<![^\W_])_|_(?![^\W_])")
# What would begin a list, a rule or an underlined heading, where the text begins a line.
_FIRST = re.compile(r"^(\d*)([-+=.)])(?=[-= ]|$)")


def card_text(data: ModelCardData, *sections: str) -> str:
    """README.md: metadata, then sections of Markdown.

    Raises:
        ValueError: the metadata is not what the Hub reads.
    """
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def escape(text: str) -> str:
    """Text on one line, shown by Markdown as it is, also inside a table."""
    return _FIRST.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", " ".join(text.split())))


def code_block(code: str, language: str) -> str:
    """A fenced block whose fence is longer than any run of backticks inside."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"


def bullets(lines: Sequence[str]) -> str:
    """A list; its lines are not escaped."""
    return "\n".join(f"* {line}" for line in lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are escaped."""
    lines = [headings, ["---"] * len(headings), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loading(registers: str | None) -> str:
    """Code that loads a whole checkpoint.

    Args:
        registers: a comment on `import preskip`, for an architecture that transformers does not know; None otherwise.
    """
    own = [f"import preskip  # {registers}"] if registers else []
    load = 'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")'
    return "\n".join([*own, "from transformers import AutoModelForCausalLM", "", load])

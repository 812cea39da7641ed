"""Pieces of a model card's Markdown: text that is shown as it is, code, tables, and how to load what the card is of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

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


def hub_id(model: Mapping[str, Any]) -> str | None:
    """The Hub id of a run's base, or None for one from elsewhere.

    Args:
        model: what run.json says of it.
    """
    name = model["name"]
    return name if model.get("source") == f"Hugging Face Hub {name}" else None


def adapter_usage(
    model: Mapping[str, Any], dtype: str, types: Mapping[str | None, str], trust_remote_code: bool
) -> str:
    """Code that loads a base and puts an adapter on it.

    Args:
        model: what run.json says of the base.
        dtype: of its weights.
        types: PEFT's type of each stacked adapter by its sub-folder; of a single one under None.
        trust_remote_code: whether the base needs code of its own.
    """
    identity = hub_id(model)
    more = ", trust_remote_code=True" if trust_remote_code else ""
    if identity and model.get("revision"):
        more += f", revision={json.dumps(model['revision'])}"
    loader = "AutoModelForCausalLM.from_pretrained" if identity else "load_model"
    name = json.dumps(model["name"], ensure_ascii=False)
    own = "adapter" if "PRESKIP" in types.values() else "model" if model["type"].startswith("preskip_") else None
    lines = [
        *([f"import preskip  # registers the {own} type"] if own else []),
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM" if identity else "from preskip.assets import load_model",
        "",
        f"base = {loader}({name}, dtype=torch.{dtype}{more})",
    ]
    if None in types:
        return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "PATH_OR_ID")'])
    for folder, kind in types.items():
        # PEFT keeps one table of names per base.
        options = f'subfolder="{folder}", adapter_name="{kind.lower()}"'
        lines.append(f'model = PeftModel.from_pretrained(base, "PATH_OR_ID", {options})')
    return "\n".join(lines)


def model_usage(registers: str | None) -> str:
    """Code that loads a whole checkpoint.

    Args:
        registers: a comment on `import preskip`, for an architecture that transformers does not know; None otherwise.
    """
    return "\n".join(
        [
            *([f"import preskip  # {registers}"] if registers else []),
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")',
        ]
    )

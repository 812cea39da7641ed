"""The stub of a checkpoint: `modeling_preskip.py`, which imports its classes where `preskip` is not imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STUB = "modeling_preskip.py"
_PREFIX = f"{Path(STUB).stem}."


def auto_map(config: type, model: type, causal_lm: type) -> dict[str, str]:
    """What a config says of where its classes are: in the stub."""
    classes = {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": causal_lm}
    return {auto: f"{_PREFIX}{made.__name__}" for auto, made in classes.items()}


def stub_text(auto_map: Mapping[str, Any]) -> str | None:
    """The stub that an `auto_map` names; None where it names none in the checkpoint's own folder."""
    names = sorted(_names(auto_map.values()))
    if not names:
        return None
    return (
        '"""This checkpoint\'s classes live in the package preskip (`pip install preskip`)."""\n\n'
        f"from preskip.architecture import {', '.join(names)}  # noqa: F401\n"
    )


def _names(references: Iterable[Any]) -> set[str]:
    return {
        reference.removeprefix(_PREFIX)
        for reference in references
        if isinstance(reference, str) and reference.startswith(_PREFIX)
    }

"""A synthetic explain.json by its schema: the standard library's own English in tokens, with plausible numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = 30
CLASSES: dict[str, dict[str, float]] = {
    "frequency": {"rarest fifth": 0.62, "rare": 0.48, "middle": 0.4, "frequent": 0.33, "most frequent fifth": 0.27},
    "position": {"whole word": 0.37, "first piece": 0.44, "later piece": 0.58},
    "repeat": {"first in context": 0.46, "repeated": 0.35},
    "kind": {"letters": 0.4, "digits": 0.66, "punctuation": 0.29, "space": 0.2},
    "case": {"lower": 0.38, "capitalised": 0.47, "upper": 0.51},
    "word": {"content word": 0.45, "function word": 0.28},
}
STRANGE = [
    "</script><script>alert(1)</script>",
    ' "',
    "'",
    "\n\n",
    " 🦊",
    " שלום",
    " مرحبا",
    "<b>",
    "&amp;",
    "\t",
    "\ufffd",
    "",
    "\\",
]


def write_explain(
    folder: Path,
    *,
    layers: int = LAYERS,
    documents: int = 10,
    tokens: int = 500,
    skip: bool = True,
    enrichment: bool = True,
    strange: bool = True,
    **changes: Any,
) -> Path:
    """Write FOLDER/explain.json and return its path.

    Args:
        folder: made if absent.
        layers, documents, tokens: extent of the bypass map; tokens per shown document.
        skip, enrichment: whether the arm has the part.
        strange: whether the first document begins with tokens that are hard to show.
        changes: top-level entries that replace the made ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "explain.json").write_text(
        json.dumps({**explain(layers, documents, tokens, skip, enrichment, strange), **changes}), encoding="utf-8"
    )
    return folder / "explain.json"


def explain(layers: int, documents: int, tokens: int, skip: bool, enrichment: bool, strange: bool) -> dict[str, Any]:
    """The content of explain.json."""
    generator = np.random.default_rng(7)
    shown = []
    for index, (topic, text) in enumerate(_texts(documents)):
        pieces = _tokens(text, tokens)
        if strange and index == 0:
            pieces = [*STRANGE, *pieces][:tokens]
        shown.append(_document(f"doc-{index}", f"Licence, “{topic}”", pieces, layers, skip, enrichment, generator))
    texts = [
        {"id": entry["id"], "title": entry["title"], "set": "held-out", "tokens": len(entry["tokens"]), "shown": True}
        for entry in shown
    ]
    texts += [
        {"id": f"more-{i}", "title": f"Message {i}", "set": "held-out", "tokens": 512, "shown": False}
        for i in range(20)
    ]
    return {
        "schema_version": 1,
        "kind": "explain",
        "preskip_version": "0.3.0",
        "created": "2026-11-24T14:20:00+00:00",
        "command": ["preskip", "explain", "runs/my run"],
        "source": {"kind": "run", "name": "my run", "arm": "preskip", "seed": 1},
        "model": {
            "name": "smollm2",
            "type": "llama",
            "layers": layers,
            "hidden_size": 576,
            "parameters": 169_351_488,
            "dtype": "float32",
        },
        "settings": {"expansion": 1.25, "activation": "silu", "content_skip": skip, "preprojection": enrichment},
        "texts": texts,
        "layers": [_layer(layer, layers, skip, enrichment, generator) for layer in range(layers)],
        "classes": [
            _class(dimension, name, size, layers, skip, enrichment, generator)
            for dimension, classes in CLASSES.items()
            for name, size in classes.items()
        ],
        "documents": shown,
        "method": {
            "statistics": "held-out",
            "context_length": 512,
            "frequency_tokens": 210_000,
            "attention_documents": 8,
            "ablation_documents": 24,
            "ablation_words": 256,
        },
        "timings": {"read": 48.2, "ablation": 61.0, "total": 112.4},
        "environment": {"device": "cpu", "cores": 2, "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    }


def interval(value: float, half: float) -> dict[str, float]:
    """A value with its limits."""
    return {"value": float(value), "low": float(value - half), "high": float(value + 1.1 * half)}


def wide(value: float, half: float, count: int) -> dict[str, float]:
    """The same for `count` at once: half as wide again."""
    return {**interval(value, 1.5 * half), "confidence": 1 - 0.05 / count}


def _texts(count: int) -> list[tuple[str, str]]:
    """Titles and texts: the licence, from its first sections on and in turn, which no version of Python changes."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    sections = re.findall(r"^   \d+\. ([^.\n]+)\.(.*?)(?=^   \d+\. |\Z)", text, re.M | re.S)
    turned = (sections[index:] + sections[:index] for index in range(count))
    return [(each[0][0], "".join(body for _, body in each)) for each in turned]


def _tokens(text: str, count: int) -> list[str]:
    """Words with the space before them, long ones in pieces; line breaks and marks alone."""
    text = re.sub(r"(?<=\S)\n(?=\S)| *\n +(?=\S)", " ", text)
    pieces: list[str] = []
    while len(pieces) < count:
        for word in re.findall(r" ?[A-Za-z]+| ?\d|\n+| +|[^\sA-Za-z\d]", text):
            pieces += [word] if len(word) <= 9 else [word[:6], word[6:]]
    return pieces[:count]


def _document(
    name: str,
    title: str,
    tokens: list[str],
    layers: int,
    skip: bool,
    enrichment: bool,
    generator: np.random.Generator,
) -> dict[str, Any]:
    rare = np.array([0.25 + 0.06 * min(len(token.strip()), 9) + 0.3 * token.strip().isdigit() for token in tokens])
    depth = 0.15 + 0.9 * np.linspace(0, 1, layers) ** 2
    noise = generator.lognormal(0, 0.45, (layers, len(tokens)))
    bypass = depth[:, None] * rare[None] * noise
    bypass[:, 0] *= 0.004  # the first token's attention output is large: a sink
    enriched = 0.2 * (1.1 - depth[:, None]).clip(0.1) * rare[None] * generator.lognormal(0, 0.3, bypass.shape)
    return {
        "id": name,
        "title": title,
        "tokens": tokens,
        "bypass": _rounded(bypass) if skip else None,
        "enrichment": _rounded(enriched) if enrichment else None,
    }


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values]


def _layer(layer: int, layers: int, skip: bool, enrichment: bool, generator: np.random.Generator) -> dict[str, Any]:
    x = layer / max(1, layers - 1)
    a, b, c, d = generator.random(4)
    spectrum = np.sort(np.exp(-np.arange(64) / (6 + 14 * x)) * (0.2 + 0.6 * x) * (1 + 0.1 * generator.random(64)))[::-1]
    share = spectrum / spectrum.sum()
    size = 0.1 + 0.4 * x**2 + 0.03 * c, 0.012 + 0.02 * x
    words = [" government", " the", "ly", " people", "\n", " Congress", "</b>", " 🦊", " peace", " 1863"]
    return {
        "layer": layer,
        "up_norm": 3.1 if enrichment else 0.0,
        "down_norm": 0.8 + 0.2 * float(a) if enrichment else 0.0,
        "skip_norm": float(0.28 + 0.5 * x**3 + 0.02 * b) if skip else None,
        "null": {"skip_norm": {"low": 0.26, "high": 0.31}, "down_norm": {"low": 0.5, "high": 0.6}} if skip else None,
        "skip_to_attention": interval(*size) if skip else None,
        "skip_to_attention_wide": wide(*size, layers) if skip else None,
        "enrichment": interval(0.3 * (1 - x) + 0.05, 0.01) if enrichment else None,
        "ablation": {
            "skip": interval(0.009 * x**2 + 0.002 * (a - 0.4), 0.0013) if skip else None,
            "enrichment": interval(0.004 * (1 - x) + 0.002 * (b - 0.5), 0.0012) if enrichment else None,
            "both": interval(0.011 * x**2 + 0.004 * (1 - x) + 0.001 * c, 0.0016),
        },
        "spectrum": [float(f"{value:.5g}") for value in spectrum] if skip else None,
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())) if skip else None,
        "stable_rank": float((spectrum**2).sum() / spectrum[0] ** 2) if skip else None,
        "alignment": {"attention": interval(0.12 - 0.3 * x, 0.03), "mlp": interval(-0.05 + 0.2 * x, 0.02)}
        if skip
        else {"attention": None, "mlp": None},
        "entropy_change": interval(0.05 * (c - 0.7), 0.01) if enrichment else None,
        "sink_change": interval(0.02 * (d - 0.5), 0.004) if enrichment else None,
        "promoted": [[word, 3.0 - 0.2 * i] for i, word in enumerate(words)] if skip else [],
        "demoted": [[word, -2.5 + 0.15 * i] for i, word in enumerate(reversed(words))] if skip else [],
    }


def _class(
    dimension: str,
    name: str,
    size: float,
    layers: int,
    skip: bool,
    enrichment: bool,
    generator: np.random.Generator,
) -> dict[str, Any]:
    return {
        "dimension": dimension,
        "class": name,
        "tokens": int(generator.integers(300, 4_000)),
        "skip_to_attention": interval(size, 0.02) if skip else None,
        "skip_to_attention_wide": wide(size, 0.02, sum(map(len, CLASSES.values()))) if skip else None,
        "enrichment": interval(0.1 + 0.1 * size, 0.006) if enrichment else None,
        "by_layer": [float(size * (0.4 + 1.2 * (i / layers) ** 2)) for i in range(layers)] if skip else [],
    }

"""Which parts an arm's diagram shows: what sits before, around and inside attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from preskip.report.tables import BUDGETS
from preskip.report.words.verdicts import number
from preskip.runs.schema import Manifest, Results

# Arms from scratch state no fields of the branch: (pre-projection, content skip, attention reads the enriched input).
BRANCHES = {
    "preskip": (True, True, True),
    "preproj": (True, False, True),
    "skip": (False, True, True),
    "content": (True, True, False),
    "parallel": (True, False, False),
}
FIELDS = ("preprojection", "content_skip", "enrich_attention")


class Diagram(NamedTuple):
    """An attention block and what an arm adds to it."""

    before: bool  # the pre-projection on the way into attention
    beside: bool  # the pre-projection on a way of its own around attention
    skip: bool  # a way around attention, from the enriched input where there is one
    lora: bool  # on the projections inside attention
    norms: bool


def diagram(arm: str, settings: Mapping[str, Any]) -> Diagram:
    """The diagram of an arm, from its stored settings, else from its name."""
    if all(field in settings for field in FIELDS):
        pre, skip, enrich = (bool(settings[field]) for field in FIELDS)
    else:
        pre, skip, enrich = BRANCHES.get(arm, (False, False, True))
    beside = pre and not enrich
    return Diagram(pre and enrich, beside, skip or beside, "r" in settings and arm != "lora-mlp", arm == "layernorm")


def arm_lines(record: Manifest, results: Results) -> list[dict[str, Any]]:
    """A line per arm: name, diagram, description, and what it trains."""
    lines = []
    for name, summary in results["arms"].items():
        about: Any = record["arms"].get(name, {})
        weights, budget = summary["trainable_parameters"], str(summary.get("budget") or about.get("budget"))
        trained = f"{number(weights, 0)} weights trained" if weights else "nothing trained"
        lines.append(
            {
                "name": name,
                "diagram": diagram(name, about.get("settings") or {}),
                "description": about.get("description") or "",
                "weights": ", ".join(filter(None, (trained, BUDGETS.get(budget, "")))),
            }
        )
    return lines

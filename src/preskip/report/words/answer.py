"""The page's first sentence: how the reference arm fares against the plain arm and its rival, in and out of domain."""

from __future__ import annotations

from collections.abc import Iterable

from preskip.report.lookup import PAPER, find, is_declared, reference_arm, rivals, sets_of
from preskip.report.words.verdicts import set_label
from preskip.runs.schema import Results

NAMES = {
    "none": "the untouched model",
    "lora": "LoRA",
    "lora-attention": "LoRA on attention alone",
    "base": "the plain architecture",
    "base-wide": "a plain model with as many weights",
    "base-deep": "a plain model with more layers",
    "base-flops": "a plain model trained with as many FLOPs",
}
PHRASES = {
    "better": "better than {}",
    "worse": "worse than {}",
    "equivalent": "equal within the margin to {}",
    "undecided": "undecided against {}",
    "too few units": "not judged against {}, from too few documents or clusters",
}
WHERE = {"in": "On its own text", "out": "elsewhere"}


def answer(results: Results) -> str:
    """The verdicts of the sets' primary metrics in one sentence; "" where nothing was compared.

    One seed is about "this training", not about the method. Verdicts that rest on comparisons not declared before
    training are called exploratory, and those that fewer seeds pair than others say how many.
    """
    arm = reference_arm(results)
    shown = [find(results, arm, rival, name) for rival in rivals(results) for name in results["sets"]]
    seeds = max((entry["seeds"] for entry in shown if entry), default=0)
    said_arm = arm if seeds > 1 else f"this training of {arm}"
    clauses: list[str] = []
    for domain, place in WHERE.items():
        names = [name for name in sets_of(results, domain=domain) if not name.startswith(PAPER)]
        groups: dict[tuple[str, bool, int, str], list[str]] = {}  # (verdict, declared, seeds, on what): rivals
        for rival in rivals(results):
            found = {name: entry for name in names if (entry := find(results, arm, rival, name))}
            readings = {name: (entry["verdict"], is_declared(entry), entry["seeds"]) for name, entry in found.items()}
            for reading in dict.fromkeys(readings.values()):
                where = [set_label(results["sets"], name) for name in readings if readings[name] == reading]
                on = f" on {listed(where)}" if len(where) < len(readings) else ""
                groups.setdefault((*reading, on), []).append(_name(results, arm, rival))
        if groups:
            said = [
                PHRASES[verdict].format(listed(others)) + on + _aside(exploratory=not declared, seeds=own, of=seeds)
                for (verdict, declared, own, on), others in groups.items()
            ]
            about = listed([set_label(results["sets"], name) for name in names])
            clauses.append(f"{place} ({about}) {said_arm if not clauses else 'it'} is {listed(said)}")
    if not clauses:
        return ""
    text = f"{'; '.join(clauses)}, {_seeds(seeds)}."
    return text[0].upper() + text[1:]


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def _aside(*, exploratory: bool, seeds: int, of: int) -> str:
    words = ["exploratory"] if exploratory else []
    words += [_seeds(seeds)] if seeds < of else []
    return f" ({', '.join(words)})" if words else ""


def listed(words: Iterable[str]) -> str:
    """Words as a list in a sentence: "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _name(results: Results, arm: str, rival: str) -> str:
    budgets = {results["arms"][name].get("budget") for name in (arm, rival)}
    same = rival.startswith("lora") and budgets == {"matched"}
    return NAMES.get(rival, rival) + (" of the same size" if same else "")

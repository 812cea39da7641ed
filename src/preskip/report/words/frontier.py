"""The frontier of in-domain gain and out-of-domain harm: which arms no other is shown to beat, by stored verdicts.

An arm dominates another when their direct paired comparisons find it better on one axis and better or equivalent on
the other. Better on one axis while the other is undecided (or not compared) is not enough: the arm behind then stays
"possibly on the frontier".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.report.lookup import PAPER, find, sets_of
from preskip.report.words.verdicts import set_label
from preskip.runs.schema import Results


def planes(results: Results) -> list[tuple[str, str]]:
    """(in-domain set, out-of-domain set) of every plane: the first in-domain set of documents (else of items) against
    each out-of-domain set; empty without one of either. The paper's own scoring is no plane of its own: its items are
    in lm-eval's tasks, too.
    """
    home = sets_of(results, domain="in", kind="document") or sets_of(results, domain="in")
    abroad = [name for name in sets_of(results, domain="out") if not name.startswith(PAPER)]
    return [(home[0], name) for name in abroad] if home else []


def assess_plane(results: Results, home: str, abroad: str) -> dict[str, Any]:
    """Place every arm with regard to the frontier of one plane.

    Args:
        results: content of results.json.
        home: the in-domain set.
        abroad: the out-of-domain set.

    Returns:
        "home" and "abroad"; "on": arms that no other is shown to beat on either axis without loss on the other;
        "possible": {arm: why} of those that another arm beats on one axis with the other undecided; "dominated":
        {arm: why}; "headline" and, with the others' reasons, "sentence" in words.
    """
    arms = list(results["arms"])
    beaten: dict[str, dict[str, str]] = {}  # arm: rivals that dominate it, and why
    behind: dict[str, dict[str, str]] = {}
    for arm in arms:
        for rival in arms:
            if rival == arm:
                continue
            at_home, far = (_verdict(results, rival, arm, name) for name in (home, abroad))
            reading = {at_home, far}
            if "better" not in reading or "worse" in reading:
                continue
            why = f"{rival} is {_words(at_home)} in-domain and {_words(far)} out-of-domain"
            if reading <= {"better", "equivalent"}:
                beaten.setdefault(arm, {})[rival] = why
            else:
                behind.setdefault(arm, {})[rival] = why
    on = [arm for arm in arms if arm not in beaten and arm not in behind]
    dominated = {arm: _best_reason(rivals, on) for arm, rivals in beaten.items()}
    possible = {arm: _best_reason(rivals, on) for arm, rivals in behind.items() if arm not in beaten}
    plane = {"home": home, "abroad": abroad, "on": on, "possible": possible, "dominated": dominated}
    headline, *rest = _sentences(results, plane)
    return {**plane, "headline": headline, "sentence": ". ".join([headline, *rest])}


def _best_reason(rivals: Mapping[str, str], on: Sequence[str]) -> str:
    """Why an arm is not on the frontier: a rival that is on it says most."""
    return next((why for rival, why in rivals.items() if rival in on), next(iter(rivals.values())))


def _verdict(results: Results, arm: str, reference: str, set_name: str) -> str:
    entry = find(results, arm, reference, set_name)
    return entry["verdict"] if entry else "not compared"


def _words(verdict: str) -> str:
    return {"equivalent": "equal within the margin"}.get(verdict, verdict)


def _sentences(results: Results, plane: Mapping[str, Any]) -> list[str]:
    where = f"{set_label(results['sets'], plane['home'])} against {set_label(results['sets'], plane['abroad'])}"
    where += " (exploratory)"
    if not plane["dominated"] and not plane["possible"]:
        return [f"On the frontier of {where}: every arm; none is shown to beat another on one axis without loss"]
    return [f"On the frontier of {where}: {', '.join(plane['on']) or 'none for certain'}"] + [
        f"{words}: " + "; ".join(f"{arm} ({why})" for arm, why in plane[key].items())
        for key, words in (("possible", "Possibly on it"), ("dominated", "Off it"))
        if plane[key]
    ]

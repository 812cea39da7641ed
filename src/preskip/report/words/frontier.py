"""The frontier of in-domain gain and out-of-domain harm: which arms no other is shown to beat.

All pairs are held to one yardstick, p without correction: the frontier is exploratory, whatever was declared.

An arm dominates another when their direct paired comparisons find it better on one axis and better or equivalent on
the other. Better on one axis while the other is undecided (or not compared, or not judged) is not enough: the arm
behind then stays "possibly on the frontier".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, cast

from preskip.report.lookup import PAPER, find, is_declared, sets_of
from preskip.report.words.verdicts import set_label
from preskip.runs.schema import Comparison, Results
from preskip.stats.verdicts import ALPHA, verdict_of

WORDS = {"equivalent": "equal within the margin", "too few units": "not judged (too few units)"}


def planes(results: Results) -> list[tuple[str, str]]:
    """(in-domain set, out-of-domain set) of every plane: the first in-domain set of documents (else of items) against
    each out-of-domain set; empty without one of either. The paper's own scoring is no plane of its own: its items are
    in lm-eval's tasks, too.
    """
    in_domain = sets_of(results, domain="in", kind="document") or sets_of(results, domain="in")
    out_of_domain = [name for name in sets_of(results, domain="out") if not name.startswith(PAPER)]
    return [(in_domain[0], name) for name in out_of_domain] if in_domain else []


def assess_plane(results: Results, in_domain: str, out_of_domain: str) -> dict[str, Any]:
    """Place every arm with regard to the frontier of one plane.

    Returns:
        "in_domain" and "out_of_domain"; "on": arms that no other is shown to beat on either axis without loss on the
        other; "possible": {arm: why} of those that another arm beats on one axis with the other undecided; "dominated":
        {arm: why}; "headline" and, with the others' reasons, "sentence" in words.
    """
    arms = list(results["arms"])
    beaten: dict[str, dict[str, str]] = {}  # arm: rivals that dominate it, and why
    behind: dict[str, dict[str, str]] = {}
    for arm, rival in permutations(arms, 2):
        found = [find(results, rival, arm, name) for name in (in_domain, out_of_domain)]
        reading = [_verdict(results, entry) if entry else "not compared" for entry in found]
        if "better" in reading and "worse" not in reading:
            inside, outside = (WORDS.get(word, word) for word in reading)
            rivals = (beaten if set(reading) <= {"better", "equivalent"} else behind).setdefault(arm, {})
            rivals[rival] = f"{rival} is {inside} in-domain and {outside} out-of-domain"
    on = [arm for arm in arms if arm not in beaten and arm not in behind]
    dominated = {arm: _best_reason(rivals, on) for arm, rivals in beaten.items()}
    possible = {arm: _best_reason(rivals, on) for arm, rivals in behind.items() if arm not in beaten}
    where = " against ".join(set_label(results["sets"], name) for name in (in_domain, out_of_domain)) + " (exploratory)"
    headline = f"On the frontier of {where}: {', '.join(on) or 'none for certain'}"
    if not beaten and not behind:
        headline = f"On the frontier of {where}: every arm; none is shown to beat another on one axis without loss"
    rest = [
        f"{words}: " + "; ".join(f"{arm} ({why})" for arm, why in reasons.items())
        for words, reasons in (("Possibly on it", possible), ("Off it", dominated))
        if reasons
    ]
    plane = {
        "in_domain": in_domain,
        "out_of_domain": out_of_domain,
        "on": on,
        "possible": possible,
        "dominated": dominated,
    }
    return {**plane, "headline": headline, "sentence": ". ".join([headline, *rest])}


def _verdict(results: Results, entry: Comparison) -> str:
    """The verdict by p without correction: what is stored, of comparisons that were not declared."""
    if not is_declared(entry):
        return entry["verdict"]
    alpha = (results.get("family") or {}).get("alpha", ALPHA)
    raw = {key: value for key, value in entry.items() if key != "p_equivalence_holm"}
    return verdict_of(cast(Comparison, {**raw, "declared": False}), alpha, results["sets"].get(entry["set"]))


def _best_reason(rivals: Mapping[str, str], on: Sequence[str]) -> str:
    """Why an arm is not on the frontier: a rival that is on it says most."""
    return next((why for rival, why in rivals.items() if rival in on), next(iter(rivals.values())))

"""The page's tables of the searches for learning rates: what was chosen, at equal harm, and what the choice costs."""

from __future__ import annotations

from preskip.report.lookup import chosen_rate, development, rivals
from preskip.report.table import NONE, Column, Table, make_table, words
from preskip.report.words.verdicts import MINUS, interval_text, mean_difference_texts, number
from preskip.runs.schema import Results
from preskip.stats.equal_harm import Changes, MeanDifference, changes_at, mean_difference
from preskip.stats.rates import RateSpread, rate_spreads


def search_table(results: Results) -> Table:
    """A row per searched arm: where it started, what it chose, and whether the grid had to grow."""
    every = results.get("search") or {}
    harm = [words("Within the harm allowed")] if any("within_harm" in search for search in every.values()) else []
    columns: list[Column | str] = [words("Arm"), "Default", "Chosen", *harm]
    columns += ["Runs", words("Best at the edge, grid extended"), "Diverged"]
    rows = []
    for arm, search in every.items():
        chosen = ", ".join(f"{rate:g}" for rate in search.get("by_seed", {"": search["chosen"]}).values())
        rates, extended = (f"{search['default']:g}", chosen), "yes" if search.get("extended") else "no"
        diverged = sum(bool(point.get("diverged")) for point in search["trace"])
        kept = ["yes" if search.get("within_harm") else "not for every seed: the least harm there"] if harm else []
        rows.append((arm, *rates, *kept, len(search["trace"]), extended, diverged))
    return make_table("Chosen learning rates", columns, rows, "What the search chose for each arm")


def at_equal_harm(results: Results, harm: float) -> tuple[str, dict[str, tuple[Changes, MeanDifference | None]]]:
    """The arm that others are held against, and of every searched arm its best in-domain changes for up to one harm out
    of domain and their difference to that arm's; nothing where no change of any arm is known.
    """
    found = {arm: changes_at(search, harm) for arm, search in (results.get("search") or {}).items()}
    known = [arm for arm, changes in found.items() if any(change is not None for change in changes.values())]
    if not known:
        return "", {}
    rival = next((arm for arm in rivals(results) if arm in known), known[0])
    return rival, {
        arm: (changes, None if arm == rival else mean_difference(changes, found[rival]))
        for arm, changes in found.items()
    }


def changes_text(changes: Changes) -> str:
    """In-domain changes of an arm, a seed each."""
    return ", ".join(NONE if change is None else number(change, 3, sign=True) for change in changes.values())


def equal_harm_table(results: Results, harm: float) -> Table:
    """A row per searched arm: its in-domain change at one harm out of domain, against the rival of the declaration."""
    rival, found = at_equal_harm(results, harm)
    columns = (words("Arm"), "Δ bits per byte, by seed", f"minus {rival}", "Interval", "p (raw)")
    rows = [(arm, changes_text(own), *mean_difference_texts(against)) for arm, (own, against) in found.items()]
    return make_table("In-domain change at equal harm", columns, rows)


def spreads_of_rates(results: Results) -> tuple[str, dict[str, dict[str, RateSpread]]]:
    """The arm that others are held against, and of every other arm whose rates were searched for each seed the spread
    over seeds of its difference to that one, at their own rates and at common ones; those of which nothing is known are
    left out.
    """
    searched = results.get("search") or {}
    rival = next((arm for arm in rivals(results) if arm in searched), "")
    if not rival:
        return "", {}
    found = {arm: rate_spreads(search, searched[rival]) for arm, search in searched.items() if arm != rival}
    return rival, {arm: spreads for arm, spreads in found.items() if spreads}


def spread_texts(spreads: dict[str, RateSpread]) -> tuple[str, ...]:
    """Standard deviations in-domain and of harm, each at the seeds' own rates and at common ones, and how many seeds.

    "–" where a deviation is not known.
    """
    texts = []
    for domain in ("in", "out"):
        found = spreads.get(domain)
        texts += [NONE, NONE] if found is None else [number(found["own"], 4), number(found["common"], 4)]
    return (*texts, str(max(spread["seeds"] for spread in spreads.values())))


def rates_table(results: Results) -> Table:
    """A row per searched arm: how much its difference to the rival varies over seeds, at the rates chosen for each seed
    and at each arm's mean rate.
    """
    rival, found = spreads_of_rates(results)
    kinds = ("own rates", "mean rates")
    spreads_of = (Column(f"SD, {domain}", kind) for domain in ("in-domain", "harm") for kind in kinds)
    rows = [(f"{arm} {MINUS} {rival}", *spread_texts(spreads)) for arm, spreads in found.items()]
    return make_table("What the rates have of the spread over seeds", (words("Arm"), *spreads_of, "Seeds"), rows)


def trace_table(results: Results) -> Table:
    """A row per point of every arm's learning-rate search."""
    columns = (words("Arm"), "Rung", "Steps", "Rate", "Seed", "Δ bits per byte", "Interval", words("After it"))
    rows = []
    for arm, search in (results.get("search") or {}).items():
        for point in search["trace"]:
            shown = interval_text("bits_per_byte", development(point, "in")) or {"value": NONE, "interval": ""}
            value = "diverged" if point.get("diverged") else shown["value"]
            rate = f"{point['learning_rate']:g}" + (
                " (chosen)" if point["learning_rate"] == chosen_rate(search, point) else ""
            )
            after = "kept" if point.get("kept") else "dropped"
            rows.append((arm, point["rung"] + 1, point["steps"], rate, point["seed"], value, shown["interval"], after))
    return make_table("Search trace", columns, rows, "Every run of the search")

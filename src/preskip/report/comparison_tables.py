"""The page's tables of comparisons: declared and exploratory ones, what they resolve, what stands behind them."""

from __future__ import annotations

from typing import Any

from preskip.report.lookup import (
    DOMAINS,
    by_measure,
    doubled,
    find,
    is_declared,
    metric_on,
    ordered,
    p_equivalence,
    p_value,
    plain_arm,
    resolvable,
    trained_arms,
)
from preskip.report.table import NONE, Cell, Column, Table, make_table, words
from preskip.report.words.detail import detail_texts, gain_share
from preskip.report.words.verdicts import (
    MINUS,
    amount,
    difference_text,
    looks_text,
    margin_text,
    p_text,
    set_label,
)
from preskip.runs.schema import Comparison, Results

CORRECTED, RAW = Column("p", "corrected"), Column("p", "not corrected")
MARGIN, RAW_MARGIN = (Column("Margin", f"p equivalent, {what}") for what in ("corrected", "not corrected"))


def comparison_groups(results: Results) -> list[dict[str, Any]]:
    """Every set and metric with its comparisons: those declared before training, then the others."""
    first = (words("Comparison"), words("Verdict"), "Difference", "Interval")
    last = ("Units", "Seeds")
    groups = []
    for set_name, metric, entries in by_measure(results["comparisons"]):
        about = metric_on(results, set_name, metric)
        title = f"{about.name}, {set_label(results['sets'], set_name)}"
        declared, others = (
            [
                _comparison(entry, results)
                for entry in ordered(entries, about.lower_is_better, plain_arm(results))
                if is_declared(entry) == wanted
            ]
            for wanted in (True, False)
        )
        margin = MARGIN if any("p_equivalence_holm" in entry for entry in entries) else RAW_MARGIN
        groups.append(
            {
                "key": f"{set_name}-{metric}",
                "title": title,
                "domain": DOMAINS[results["sets"][set_name]["domain"]],
                "note": about.direction,
                "declared": make_table(f"{title}, declared", (*first, CORRECTED, margin, *last), declared),
                "others": make_table(f"{title}, exploratory", (*first, RAW, RAW_MARGIN, *last), others),
            }
        )
    return groups


def _comparison(entry: Comparison, results: Results) -> tuple[Any, ...]:
    shown, margin, equivalence = difference_text(entry), entry.get("margin"), p_equivalence(entry)
    gained, lost, clusters = entry.get("gained"), entry.get("lost"), entry.get("clusters")
    counted = "" if gained is None or lost is None else f"{gained:,} gained, {lost:,} lost"
    bound = NONE if margin is None else margin_text(entry["metric"], margin)
    share = gain_share(entry, results["comparisons"], results["sets"])
    of_gain = "" if share is None else f"{100 * share[0]:.0f} % of {share[1]}'s gain"
    return (
        f"{entry['arm']} {MINUS} {entry['reference']}",
        Cell(entry["verdict"], badge=True, exploratory=not is_declared(entry)),
        Cell(shown["value"] + shown["unit"], counted),
        Cell(shown["interval"], looks_text(entry)),
        p_text(p_value(entry)),
        Cell(bound, "" if equivalence is None else p_text(equivalence) + (f"; {of_gain}" if of_gain else "")),
        Cell(f"{entry['units']:,} {entry['unit']}s", f"in {clusters:,} clusters" if clusters else ""),
        entry["seeds"],
    )


def declared_table(results: Results) -> Table:
    """A row per comparison declared before training, with its p corrected for that family."""
    rows = []
    for entry in filter(is_declared, results["comparisons"]):
        shown, about = difference_text(entry), metric_on(results, entry["set"], entry["metric"])
        domain = DOMAINS[results["sets"][entry["set"]]["domain"]]
        rows.append(
            (
                f"{entry['arm']} {MINUS} {entry['reference']}",
                Cell(f"{set_label(results['sets'], entry['set'])}, {about.phrase}", domain),
                Cell(entry["verdict"], badge=True),
                shown["value"] + shown["unit"],
                Cell(shown["interval"], looks_text(entry)),
                p_text(p_value(entry)),
            )
        )
    columns = (words("Comparison"), words("On", wrap=True), words("Verdict"), "Difference", "Interval", CORRECTED)
    return make_table("Declared before training", columns, rows)


def scoreboard(results: Results) -> dict[str, Any]:
    """Every trained arm against the plain one on every set's primary metric, where that is exploratory: declared
    comparisons are judged by another p, and stand apart.

    Returns:
        "columns" (title, name, domain) and "rows" (arm, cells with outcome, value, interval, unit, p; None where it
        was not compared or declared).
    """
    plain, sets = plain_arm(results), results["sets"]
    columns = [
        {"title": set_label(sets, name), "name": metric_on(results, name).phrase, "domain": DOMAINS[entry["domain"]]}
        for name, entry in sets.items()
    ]
    rows = []
    for arm in trained_arms(results):
        found = [find(results, arm, plain, name) for name in sets if arm != plain]
        cells = [
            {"outcome": entry["verdict"], **difference_text(entry), "p": p_text(entry.get("p_value"))}
            if entry and not is_declared(entry)
            else None
            for entry in found
        ]
        if any(cells):
            rows.append({"arm": arm, "cells": cells})
    return {"columns": columns, "rows": rows}


def _declared_or_all(results: Results) -> list[Comparison]:
    return list(filter(is_declared, results["comparisons"])) or results["comparisons"]


def power_table(results: Results) -> Table:
    """What the run resolves, per declared comparison (all where none was declared), beside what it found."""
    rows = []
    for entry in _declared_or_all(results):
        smallest, basis = resolvable(results, entry)
        twice = doubled(results, entry)
        about, shown = metric_on(results, entry["set"], entry["metric"]), difference_text(entry)
        rows.append(
            (
                f"{entry['arm']} {MINUS} {entry['reference']}",
                f"{about.name}, {set_label(results['sets'], entry['set'])}",
                amount(entry["metric"], smallest),
                NONE if twice is None else amount(entry["metric"], twice),
                shown["value"] + shown["unit"],
                p_text(entry.get("p_value")),
                {"interval": "interval's width"}.get(basis, f"{basis} spread"),
                f"{entry['units']:,} {entry['unit']}s",
                entry["seeds"],
            )
        )
    first = (words("Comparison"), words("Metric and set", wrap=True))
    resolves = ("Resolves", Column("Resolves", "if seeds vary twice as much"))
    return make_table(
        "Power",
        (*first, *resolves, "Found", RAW, words("From"), "Units", "Seeds"),
        rows,
        "Smallest difference that each comparison resolves",
    )


def detail_tables(results: Results) -> tuple[Table, Table]:
    """What stands beside the declared differences (all where none was declared), and beside the others: seeds, the
    next one, who wins, whence the variance, and the randomisation p of few units.
    """
    first = _declared_or_all(results)
    others = [entry for entry in results["comparisons"] if entry not in first]
    return (
        _detail_table(results, first, "Seeds and variance"),
        _detail_table(results, others, "Seeds and variance, exploratory"),
    )


def _detail_table(results: Results, entries: list[Comparison], label: str) -> Table:
    rows = []
    for entry in entries:
        if "detail" in entry:
            about, shown = (
                metric_on(results, entry["set"], entry["metric"]),
                detail_texts(entry, results["sets"][entry["set"]]),
            )
            rows.append(
                (
                    f"{entry['arm']} {MINUS} {entry['reference']}",
                    f"{about.name}, {set_label(results['sets'], entry['set'])}",
                    *shown.values(),
                )
            )
    columns = (
        *(words("Comparison"), words("Metric and set", wrap=True), Column("By seed"), Column("Next seed", "95 %")),
        *(Column("P(better)", "over pairs of seeds"), Column("Variance, %", "seeds / units / both")),
        Column("p", "sign flips, items only"),
    )
    return make_table(label, columns, rows, "What stands behind each difference")

"""The final tables of a probe in the terminal: arms by evaluation set, the declared comparisons, the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from preskip.cli.printing import EXPLORATORY_NOTE, columns, difference_cell, print_table, verdict_text
from preskip.metrics import metric_named
from preskip.progress import console
from preskip.report.lookup import (
    DOMAINS,
    by_measure,
    is_declared,
    ordered,
    p_value,
    plain_arm,
    primary,
    rate_text,
    with_plain,
)
from preskip.report.tables import paper_table
from preskip.report.words.claims import assess
from preskip.report.words.frontier import assess_plane, planes
from preskip.report.words.verdicts import (
    MINUS,
    interval_text,
    number,
    p_text,
    set_label,
    set_title,
)
from preskip.runs.schema import Comparison, Manifest, Results

MOST_ROWS = 48
# Fewer comparisons than this are all shown, declared or not.
FEW = 12


def print_results(results: Results, page: Path | None) -> None:
    """Print what a run found: a row per arm, the paired differences (declared ones first), the frontier.

    Args:
        results: content of results.json.
        page: its HTML page, or None.
    """
    print_table(_arms(results))
    print_table(_scores(results))
    shown = _shown(results)
    declared = [entry for entry in shown if is_declared(entry)]
    exploratory = [entry for entry in shown if not is_declared(entry)]
    if declared:
        print_table(_differences(results, declared, is_declared=True))
    if exploratory:
        print_table(_differences(results, exploratory, is_declared=False), [EXPLORATORY_NOTE])
    out = console()
    if shown:
        left = len(results["comparisons"]) - len(shown)
        if left:
            where = "the report" if page else "results.json"
            out.print(f"{left} more comparisons in {where}", style="dim")
        for in_domain, out_of_domain in planes(results):
            out.print(assess_plane(results, in_domain, out_of_domain)["headline"])
    for line in _scope(results, shown):
        out.print(line, style="dim")
    for note in results.get("notes", ()):
        out.print(f"Note: {note}.")


def print_claims(record: Manifest, results: Results) -> None:
    """Print the paper's claims and the decisive controls, a row each, with this run's verdict.

    Args:
        record: content of run.json.
        results: content of results.json.
    """
    table = columns("the paper's claims", "in this run", right=(), last="rests on")
    for claim in assess(record, results):
        rests = ""
        if claim["verdict"] == "not measured":
            rests = "needs " + ", ".join(claim["needs"])
        elif claim["set"]:
            unit = metric_named(claim["metric"]).difference_unit
            rests = f"{difference_cell(claim)}{unit}, {_short(results, claim['set'])}"
            rests += " (this training)" if claim["one_training"] else ""
        table.add_row(claim["claim"], verdict_text(claim["verdict"], is_declared=not claim["exploratory"]), rests)
    print_table(table, [EXPLORATORY_NOTE])


def print_paper(results: Results) -> None:
    """Print the paper's own columns, each beside the paper's figure for this model; nothing without its scoring."""
    paper = paper_table(results)
    if not paper.rows:
        return
    table = columns("the paper's scoring", right=[column.title for column in paper.columns[1:]])
    for row in paper.rows:
        table.add_row(*(f"{cell.text} (paper {cell.note})" if cell.note else cell.text for cell in row))
    print_table(table)


def _arms(results: Results) -> Table:
    table = columns("arm", right=("weights", "lr", "s/step", "GiB"))
    for name, arm in results["arms"].items():
        step, peak = arm.get("seconds_per_step"), arm.get("peak_memory_bytes")
        table.add_row(
            name,
            f"{arm['trainable_parameters'] / 1e6:.3f}M" if arm["trainable_parameters"] else "0",
            rate_text(arm),
            f"{step:.2f}" if step else "–",
            f"{peak / 2**30:.2f}" if peak else "–",
        )
    return table


def _scores(results: Results) -> Table:
    """The primary metric of every set, a row per arm."""
    sets = list(results["sets"])
    table = columns("arm", right=[f"{_short(results, name)}\n{_unit(primary(results, name))}" for name in sets])
    for name, arm in results["arms"].items():
        table.add_row(name, *(_value(arm["metrics"].get(key) or {}, primary(results, key)) for key in sets))
    return table


def _shown(results: Results) -> list[Comparison]:
    """The comparisons worth a line: all of a few, else those declared, else those with the plain arm; at most 48."""
    entries, plain = results["comparisons"], plain_arm(results)
    if len(entries) > FEW:
        entries = [entry for entry in entries if is_declared(entry)] or [
            entry for entry in entries if with_plain(entry, plain) and entry["metric"] == primary(results, entry["set"])
        ]
    if len(entries) > MOST_ROWS:
        entries = [entry for entry in entries if with_plain(entry, plain)] or entries
    return list(entries[:MOST_ROWS])


def _differences(results: Results, entries: Sequence[Comparison], *, is_declared: bool) -> Table:
    what, p = ("declared before training", "p (corr.)") if is_declared else ("exploratory", "p (raw)")
    table = columns(what, right=("difference [interval]", p), last="reading")
    for name, metric, group in by_measure(entries):
        table.add_row(Text(f"{set_label(results['sets'], name)}, {_unit(metric)}", style="bold"))
        about = metric_named(metric, results["sets"].get(name))
        for entry in ordered(group, about.lower_is_better, plain_arm(results)):
            table.add_row(
                f"  {entry['arm']} {MINUS} {entry['reference']}",
                difference_cell(entry),
                p_text(p_value(entry)),
                verdict_text(entry["verdict"], is_declared=is_declared),
            )
        table.add_section()
    return table


def _scope(results: Results, shown: Sequence[Comparison]) -> list[str]:
    lines = []
    for name, entry in results["sets"].items():
        counts = [f"{entry[unit]:,} {unit}" for unit in ("documents", "items", "tokens") if entry.get(unit)]
        context = f", context {entry['context_length']:,}" if entry.get("context_length") else ""
        title, domain = set_title(results["sets"], name), DOMAINS[entry["domain"]]
        lines.append(f"{title} ({domain}): {', '.join(counts)}{context}")
    if shown:
        fewest, most = (function(entry["seeds"] for entry in shown) for function in (min, max))
        covers = f"{'up to ' if fewest < most else ''}{most} seeds and items"
        if most == 1:
            covers = "items only, not training randomness (one seed)"
        lines.append(f"{100 * shown[0]['confidence']:g} % intervals cover {covers}")
    return lines


def _short(results: Results, name: str) -> str:
    """A set's name where it fits a column, else its key."""
    title = set_label(results["sets"], name)
    return title if len(title) <= 18 else name


def _unit(metric: str) -> str:
    about = metric_named(metric)
    return about.column or about.name.lower()


def _value(metrics: Mapping[str, Any], metric: str) -> str:
    stored = metrics.get(metric)
    if not interval_text(metric, stored) or not stored:
        return "–"
    about = metric_named(metric)
    return number(about.factor * stored["value"], about.decimals)

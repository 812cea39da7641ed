"""The final tables of a probe in the terminal: arms by evaluation set, the declared comparisons, the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from preskip.cli.wide import columns, print_wide
from preskip.metrics import metric_named
from preskip.report.lookup import by_measure, is_declared, ordered, primary
from preskip.report.tables import paper_table
from preskip.report.words.claims import assess
from preskip.report.words.frontier import assess_plane, planes
from preskip.report.words.verdicts import (
    MINUS,
    difference_text,
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
STYLES = {"better": "green", "supported": "green", "worse": "red", "contradicted": "red", "mixed": "yellow"}


def print_results(results: Results, run: Path, page: Path | None) -> None:
    """Print what a run found: a row per arm, the paired differences declared before training, the frontier.

    Args:
        results: content of results.json (schema version 2).
        run: the run directory.
        page: its HTML page, or None.
    """
    console = Console()
    print_wide(_arms(results))
    shown = _shown(results)
    if shown:
        print_wide(_differences(results, shown))
        left = len(results["comparisons"]) - len(shown)
        if left:
            where = "the report" if page else "results.json"
            console.print(f"{left} more comparisons in {where}", style="dim", highlight=False)
        for home, abroad in planes(results):
            console.print(assess_plane(results, home, abroad)["headline"], highlight=False, soft_wrap=True)
    console.print("\n".join(_scope(results, shown)), style="dim", highlight=False, soft_wrap=True)
    console.print(f"run: {run}" + (f"\nreport: {page}" if page else ""), highlight=False, soft_wrap=True)


def print_claims(record: Manifest, results: Results) -> None:
    """Print the paper's claims and the decisive controls, a line each, with this run's verdict.

    Args:
        record: content of run.json (schema version 2).
        results: content of results.json (schema version 2).
    """
    table = columns("the paper's claims", "in this run", "rests on", right=())
    for claim in assess(record, results):
        rests = ""
        if claim["verdict"] == "not measured":
            rests = "needs " + ", ".join(claim["needs"])
        elif claim["set"]:
            text = difference_text(claim)
            rests = f"{text['value']} {text['interval']}{text['unit']}, {_short(results, claim['set'])}"
        # What is needed may be long; it must not widen the whole table.
        table.add_row(claim["claim"], _styled(claim["verdict"]), rests if len(rests) <= 60 else "see the report")
    print_wide(table)


def print_paper(results: Results) -> None:
    """Print the paper's own columns, each beside the paper's figure for this model; nothing without its scoring."""
    paper = paper_table(results)
    if not paper.rows:
        return
    table = columns("the paper's scoring", right=[column.title for column in paper.columns[1:]])
    for row in paper.rows:
        table.add_row(*(f"{cell.text} (paper {cell.note})" if cell.note else cell.text for cell in row))
    print_wide(table)


def _arms(results: Results) -> Table:
    sets = list(results["sets"])
    headings = [f"{_short(results, name)}\n{_unit(primary(results, name))}" for name in sets]
    table = columns("arm", right=("weights", "lr", *headings, "s/step", "GiB"))
    for name, arm in results["arms"].items():
        step, peak = arm.get("seconds_per_step"), arm.get("peak_memory_bytes")
        table.add_row(
            name,
            f"{arm['trainable_parameters'] / 1e6:.3f}M" if arm["trainable_parameters"] else "0",
            f"{arm['learning_rate']:g}" if arm["learning_rate"] else "–",
            *(_value(arm["metrics"].get(key) or {}, primary(results, key)) for key in sets),
            f"{step:.2f}" if step else "–",
            f"{peak / 2**30:.2f}" if peak else "–",
        )
    return table


def _shown(results: Results) -> list[Comparison]:
    """The comparisons worth a line: all of a few, else those declared, else each arm against `none`; at most 48."""
    entries = results["comparisons"]
    if len(entries) > FEW:
        entries = [entry for entry in entries if is_declared(entry)] or [
            entry
            for entry in entries
            if entry["reference"] == "none" and entry["metric"] == primary(results, entry["set"])
        ]
    if len(entries) > MOST_ROWS:
        entries = [entry for entry in entries if entry["reference"] == "none"] or entries
    return list(entries[:MOST_ROWS])


def _differences(results: Results, entries: Sequence[Comparison]) -> Table:
    corrected = any(entry.get("p_holm") is not None for entry in entries)
    figures = ("difference [interval]", "p (Holm)" if corrected else "p")
    table = columns("paired", right=figures, last="reading")
    for name, metric, group in by_measure(entries):
        table.add_row(f"[bold]{set_label(results['sets'], name)}[/], {_unit(metric)}")
        for entry in ordered(group, metric_named(metric, results["sets"].get(name)).lower_is_better):
            text = difference_text(entry)
            table.add_row(
                f"  {entry['arm']} {MINUS} {entry['reference']}",
                f"{text['value']} {text['interval']}",
                p_text(entry["p_holm"] if entry.get("p_holm") is not None else entry.get("p_value")),
                _styled(entry["verdict"]),
            )
        table.add_section()
    return table


def _scope(results: Results, shown: Sequence[Comparison]) -> list[str]:
    lines = []
    for name, entry in results["sets"].items():
        counts = [f"{entry[unit]:,} {unit}" for unit in ("documents", "items", "tokens") if entry.get(unit)]
        context = f", context {entry['context_length']:,}" if entry.get("context_length") else ""
        domain = {"in": "in-domain", "out": "out-of-domain"}[entry["domain"]]
        lines.append(f"{set_title(results['sets'], name)} ({domain}): {', '.join(counts)}{context}")
    if shown:
        seeds = max(entry["seeds"] for entry in shown)
        covers = "items only, not training randomness (one seed)" if seeds == 1 else f"{seeds} seeds and items"
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
    shown = interval_text(metric, stored)
    if not shown or not stored:
        return "–"
    about = metric_named(metric)
    # Beyond this, as from a random model, decimals only widen the table.
    if abs(stored["value"]) >= 1e5:
        return f"{stored['value']:.2e}"
    return number(about.factor * stored["value"], about.decimals)


def _styled(word: str) -> str:
    style = STYLES.get(word)
    return f"[{style}]{word}[/]" if style else word

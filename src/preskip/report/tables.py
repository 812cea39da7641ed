"""The page's tables: arms by evaluation set, costs, the search, trends; headings and cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from preskip.report.lookup import (
    DOMAINS,
    is_pretraining,
    metric_on,
    primary,
    rate_text,
)
from preskip.report.table import NONE, Cell, Column, Table, make_table, measured, words
from preskip.report.words.claims import MEASURES
from preskip.report.words.facts import bytes_text
from preskip.report.words.verdicts import (
    interval_text,
    limits_text,
    nulls_text,
    number,
    set_label,
    set_title,
)
from preskip.runs.schema import Manifest, Results, Trend

PAPER_COLUMNS = {
    "paper:lambada": "LAMBADA",
    "paper:hellaswag": "HellaSwag",
    "paper:arc_easy": "ARC-Easy",
    "paper:wikitext": 'the paper\'s "PPL"',
}
BUDGETS = {
    "matched": "equal budget",
    "smaller": "smaller",
    "larger": "larger",
    "floor": "floor, unmatched",
    "ceiling": "ceiling",
}


def arm_columns(results: Results) -> list[dict[str, Any]]:
    """A column group per evaluation set: title, domain, and its metrics (key, name, note), the primary one first."""
    groups = []
    for name, entry in results["sets"].items():
        measured_in = (summary["metrics"].get(name) or {} for summary in results["arms"].values())
        keys = sorted(dict.fromkeys(chain.from_iterable(measured_in)), key=lambda key: key != primary(results, name))
        metrics = [(key, metric_on(results, name, key)) for key in keys]
        if metrics:
            shown = [{"key": key, "name": about.name, "note": about.direction} for key, about in metrics]
            title, domain = set_label(results["sets"], name), DOMAINS[entry["domain"]]
            groups.append({"key": name, "title": title, "domain": domain, "metrics": shown})
    return groups


def arm_rows(results: Results, record: Manifest, groups: Sequence[Any]) -> list[dict[str, Any]]:
    """A row per arm: its weights and learning rate, then every metric of every set."""
    rows = []
    for name, summary in results["arms"].items():
        about: Any = record["arms"].get(name, {})
        weights, rate = summary["trainable_parameters"], summary.get("learning_rate")
        budget = BUDGETS.get(str(summary.get("budget") or about.get("budget")), "")
        cells = [Cell(number(weights, 0), budget, weights), Cell(rate_text(summary), sort=rate)]
        for group in groups:
            for metric in group["metrics"]:
                stored = (summary["metrics"].get(group["key"]) or {}).get(metric["key"])
                cells.append(measured(stored and stored["value"], interval_text(metric["key"], stored)))
        seeds = ", ".join(str(seed) for seed in summary["seeds"])
        rows.append({"name": name, "description": about.get("description") or "", "seeds": seeds, "cells": cells})
    return rows


def set_table(results: Results) -> Table:
    """A row per evaluation set: title, domain, extent, how it is scored, source and checksum."""
    rows = []
    for name, entry in results["sets"].items():
        found: Any = entry
        units = ("documents", "items", "tokens", "bytes", "words")
        size = ", ".join(f"{found[unit]:,} {unit}" for unit in units if found.get(unit) is not None)
        scored = f"context {found['context_length']:,}" if found.get("context_length") else ""
        scored += f", stride {found['stride']:,}" if found.get("stride") else ""
        checksum = f"SHA-256 {found['sha256']}" if found.get("sha256") else ""
        title = Cell(set_title(results["sets"], name), name)
        origin = Cell(entry.get("source") or NONE, checksum)
        rows.append((title, DOMAINS[entry["domain"]], size, scored or NONE, origin))
    columns = (words("Set", wrap=True), words("Domain"), words("Extent", wrap=True), words("Scored with", wrap=True))
    return make_table("Evaluation sets", (*columns, words("Source", wrap=True)), rows)


def cost_table(results: Results, record: Manifest) -> Table:
    """A row per arm: what it costs, and in which data types and attention implementation it ran."""
    whole, rows = is_pretraining(results), []
    for name, summary in results["arms"].items():
        about: Any = {**record["arms"].get(name, {}), **{key: v for key, v in summary.items() if v is not None}}
        loss, step = about.get("final_training_loss"), about.get("seconds_per_step")
        reuse = about.get("reuse")
        reused = f"first {reuse['layers']} layers reused" if reuse and reuse["training"] else ""
        kinds = (about.get(key) for key in ("base_dtype", "adapter_dtype", "compute_dtype", "attn_implementation"))
        rows.append(
            (
                name,
                _flops(about.get("forward_flops_per_token"), whole=whole),
                NONE if loss is None else f"{loss:.3f}",
                Cell(NONE if step is None else f"{step:.3g} s", reused),
                bytes_text(about.get("peak_memory_bytes")),
                *(kind or NONE for kind in kinds),
            )
        )
    columns: list[Column | str] = [words("Arm"), Column("FLOPs per token", "forward" if whole else "forward, added")]
    columns += [Column("Final loss", "training"), "Per step", "Peak memory"]
    columns += [words(title) for title in ("Base weights", "Inserted weights", "Computed in", "Attention")]
    caption = "Cost, data types and attention implementation of every arm"
    return make_table("Cost and precision", columns, rows, caption)


def _flops(flops: float | None, *, whole: bool) -> str:
    """Forward FLOPs per token, of the whole model or of what the arm adds."""
    if flops is None:
        return NONE
    return f"{flops / 1e6:,.2f} M" if whole else (f"+{flops / 1e6:,.1f} M" if flops else "0")


def size_table(results: Results) -> Table:
    """A row per arm trained from scratch: weights, compute, and how near its control comes; else none."""
    columns = (
        *(words("Arm"), "Weights", "Without embeddings", Column("FLOPs per token", "forward"), "Tokens"),
        *(Column("Training", "PFLOP"), words("Matched to preskip"), "Tokens per second", "Utilisation"),
    )
    rows = []
    for name, summary in results["arms"].items() if is_pretraining(results) else ():
        matched, deviation = summary.get("matched"), summary.get("deviation") or 0.0
        speed, mfu = summary.get("tokens_per_second"), summary.get("mfu")
        rows.append(
            (
                name,
                number(summary["parameters"], 0),
                number(summary["non_embedding"], 0),
                _flops(summary["forward_flops_per_token"], whole=True),
                number(summary["tokens"], 0),
                f"{summary['training_flops'] / 1e15:,.3g}",
                NONE if matched is None else f"{matched} {number(100 * deviation, 2, sign=True)} %",
                NONE if speed is None else number(speed, 0),
                NONE if mfu is None else f"{mfu:.0%}",
            )
        )
    return make_table("Size and compute", columns, rows, "Weights, compute and speed of every arm")


def paper_table(results: Results) -> Table:
    """The paper's own columns of every arm, small below each the paper's figure for this model where there is one."""
    paper: Any = results.get("paper") or {"columns": {}}
    sets = list(dict.fromkeys(name for values in paper["columns"].values() for name in values))
    rows = []
    for arm, values in paper["columns"].items():
        theirs = (paper.get("published") or {}).get(arm, {})
        notes = {name: number(theirs[name], 3) if name in theirs else "" for name in sets}
        rows.append((arm, *(Cell(number(values[name], 3), notes[name]) for name in sets)))
    columns = (words("Arm"), *(PAPER_COLUMNS.get(name, name) for name in sets))
    return make_table("The paper's own scoring", columns, rows)


def trend_table(results: Results) -> Table:
    """The trends over depth: arm, measure, verdict, ρ with interval, null band, size, seeds."""
    columns = (
        words("Arm"),
        words("Measure", wrap=True),
        words("Verdict"),
        "Rank correlation",
        "Interval",
        "Null band",
        Column("Size", "later third over the rest"),
        "Seeds",
    )
    rows = [
        (
            arm,
            MEASURES.get(row["measure"], row["measure"]),
            row["verdict"],
            number(row["rho"], 2, sign=True),
            limits_text(row.get("low"), row.get("high"), 2),
            Cell(limits_text(row.get("null_low"), row.get("null_high"), 2), nulls_text(row)),
            _size(row),
            row.get("seeds") or "",
        )
        for arm, rows in (results.get("trend") or {}).items()
        for row in rows
    ]
    return make_table("Trend over depth", columns, rows, "Trend of each measure over depth")


def _size(row: Trend) -> Cell:
    size = row.get("size")
    if size is None:
        return Cell(NONE, sort=None)
    return Cell(number(size, 2), limits_text(row.get("size_low"), row.get("size_high"), 2, sign=False), size)

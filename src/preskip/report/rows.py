"""Rows of the page's tables: arms by evaluation set, costs, comparisons, the search, and what the run resolves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.metrics import metric_named
from preskip.report.facts import bytes_text
from preskip.report.lookup import (
    by_measure,
    find,
    is_declared,
    is_pretraining,
    ordered,
    plain_arm,
    primary,
    resolvable,
)
from preskip.report.plots.plane import development
from preskip.report.verdicts import (
    MINUS,
    amount,
    difference_text,
    interval_text,
    number,
    p_text,
    set_label,
)

DOMAINS = {"in": "in-domain", "out": "out-of-domain"}
PAPER_COLUMNS = {
    "paper:lambada": "LAMBADA",
    "paper:hellaswag": "HellaSwag",
    "paper:arc_easy": "ARC-Easy",
    "paper:wikitext": 'the paper\'s "PPL"',
}
NOT_MEASURED = {"sort": None, "value": "–", "interval": ""}


def arm_columns(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A column group per evaluation set: title, domain, and its metrics (key, name, note), the primary one first."""
    groups = []
    for name in results["sets"]:
        measured = dict.fromkeys(
            metric for summary in results["arms"].values() for metric in summary["metrics"].get(name) or {}
        )
        first = primary(results, name)
        keys = sorted(measured, key=lambda key: key != first)
        if keys:
            groups.append(
                {
                    "key": name,
                    "title": set_label(results["sets"], name),
                    "domain": DOMAINS[results["sets"][name]["domain"]],
                    "metrics": [
                        {
                            "key": key,
                            "name": about.name,
                            "note": about.direction,
                        }
                        for key in keys
                        for about in [metric_named(key, results["sets"][name])]
                    ],
                }
            )
    return groups


def arm_rows(results: Mapping[str, Any], record: Mapping[str, Any], groups: Sequence[Any]) -> list[dict[str, Any]]:
    """A row per arm: its weights and learning rate, then every metric of every set."""
    rows = []
    for name, summary in results["arms"].items():
        about = record["arms"].get(name, {})
        weights, rate = summary["trainable_parameters"], summary.get("learning_rate")
        cells = [
            {"sort": weights, "value": number(weights, 0), "interval": _budget(summary, about)},
            {"sort": rate, "value": "–" if rate is None else f"{rate:g}", "interval": ""},
        ]
        for group in groups:
            for metric in group["metrics"]:
                stored = (summary["metrics"].get(group["key"]) or {}).get(metric["key"])
                shown = interval_text(metric["key"], stored)
                cells.append({"sort": stored["value"], **shown} if shown and stored else NOT_MEASURED)
        rows.append(
            {
                "name": name,
                "description": about.get("description") or "",
                "seeds": ", ".join(str(seed) for seed in summary["seeds"]),
                "cells": cells,
            }
        )
    return rows


def _budget(summary: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    budget = summary.get("budget") or about.get("budget")
    return {"matched": "equal budget", "smaller": "smaller", "floor": "floor, unmatched", "ceiling": "ceiling"}.get(
        str(budget), ""
    )


def cost_rows(results: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row per arm: what it costs, and in which data types and attention implementation it ran."""
    rows = []
    for name, summary in results["arms"].items():
        about = record["arms"].get(name, {}) | {key: value for key, value in summary.items() if value is not None}
        flops, step, loss = (
            about.get(key) for key in ("forward_flops_per_token", "seconds_per_step", "final_training_loss")
        )
        rows.append(
            {
                "name": name,
                "flops": _flops(flops, whole=is_pretraining(results)),
                "loss": "–" if loss is None else f"{loss:.3f}",
                "step": "–" if step is None else f"{step:.3g} s",
                "peak": bytes_text(about.get("peak_memory_bytes")),
                "base": str(about.get("base_dtype") or "–"),
                "adapter": str(about.get("adapter_dtype") or "–"),
                "compute": str(about.get("compute_dtype") or "–"),
                "attention": str(about.get("attn_implementation") or "–"),
            }
        )
    return rows


def _flops(flops: float | None, *, whole: bool) -> str:
    """Forward FLOPs per token, of the whole model or of what the arm adds."""
    if flops is None:
        return "–"
    return f"{flops / 1e6:,.2f} M" if whole else (f"+{flops / 1e6:,.1f} M" if flops else "0")


def size_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row per arm trained from scratch: weights, compute, and how near its control comes; else none."""
    if not is_pretraining(results):
        return []
    rows = []
    for name, summary in results["arms"].items():
        matched, deviation, mfu = summary.get("matched"), summary.get("deviation"), summary.get("mfu")
        rows.append(
            {
                "name": name,
                "weights": number(summary["parameters"], 0),
                "non_embedding": number(summary["non_embedding"], 0),
                "flops": _flops(summary["forward_flops_per_token"], whole=True),
                "tokens": number(summary["tokens"], 0),
                "training": f"{summary['training_flops'] / 1e15:,.3g}",
                "matched": "–" if matched is None else f"{matched} {number(100 * deviation, 2, sign=True)} %",
                "speed": number(summary["tokens_per_second"], 0),
                "mfu": "–" if mfu is None else f"{mfu:.0%}",
            }
        )
    return rows


def comparison_groups(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every set and metric with its comparisons: those declared before training, then the others."""
    groups = []
    for set_name, metric, entries in by_measure(results["comparisons"]):
        about = metric_named(metric, results["sets"][set_name])
        rows = ordered(entries, about.lower_is_better)
        groups.append(
            {
                "key": f"{set_name}-{metric}",
                "title": f"{about.name}, {set_label(results['sets'], set_name)}",
                "domain": DOMAINS[results["sets"][set_name]["domain"]],
                "note": about.direction,
                "declared": [_comparison(entry) for entry in rows if is_declared(entry)],
                "others": [_comparison(entry) for entry in rows if not is_declared(entry)],
            }
        )
    return groups


def _comparison(entry: Mapping[str, Any]) -> dict[str, Any]:
    counted = entry.get("gained") is not None and entry.get("lost") is not None
    margin = entry.get("margin")
    return {
        "pair": f"{entry['arm']} {MINUS} {entry['reference']}",
        "outcome": entry["verdict"],
        **difference_text(entry),
        "units": f"{entry['units']:,} {entry['unit']}s",
        "clusters": f"in {entry['clusters']:,} clusters" if entry.get("clusters") else "",
        "seeds": entry["seeds"],
        "p": p_text(entry.get("p_value")),
        "p_holm": p_text(entry.get("p_holm")),
        "margin": "–" if margin is None else f"±{amount(entry['metric'], margin)}",
        "p_equivalence": p_text(entry.get("p_equivalence")),
        "discordant": f"{entry['gained']:,} gained, {entry['lost']:,} lost" if counted else "",
    }


def scoreboard(results: Mapping[str, Any]) -> dict[str, Any]:
    """Every trained arm against the plain one on every set's primary metric: the page's overview.

    Returns:
        "columns" (title, name, domain) and "rows" (arm, cells with outcome, value, interval, unit; None where it was
        not compared).
    """
    sets = list(results["sets"])
    columns = [
        {
            "title": set_label(results["sets"], name),
            "name": metric_named(primary(results, name)).phrase,
            "domain": DOMAINS[results["sets"][name]["domain"]],
        }
        for name in sets
    ]
    rows = []
    for arm, summary in results["arms"].items():
        if arm == plain_arm(results) or not summary["trainable_parameters"]:
            continue
        found = [find(results, arm, plain_arm(results), name, primary(results, name)) for name in sets]
        cells = [{"outcome": entry["verdict"], **difference_text(entry)} if entry else None for entry in found]
        if any(cells):
            rows.append({"arm": arm, "cells": cells})
    return {"columns": columns, "rows": rows}


def search_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per point of every arm's learning-rate search."""
    rows = []
    for arm, search in (results.get("search") or {}).items():
        for point in search["trace"]:
            shown = interval_text("bits_per_byte", development(point, "in"))
            rows.append(
                {
                    "arm": arm,
                    "rung": point["rung"] + 1,
                    "steps": point["steps"],
                    "rate": f"{point['learning_rate']:g}",
                    "seed": point["seed"],
                    "value": "diverged" if point.get("diverged") else (shown or NOT_MEASURED)["value"],
                    "interval": (shown or NOT_MEASURED)["interval"],
                    "kept": "kept" if point.get("kept") else "dropped",
                    "chosen": point["learning_rate"] == search["chosen"],
                }
            )
    return rows


def search_summary(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row per searched arm: where it started, what it chose, and whether the grid had to grow."""
    return [
        {
            "arm": arm,
            "default": f"{search['default']:g}",
            "chosen": f"{search['chosen']:g}",
            "runs": str(len(search["trace"])),
            "extended": "yes" if search.get("extended") else "no",
            "diverged": str(sum(bool(point.get("diverged")) for point in search["trace"])),
        }
        for arm, search in (results.get("search") or {}).items()
    ]


def paper_rows(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's own columns of every arm, each beside the paper's figure for this model where there is one.

    Returns:
        "columns" (headings), "rows" (name, cells of value and published or ""), or None without the paper's scoring.
    """
    paper = results.get("paper")
    if not paper:
        return None
    sets = list(dict.fromkeys(name for values in paper["columns"].values() for name in values))
    published = paper.get("published") or {}
    return {
        "model": paper.get("model"),
        "columns": [PAPER_COLUMNS.get(name, name) for name in sets],
        "rows": [
            {
                "name": arm,
                "cells": [
                    {
                        "value": number(values[name], 3),
                        "published": number(published[arm][name], 3) if name in published.get(arm, {}) else "",
                    }
                    for name in sets
                ],
            }
            for arm, values in paper["columns"].items()
        ],
    }


def power_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the run resolves, per declared comparison (all where none was declared), beside what it found."""
    entries = [entry for entry in results["comparisons"] if is_declared(entry)] or results["comparisons"]
    rows = []
    for entry in entries:
        smallest, basis = resolvable(results, entry)
        rows.append(
            {
                "pair": f"{entry['arm']} {MINUS} {entry['reference']}",
                "where": f"{metric_named(entry['metric']).name}, {set_label(results['sets'], entry['set'])}",
                "units": f"{entry['units']:,} {entry['unit']}s",
                "seeds": entry["seeds"],
                "resolvable": amount(entry["metric"], smallest),
                "found": difference_text(entry)["value"] + difference_text(entry)["unit"],
                "basis": {"interval": "interval's width"}.get(basis, f"{basis} spread"),
            }
        )
    return rows

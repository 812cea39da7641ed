"""`preskip compare`: paired statistics over stored per-item results, within a run or between runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from preskip.cli.options import Json, flag
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_names

if TYPE_CHECKING:
    from rich.table import Table

    from preskip.runs.schema import Comparison

DETAIL_NOTE = (
    "behind it: each seed's difference; where one more seed's would lie; how often a seed of the arm is better; the "
    "share of variance of seeds / units / seed by unit; p of random signs of up to 40 units (items only)"
)


def compare(
    runs: Annotated[list[Path], flag("Run directories; arms of several are named run:arm.")],
    *,
    arms: Annotated[Optional[str], flag("Arms to compare, separated by commas. Default: all.", is_list=True)] = None,
    reference: Annotated[Optional[str], flag("Compare every arm with this one only.")] = None,
    sets: Annotated[
        Optional[str], flag("Evaluation sets, separated by commas. Default: all shared.", is_list=True)
    ] = None,
    margin: Annotated[
        Optional[list[str]], flag("Equivalence margin: acc=0.01, or lambada_openai.acc=0.02; repeatable.")
    ] = None,
    confidence: Annotated[float, flag("Level of the intervals.")] = 0.95,
    combined: Annotated[
        bool, flag("One estimate of each pair over all runs, also of different models and corpora.", name="--combine")
    ] = False,
    allow_different_dtype: Annotated[bool, flag("Compare arms of different base or compute dtype.")] = False,
    as_json: Json = False,
) -> None:
    """Compare arms on shared items, from what runs have stored: interval, p, equivalence and verdict of each pair."""
    from preskip.metrics import DEFAULT_MARGINS
    from preskip.progress import progress_bar
    from preskip.runs.declaration import margin_changes
    from preskip.runs.schema import Family
    from preskip.runs.stored import load_runs
    from preskip.stats import compare_arms, looks_without_seeds
    from preskip.stats.records import nothing_compared, unpaired_seeds

    if combined:
        from preskip.cli.combine import combine_runs

        if sets or margin:
            raise PreskipError(
                "--combine goes over all sets with the margins of the runs: leave out --sets and --margin"
            )
        combine_runs(runs, arms, reference, confidence, allow_different_dtype, as_json)
        return
    stored = load_runs(runs, allow_different_dtype=allow_different_dtype)
    pairs = stored.pairs(list(parse_names(arms, stored.items)) if arms else None, reference)
    own_margins = _margins(margin or [])
    margins = {**stored.family.get("margins", DEFAULT_MARGINS), **own_margins}
    family: Family = {**stored.family, "margins": margins}
    chosen = list(parse_names(sets or "")) or None
    left_out: list[str] = []
    with progress_bar("comparing", len(pairs), quiet=as_json) as advance:
        entries = compare_arms(
            stored.items,
            family,
            stored.sets,
            pairs=pairs,
            sets=chosen,
            confidence=confidence,
            advance=advance,
            notes=left_out,
        )
    if not entries:
        raise nothing_compared(left_out)
    stored.notes.extend(left_out)
    if len(runs) > 1:  # of one run the stored notes say which cells are missing
        stored.notes.extend(unpaired_seeds(stored.items, pairs))
    _check_margins(own_margins, entries)
    if stored.family:
        stored.notes.extend(margin_changes(stored.family, own_margins))
    stored.notes.extend(looks_without_seeds(stored.items, family, stored.seeds))
    if as_json:
        print(json.dumps({"family": family, "notes": stored.notes, "comparisons": entries}, indent=1, allow_nan=False))
    else:
        _print(entries, stored.sets, stored.notes)


def _margins(texts: Sequence[str]) -> dict[str, float]:
    margins = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            margin = float(value)
        except ValueError:
            margin = math.nan
        if not math.isfinite(margin):
            raise PreskipError(f"--margin: {text!r} is not metric=number, such as acc=0.01")
        if margin <= 0:
            raise PreskipError(f"--margin: {text!r} is no margin: it must be positive")
        margins[name.strip()] = margin
    return margins


def _check_margins(names: Iterable[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """A margin that names nothing compared would leave the default one in its place."""
    from preskip.metrics import metric_named

    known: set[str] = set()
    for entry in entries:
        metric = entry["metric"]
        known |= {metric, metric_named(metric).key, f"{entry['set']}.{metric}"}
    if unknown := sorted(set(names) - known):
        raise PreskipError(
            f"--margin {unknown[0]}: nothing of that name is compared; choose among {', '.join(sorted(known))}"
        )


def _print(entries: Sequence[Comparison], sets: Mapping[str, Any], notes: Sequence[str]) -> None:
    from preskip.cli.printing import EXPLORATORY_NOTE, print_table

    declared = [entry for entry in entries if entry["declared"]]
    exploratory = [entry for entry in entries if not entry["declared"]]
    tables = [*_tables(declared, sets, entries, is_declared=True)]
    tables += _tables(exploratory, sets, entries, is_declared=False)
    last = [DETAIL_NOTE, *([EXPLORATORY_NOTE] if exploratory else []), *_scope(entries), *notes]
    if declared:
        looks = " and for the looks" if any(entry.get("looked") for entry in declared) else ""
        last.insert(0, f"declared: limits are for one comparison alone; p is corrected for the family{looks}")
    tables += _details(declared or exploratory, sets)
    for table in tables:
        print_table(table, last if table is tables[-1] else ())


def _tables(
    entries: Sequence[Comparison],
    sets: Mapping[str, Any],
    every: Sequence[Comparison],
    *,
    is_declared: bool,
) -> list[Table]:
    """One table per set and metric, of comparisons that were declared before training or of those that were not."""
    from rich.text import Text

    from preskip.cli.printing import columns, difference_cell, verdict_text
    from preskip.metrics import metric_named
    from preskip.report.lookup import by_measure, p_equivalence, p_value
    from preskip.report.words.detail import gain_share
    from preskip.report.words.verdicts import MINUS, margin_text, p_text, set_label

    tables = []
    for name, metric, group in by_measure(entries):
        margin, about = group[0]["margin"], metric_named(metric)
        stated = f", equivalent within {margin_text(metric, margin)}" if margin is not None else ""
        if share := next(filter(None, (gain_share(entry, every, sets) for entry in group)), None):
            stated += f" ({100 * share[0]:.0f} % of {share[1]}'s in-domain gain)"
        unit = f" ({about.difference_unit.strip()})" if about.difference_unit else ""
        table = columns(
            "declared" if is_declared else "exploratory",
            right=(
                f"difference [{100 * group[0]['confidence']:g} %]",
                "p (corr.)" if is_declared else "p (raw)",
                "p equiv.",
            ),
            last="reading",
        )
        table.title = Text(f"{set_label(sets, name)}: {about.name}{unit}{stated}")
        for entry in group:
            table.add_row(
                f"{entry['arm']} {MINUS} {entry['reference']}",
                difference_cell(entry),
                p_text(p_value(entry)),
                p_text(p_equivalence(entry)),
                verdict_text(entry["verdict"], is_declared=is_declared),
            )
        tables.append(table)
    return tables


def _details(entries: Sequence[Comparison], sets: Mapping[str, Any]) -> list[Table]:
    """One table of what stands beside the differences, per set and metric."""
    from rich.text import Text

    from preskip.cli.printing import columns
    from preskip.report.lookup import by_measure
    from preskip.report.words.detail import detail_texts
    from preskip.report.words.verdicts import MINUS, set_label

    level = f"{100 * entries[0]['confidence']:g} %" if entries else ""
    table = columns("behind it", right=("by seed", f"next seed [{level}]", "P(better)", "variance %", "p flip"))
    for name, metric, group in by_measure(entries):
        table.add_row(Text(f"{set_label(sets, name)}, {metric}", style="bold"))
        for entry in group:
            shown = detail_texts(entry, sets.get(name))
            table.add_row(f"  {entry['arm']} {MINUS} {entry['reference']}", *shown.values())
    return [table] if entries else []


def _scope(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many units and seeds the intervals rest on, and what they therefore cover."""
    lines = []
    for name in dict.fromkeys(entry["set"] for entry in entries):
        group = [entry for entry in entries if entry["set"] == name]
        first = group[0]
        counts = f"{first['units']:,} {first['unit']}s"
        if first["clusters"] is not None:
            counts += f" in {first['clusters']:,} clusters"
        covers = {entry["covers"]: entry["seeds"] for entry in group}
        said = [
            f"one seed: {words}, not training randomness" if seeds == 1 else f"{seeds} seeds: {words}"
            for words, seeds in covers.items()
        ]
        lines.append(f"{name}: {counts}; intervals cover " + "; ".join(said))
    return lines

"""The figures of the page: what is drawn, in which section, with a title and a description in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from altair.utils.schemapi import debug_mode

from preskip.metrics import Metric
from preskip.report.load import Curve
from preskip.report.lookup import (
    DOMAINS,
    PAPER,
    by_measure,
    find,
    metric_on,
    plain_arm,
    reference_arm,
    rivals,
    trained_arms,
)
from preskip.report.plots import depth, forest, plane, search, training
from preskip.report.plots.base import Figure, figure
from preskip.report.words.answer import NAMES
from preskip.report.words.frontier import assess_plane, planes
from preskip.report.words.verdicts import number, set_label
from preskip.runs.schema import Results

DEPTH_TITLES = {
    "skip_to_attention": "Functional size of the skip",
    "enrichment": "Change of the attention's input",
}


@debug_mode(False)  # see `specification`
def make_figures(results: Results, curves: Sequence[Curve]) -> list[Figure]:
    """All figures of a run, in the page's order."""
    arms = trained_arms(results)
    return [
        *_overview(results),
        *_planes(results),
        *_forests(results),
        *_searches(results, arms),
        *_evaluations(results, arms),
        *_training(curves, arms),
        *_depth(results, arms),
    ]


def _overview(results: Results) -> Iterator[Figure]:
    """The reference arm against the plain one and its rival: one forest plot per set, on its primary metric."""
    arm = reference_arm(results)
    for name in results["sets"]:
        about, found = metric_on(results, name), [find(results, arm, rival, name) for rival in rivals(results)]
        records = forest.forest_records(list(filter(None, found)), about, plain_arm(results))
        if records and not name.startswith(PAPER):
            domain = DOMAINS[results["sets"][name]["domain"]]
            title = f"{set_label(results['sets'], name)}: {about.phrase}"
            note = f"{domain}, {_better(about)}"
            yield figure(f"overview-{name}", "overview", title, forest.forest(records, about), _pairs(records), note)


def _better(about: Metric) -> str:
    return "left of 0 is better" if about.lower_is_better else "right of 0 is better"


def _pairs(records: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{r['pair']}: {r['difference']:+.4g} [{r['low']:+.4g}, {r['high']:+.4g}], {r['outcome']}"
        + ("" if r["declared"] else " (exploratory)")
        for r in records
    )


def _planes(results: Results) -> Iterator[Figure]:
    for in_domain, out_of_domain in planes(results):
        records = plane.plane_records(results, in_domain, out_of_domain)
        tested = [record for record in records if record["part"] == "test"]
        if not tested:
            continue
        title = f"{set_label(results['sets'], in_domain)} against "
        sentence = assess_plane(results, in_domain, out_of_domain)["sentence"]
        alt = f"Benefit against {NAMES[plain_arm(results)]}: {_places(tested)}. {sentence}"
        shown = [
            (out_of_domain, f"plane-{out_of_domain}", title + set_label(results["sets"], out_of_domain), records, alt)
        ]
        text = plane.DEVELOPMENT_TEXT.get(out_of_domain, "")
        searched = [record for arm in trained_arms(results) for record in plane.grid_records(results, arm, text)]
        if searched:
            chosen = _places([record for record in searched if record["chosen"]])
            alt = f"Bits per byte saved on development text at the chosen rates: {chosen}"
            shown.append((text, "search-plane", f"Rates of the search: {title}{text}", searched, alt))
        for name, section, title, drawn, alt in shown:
            left_out = plane.outside(drawn)
            note = f"{left_out} points of the search lie outside" if left_out else ""
            spec = plane.plane(drawn, results, in_domain, name)
            yield figure(f"plane-{name}", section, title, spec, alt, note)


def _places(records: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{r['arm']} {number(r['x'], 4, sign=True)} in-domain, {number(r['y'], 4, sign=True)} out-of-domain"
        for r in records
    )


def _forests(results: Results) -> Iterator[Figure]:
    for set_name, metric, entries in by_measure(results["comparisons"]):
        about = metric_on(results, set_name, metric)
        records = forest.forest_records(entries, about, plain_arm(results))
        if not records:
            continue
        key, title = f"{set_name}-{metric}", f"Paired differences, {about.phrase}"
        spec, alt = forest.forest(records, about), _pairs(records)
        yield figure(f"forest-{key}", f"comparisons-{key}", title, spec, alt, _better(about))


def _searches(results: Results, arms: Sequence[str]) -> Iterator[Figure]:
    found = results.get("search") or {}
    records = {arm: search.search_records(found[arm], arm) for arm in arms if arm in found and found[arm]["trace"]}
    bounds = search.shared_bounds([record for rows in records.values() for record in rows])
    for arm, rows in records.items():
        best = [row for row in rows if row["chosen"] and row["value"] is not None]
        values = ", ".join(f"{row['value']:+.4f}" for row in best)
        reached = f", where it reaches {values} bits per byte" if best else ""
        diverged = sorted({row["learning_rate"] for row in rows if row["diverged"]})
        chosen = ", ".join(f"{rate:g}" for rate in found[arm].get("by_seed", {"": found[arm]["chosen"]}).values())
        alt = f"{arm}: chosen learning rate {chosen}{reached}"
        alt += f"; diverged at {', '.join(f'{rate:g}' for rate in diverged)}" if diverged else ""
        note = f"chose {chosen}" + (", grid extended" if found[arm].get("extended") else "")
        yield figure(f"search-{arm}", "search", arm, search.search(rows, arms, bounds), alt, note)


def _evaluations(results: Results, arms: Sequence[str]) -> Iterator[Figure]:
    records = training.evaluation_records(results.get("curves") or {})
    if not records:
        return
    last = {record["arm"]: record for record in records}
    words = "; ".join(
        f"{arm} {record['mean']:.4f} [{record['low']:.4f}, {record['high']:.4f}] after {record['tokens']:,} tokens"
        for arm, record in last.items()
    )
    title, note = "Loss on development documents", "line: mean over seeds; band: lowest to highest"
    alt = f"Mean over seeds, lowest and highest: {words}"
    yield figure("evaluation", "training", title, training.evaluation(records, arms), alt, note)


def _training(curves: Sequence[Curve], arms: Sequence[str]) -> Iterator[Figure]:
    if not curves:
        return
    last = "; ".join(
        f"{arm}, seed {seed}: {smooth:.3f}"
        for arm, seed, lines in curves
        if (smooth := training.smoothed([line["loss"] for line in lines])[-1]) is not None
    )
    spec = training.training(training.training_records(curves), arms)
    yield figure("training", "training", "Training loss", spec, f"Smoothed training loss at the last step: {last}")


def _depth(results: Results, arms: Sequence[str]) -> Iterator[Figure]:
    profiles = results.get("depth") or {}
    for measure, title in DEPTH_TITLES.items():
        records = depth.depth_records(profiles, measure)
        if records:
            spec = depth.depth(records, arms, measure)
            yield figure(f"depth-{measure}", "depth", title, spec, _layers_in_words(records, depth.MEASURES[measure]))
    for arm in arms:
        if arm in profiles:
            yield from _norms(results, arms, arm)
    for arm, seeds in (results.get("ablation") or {}).items():
        for part in ("skip", "enrichment"):
            records = depth.ablation_records(seeds, arm, part)
            if records:
                largest = max(records, key=lambda row: row["difference"])
                helping = f"{sum(row['low'] > 0 for row in records)} of {len(records)} intervals lie above 0"
                alt = (
                    f"Most is lost at layer {largest['layer']}: {largest['difference']:+.4f} bits per byte "
                    f"[{largest['low']:+.4f}, {largest['high']:+.4f}]; {helping}"
                )
                title, spec = f"{arm}: one layer's {part} off", depth.ablation(records, arms)
                yield figure(f"ablation-{part}-{arm}", "ablation", title, spec, alt, "above 0 it helps")


def _norms(results: Results, arms: Sequence[str], arm: str) -> Iterator[Figure]:
    """An arm's norm on its null bands, and beside it the same norm under equal steps."""
    for measure in ("skip_norm", "down_norm"):
        records = depth.norm_records(results, arm, measure)
        learned = [record for record in records if record["part"] == "arm"]
        if not learned:
            continue
        nulls = sorted({record["null"] for record in records if record["part"] == "null"})
        name, title = depth.MEASURES[measure], f"{arm}: {depth.MEASURES[measure]}"
        alt = _layers_in_words(learned, name) + (f"; null bands: {' and '.join(nulls)}" if nulls else "; no null band")
        # Several rates mean several scales: each plot has its own axis, from 0.
        spec, note = depth.norms(records, arms, measure), "with null bands" if nulls else "no null band"
        yield figure(f"norm-{measure}-{arm}", "norms", title, spec, alt, note)
        equal = depth.depth_records({arm: (results.get("equal_step") or {}).get(arm, {})}, measure)
        if equal:
            alt = "With equal steps in every layer: " + _layers_in_words(equal, name)
            spec = depth.norms([{"part": "arm", **row} for row in equal], arms, measure)
            yield figure(f"equal-step-{measure}-{arm}", "norms", title, spec, alt, "control: equal steps")
        return  # the skip's norm where there is a skip, else the down-projection's


def _layers_in_words(records: Sequence[Mapping[str, Any]], name: str) -> str:
    first, last = min(r["layer"] for r in records), max(r["layer"] for r in records)
    largest = max(records, key=lambda r: r["value"])
    return (
        f"{name} for layers {first} to {last}; largest at layer {largest['layer']} "
        f"({largest['value']:.3g}, {largest['arm']}, seed {largest['seed']})"
    )

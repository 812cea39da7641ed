"""The figures of the page: what is drawn, in which section, with a title and a description in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from preskip.report.load import Curve
from preskip.report.lookup import by_measure, metric_on, trained_arms
from preskip.report.plots import depth, forest, plane, search, training
from preskip.report.words.frontier import assess_plane, planes
from preskip.report.words.verdicts import number, set_label
from preskip.runs.schema import Results

Figure = dict[str, Any]
DEPTH_TITLES = {
    "skip_to_attention": "Functional size of the skip",
    "enrichment": "Change of the attention's input",
}
PARTS = {"skip": "skip", "enrichment": "enrichment"}


def make_figures(results: Results, curves: Sequence[Curve]) -> list[Figure]:
    """All figures of a run, in the page's order.

    Args:
        results: content of results.json.
        curves: the training logs.

    Returns:
        Dictionaries with key (unique), section, title, note, alt (the figure in words) and spec.
    """
    arms = trained_arms(results)
    return [
        *_planes(results),
        *_forests(results),
        *_searches(results, arms),
        *_evaluations(results, arms),
        *_training(curves, arms),
        *_depth(results, arms),
    ]


def _figure(key: str, section: str, title: str, spec: Any, alt: str, *, note: str = "") -> Figure:
    shown = {"key": key, "section": section, "title": title, "note": note}
    return {**shown, "alt": alt, "spec": spec}


def _planes(results: Results) -> Iterator[Figure]:
    for home, abroad in planes(results):
        records = plane.plane_records(results, home, abroad)
        tested = [record for record in records if record["part"] == "test"]
        if not tested:
            continue
        reading = assess_plane(results, home, abroad)["sentence"]
        words = f"Benefit against the untouched model: {_places(tested)}. {reading}"
        yield _plane(results, records, home, abroad, abroad, words)
        text = plane.DEVELOPMENT_TEXT.get(abroad, "")
        searched = [record for arm in trained_arms(results) for record in plane.grid_records(results, arm, text)]
        if searched:
            chosen = _places([record for record in searched if record["chosen"]])
            words = f"Bits per byte saved on development text at the chosen rates: {chosen}"
            yield _plane(results, searched, home, text, abroad, words)


def _plane(
    results: Results, records: Sequence[dict[str, Any]], home: str, abroad: str, section: str, words: str
) -> Figure:
    """A plane in the section of one set abroad."""
    left_out = plane.outside(records)
    title = f"{set_label(results['sets'], home)} against {set_label(results['sets'], abroad)}"
    return _figure(
        f"plane-{abroad}",
        f"plane-{section}",
        title if abroad in results["sets"] else f"Rates of the search: {title}",
        plane.plane(records, results, home, abroad),
        words,
        note=f"{left_out} points of the search lie outside" if left_out else "",
    )


def _places(records: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{r['arm']} {number(r['x'], 4, sign=True)} at home, {number(r['y'], 4, sign=True)} abroad" for r in records
    )


def _forests(results: Results) -> Iterator[Figure]:
    for set_name, metric, entries in by_measure(results["comparisons"]):
        about = metric_on(results, set_name, metric)
        records = forest.forest_records(entries, about)
        if not records:
            continue
        alt = "; ".join(
            f"{r['pair']}: {r['difference']:+.4g} [{r['low']:+.4g}, {r['high']:+.4g}], {r['outcome']}" for r in records
        )
        yield _figure(
            f"forest-{set_name}-{metric}",
            f"comparisons-{set_name}-{metric}",
            f"Paired differences, {about.phrase}",
            forest.forest(records, about),
            alt,
            note="left of 0 is better" if about.lower_is_better else "right of 0 is better",
        )


def _searches(results: Results, arms: Sequence[str]) -> Iterator[Figure]:
    found = results.get("search") or {}
    records = {arm: search.search_records(found[arm], arm) for arm in arms if arm in found and found[arm]["trace"]}
    bounds = search.shared_bounds([record for rows in records.values() for record in rows])
    for arm, rows in records.items():
        best = [row for row in rows if row["chosen"] and row["value"] is not None]
        reached = f", where it reaches {best[0]['value']:+.4f} bits per byte" if best else ""
        diverged = sorted({row["learning_rate"] for row in rows if row["diverged"]})
        alt = f"{arm}: chosen learning rate {found[arm]['chosen']:g}{reached}"
        if diverged:
            alt += f"; diverged at {', '.join(f'{rate:g}' for rate in diverged)}"
        yield _figure(
            f"search-{arm}",
            "search",
            arm,
            search.search(rows, arms, bounds),
            alt,
            note=f"chose {found[arm]['chosen']:g}" + (", grid extended" if found[arm].get("extended") else ""),
        )


def _evaluations(results: Results, arms: Sequence[str]) -> Iterator[Figure]:
    records = training.evaluation_records(results.get("curves") or {})
    if not records:
        return
    last = {record["arm"]: record for record in records}
    words = "; ".join(
        f"{arm} {record['mean']:.4f} [{record['low']:.4f}, {record['high']:.4f}] after {record['tokens']:,} tokens"
        for arm, record in last.items()
    )
    yield _figure(
        "evaluation",
        "training",
        "Loss on development documents",
        training.evaluation(records, arms),
        f"Mean over seeds, lowest and highest: {words}",
        note="line: mean over seeds; band: lowest to highest",
    )


def _training(curves: Sequence[Curve], arms: Sequence[str]) -> Iterator[Figure]:
    if not curves:
        return
    last = "; ".join(
        f"{arm}, seed {seed}: {smooth:.3f}"
        for arm, seed, lines in curves
        if (smooth := training.smoothed([line["loss"] for line in lines])[-1]) is not None
    )
    yield _figure(
        "training",
        "training",
        "Training loss",
        training.training(training.training_records(curves), arms),
        f"Smoothed training loss at the last step: {last}",
    )


def _depth(results: Results, arms: Sequence[str]) -> Iterator[Figure]:
    profiles = results.get("depth") or {}
    for measure, title in DEPTH_TITLES.items():
        records = depth.depth_records(profiles, measure)
        if records:
            spec = depth.depth(records, arms, measure)
            yield _figure(f"depth-{measure}", "depth", title, spec, _layers_in_words(records, depth.MEASURES[measure]))
    for arm in arms:
        yield from _norms(results, arms, arm)
    for arm, seeds in (results.get("ablation") or {}).items():
        for part, words in PARTS.items():
            records = depth.ablation_records(seeds, arm, part)
            if records:
                largest = max(records, key=lambda row: row["difference"])
                helping = sum(row["low"] > 0 for row in records)
                yield _figure(
                    f"ablation-{part}-{arm}",
                    "ablation",
                    f"{arm}: one layer's {words} off",
                    depth.ablation(records, arms),
                    f"Most is lost at layer {largest['layer']}: {largest['difference']:+.4f} bits per byte "
                    f"[{largest['low']:+.4f}, {largest['high']:+.4f}]; {helping} of "
                    f"{len(records)} intervals lie above 0",
                    note="above 0 it helps",
                )


def _norms(results: Results, arms: Sequence[str], arm: str) -> Iterator[Figure]:
    """An arm's norm on its null bands, and beside it the same norm under equal steps."""
    if arm not in (results.get("depth") or {}):
        return
    for measure in ("skip_norm", "down_norm"):
        records = depth.norm_records(results, arm, measure)
        learned = [record for record in records if record["part"] == "arm"]
        if not learned:
            continue
        nulls = sorted({record["null"] for record in records if record["part"] == "null"})
        # Several rates mean several scales: each plot has its own axis, from 0.
        yield _figure(
            f"norm-{measure}-{arm}",
            "norms",
            f"{arm}: {depth.MEASURES[measure]}",
            depth.norms(records, arms, measure),
            _layers_in_words(learned, depth.MEASURES[measure])
            + (f"; null bands: {' and '.join(nulls)}" if nulls else "; no null band"),
            note="with null bands" if nulls else "no null band",
        )
        equal = depth.depth_records({arm: (results.get("equal_step") or {}).get(arm, {})}, measure)
        if equal:
            rows = [{"part": "arm", **row} for row in equal]
            yield _figure(
                f"equal-step-{measure}-{arm}",
                "norms",
                f"{arm}: {depth.MEASURES[measure]}",
                depth.norms(rows, arms, measure),
                "With equal steps in every layer: " + _layers_in_words(equal, depth.MEASURES[measure]),
                note="control: equal steps",
            )
        return  # the skip's norm where there is a skip, else the down-projection's


def _layers_in_words(records: Sequence[Mapping[str, Any]], name: str) -> str:
    first, last = min(r["layer"] for r in records), max(r["layer"] for r in records)
    largest = max(records, key=lambda r: r["value"])
    return (
        f"{name} for layers {first} to {last}; largest at layer {largest['layer']} "
        f"({largest['value']:.3g}, {largest['arm']}, seed {largest['seed']})"
    )

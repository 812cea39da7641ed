"""The figures of what `preskip explain` measured: what is drawn, in which section, with a description in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from altair.utils.schemapi import debug_mode

from preskip.report.explain.measures import ABLATIONS, ALIGNMENTS, SIZES, measured, value_text
from preskip.report.plots import classes, depth, layers
from preskip.report.plots.base import Figure, Record, Spec, figure
from preskip.runs.explain_schema import Explain

Layers = Sequence[Any]  # of ExplainedLayer, read by the name of a measure

TITLES = [title for title, _ in SIZES.values()]
CHANGES = {
    "entropy_change": ("Entropy of attention", "Δ entropy, nats", "above 0: it spreads wider"),
    "sink_change": ("Mass on the first token", "Δ mass on the first token", "above 0: more goes there"),
}


@debug_mode(False)  # see `specification`
def explain_figures(explain: Explain) -> list[Figure]:
    """All figures of explain.json, in the page's order."""
    return [
        *depth_figures(explain["layers"], explain["source"]),
        *_ablation(explain["layers"]),
        *_classes(explain),
        *_weights(explain["layers"]),
        *_directions(explain["layers"]),
    ]


@debug_mode(False)
def depth_figures(rows: Layers, source: Mapping[str, Any] | None = None) -> list[Figure]:
    """Both sizes by layer, and the norms on their null bands; the source is where the weights are from."""
    figures: list[Figure] = []
    for key, (title, axis) in SIZES.items():
        figures += _profile(key, "depth", title, axis, interval_records(rows, {title: (key,)}), series=TITLES)
    return [*figures, *_norms(rows, source or {})]


def interval_records(rows: Layers, series: Mapping[str, Sequence[str]]) -> list[Record]:
    """One record per series (name → where its interval stands in a layer) and layer that has the measure."""
    return [
        {"series": name, "layer": layer, **{key: found[key] for key in ("value", "low", "high")}}
        for name, path in series.items()
        for layer, found in measured(rows, *path)
    ]


def _figure(key: str, section: str, title: str, spec: Spec, alt: str, note: str = "") -> Figure:
    return figure(f"explain-{key}", f"explain-{section}", title, spec, alt, note)


def _profile(
    key: str, section: str, title: str, axis: str, records: list[Record], note: str = "", name: str = "", **how: Any
) -> list[Figure]:
    """Lines by layer, where anything was measured."""
    if not records:
        return []
    return [_figure(key, section, title, layers.profile(records, axis, **how), _extremes(records, name or axis), note)]


def _norms(rows: Layers, source: Mapping[str, Any]) -> Iterator[Figure]:
    arm, seed = source.get("arm") or "branch", str(source.get("seed", ""))
    for measure in ("skip_norm", "down_norm"):
        about = {"part": "arm", "arm": arm, "seed": seed}
        learned = [{**about, "layer": row["layer"], "value": row[measure]} for row in rows if row.get(measure)]
        if not learned:
            continue
        about = {"part": "null", "null": depth.NULLS["noise"]}
        bands = [{**about, "layer": layer, **band} for layer, band in measured(rows, "null", measure)]
        name = depth.MEASURES[measure]
        top = max(learned, key=lambda row: row["value"])
        words = f"{name}; largest at layer {top['layer']} ({top['value']:.3g}); {'with' if bands else 'no'} null band"
        note = "with the band that noise gives" if bands else "no null band: a norm alone shows little"
        yield _figure(measure, "depth", f"Norm: {name}", depth.norms([*learned, *bands], [arm], measure), words, note)


def _ablation(rows: Layers) -> Iterator[Figure]:
    parts = {part: interval_records(rows, {title: ("ablation", part)}) for part, title in ABLATIONS.items()}
    limits = layers.bounds([record for records in parts.values() for record in records])
    for part, records in parts.items():
        if records:
            spec = layers.bars(records, "Δ bits per byte", limits, list(ABLATIONS.values()))
            title, words = ABLATIONS[part].capitalize(), _extremes(records, "Bits per byte added")
            yield _figure(f"ablation-{part}", "ablation", title, spec, words, "above 0 it helps; pale: unclear")


def _classes(explain: Explain) -> Iterator[Figure]:
    found = explain.get("classes") or []
    for measure, (title, axis) in SIZES.items():
        records = classes.class_records(found, measure)
        shown = [record for record in records if record["value"] is not None]
        if shown:
            words = "; ".join(f"{record['class']} {value_text(record)}" for record in shown)
            spec = classes.classes_plot(records, axis, list(SIZES))
            yield _figure(f"classes-{measure}", "classes", title, spec, f"{axis} by class of token: {words}")
    if by_layer := [entry for entry in found if entry.get("by_layer")]:
        records = classes.by_layer_records(by_layer, [layer["layer"] for layer in explain["layers"]])
        axis = SIZES["skip_to_attention"][1]
        top = max((record for record in records if record["value"] is not None), key=lambda record: record["value"])
        words = f"{axis} by class and layer; largest for {top['class']} at layer {top['layer']} ({top['value']:.3g})"
        spec = classes.by_layer(records, axis)
        yield _figure("classes-by-layer", "by-layer", "The skip by class and layer", spec, words)


def _weights(rows: Layers) -> Iterator[Figure]:
    records = layers.spectrum_records(rows)
    if records:
        top = max(records, key=lambda record: record["value"])
        words = f"Largest singular value at layer {top['layer']}: {top['value']:.3g}"
        yield _figure("spectrum", "weights", "Singular values of W_skip", layers.spectrum(records), words)
    ranks = {"effective rank": "effective_rank", "stable rank": "stable_rank"}
    found = [
        {"series": name, "layer": row["layer"], "value": row[key], "low": row[key], "high": row[key]}
        for name, key in ranks.items()
        for row in rows
        if row.get("spectrum") and row.get(key) is not None
    ]
    yield from _profile("ranks", "weights", "Ranks of W_skip", "Rank of W_skip", found, series=list(ranks))


def _directions(rows: Layers) -> Iterator[Figure]:
    series = {f"with {words}": ("alignment", key) for key, words in ALIGNMENTS.items()}
    records, name = interval_records(rows, series), "Cosine of the skip's output"
    how = {"series": list(series), "form": "+.4f"}
    title, note = "Direction of the skip", "above 0: the same way"
    yield from _profile("alignment", "alignment", title, "Cosine", records, note, name, **how)
    for key, (title, axis, note) in CHANGES.items():
        records = interval_records(rows, {title: (key,)})
        yield from _profile(key.replace("_", "-"), "attention", title, axis, records, note, form="+.5f")


def _extremes(records: Sequence[Mapping[str, Any]], name: str) -> str:
    first, last = min(r["layer"] for r in records), max(r["layer"] for r in records)
    several = len({record["series"] for record in records}) > 1
    top, bottom = (pick(records, key=lambda r: r["value"]) for pick in (max, min))
    ends = [
        f"{word} at layer {r['layer']} ({value_text(r)}{', ' + r['series'] if several else ''})"
        for word, r in (("largest", top), ("smallest", bottom))
    ]
    return f"{name}, layers {first} to {last}; {', '.join(ends)}"

"""The plane of in-domain gain and out-of-domain change: every arm over its learning rates, and its test scores.

Both axes point the same way: right is better in-domain, up is better out-of-domain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import altair as alt

from preskip.metrics import Metric, metric_named
from preskip.report.lookup import development, find, is_chosen, metric_on, plain_arm, primary, trained_arms
from preskip.report.plots.base import (
    POINT,
    Record,
    Spec,
    chart,
    colour,
    once,
    shape,
    shown_arms,
    specification,
    tooltips,
    zero_line,
)
from preskip.report.words.verdicts import set_label
from preskip.runs.schema import Results

# Opacity of the last rung and of earlier ones: of lines and points, of their intervals.
STRENGTH = ((0.85, 0.3), (0.5, 0.12))
# Text on which the search is scored in place of a task, in bits per byte.
DEVELOPMENT_TEXT = {"lambada_openai": "lambada_development"}
# Words in the plane's corners: text, signs of x and y there, place, and how it is set.
CORNERS: tuple[tuple[str, int, int, Any, Any, Any, int], ...] = (
    ("better out-of-domain only", -1, 1, 8, 10, "left", 0),
    ("better in both", 1, 1, "width", 10, "right", -6),
    ("worse in both", -1, -1, 8, "height", "left", 0),
    ("better in-domain only", 1, -1, "width", "height", "right", -6),
)


def plane_records(results: Results, in_domain: str, out_of_domain: str) -> list[Record]:
    """Marks of one plane: part "test" (an arm's difference to the plain one on both sets) and part "grid" (a point of
    its learning-rate search on development documents, where those were scored out-of-domain in bits per byte).

    Coordinates are benefits: x and y positive where the arm is better than the plain one.
    """
    records: list[Record] = []
    for arm in trained_arms(results):
        inside, outside = (find(results, arm, plain_arm(results), name) for name in (in_domain, out_of_domain))
        if inside and outside:
            x = _benefit("x", inside, metric_on(results, in_domain))
            y = _benefit("y", outside, metric_on(results, out_of_domain))
            records.append({"part": "test", "arm": arm, **x, **y})
        # Losses of the search are in bits per byte; they cannot be drawn on an axis of another unit.
        if {primary(results, name) for name in (in_domain, out_of_domain)} == {"bits_per_byte"}:
            records += grid_records(results, arm, out_of_domain)
    return records


def grid_records(results: Results, arm: str, out_of_domain: str) -> list[Record]:
    """The points of one arm's learning-rate search that scored a set out of domain, as benefits in bits per byte."""
    search = (results.get("search") or {}).get(arm)
    if not search:
        return []
    about = metric_named("bits_per_byte")
    last = max((point["rung"] for point in search["trace"]), default=0)
    records: list[Record] = []
    for point in search["trace"]:
        inside, outside = development(point, "in"), (development(point, "out") or {}).get(out_of_domain)
        if inside and outside:
            records.append(
                {
                    "part": "grid",
                    "arm": arm,
                    **{key: cast(Record, point)[key] for key in ("rung", "steps", "learning_rate")},
                    "seed": str(point["seed"]),
                    "chosen": is_chosen(search, point),
                    "last": point["rung"] == last,
                    **_benefit("x", inside, about),
                    **_benefit("y", outside, about),
                }
            )
    return records


def plane(records: Sequence[Record], results: Results, in_domain: str, out_of_domain: str) -> Spec:
    """The plane as a specification; `records` as from `plane_records`.

    Beside test scores the search's traces are layers named traces-…, and the parameter `traces` says whether the axes
    reach over them: the page has a switch.
    """
    arms = trained_arms(results)
    legend, source = shown_arms(arms, records, 110), chart(records)
    titles = [_title(results, name) for name in (in_domain, out_of_domain)]
    tests, grid = ([record for record in records if record["part"] == part] for part in ("test", "grid"))
    bounds, switched = _bounds(tests or records), bool(tests and grid)
    x_scale, y_scale = (_scale(bounds[axis], _bounds(records)[axis] if switched else None) for axis in ("x", "y"))
    x_ticks, y_ticks = alt.Axis(tickCount=5), alt.Axis(tickCount=8)  # of labels beside each other fewer find room
    x = alt.X("x:Q", title=[f"In-domain: {titles[0][0]} → better", titles[0][1]], axis=x_ticks, scale=x_scale)
    y = alt.Y("y:Q", title=[f"Out-of-domain: {titles[1][0]} → better", titles[1][1]], axis=y_ticks, scale=y_scale)
    shade, mark = colour(arms, legend), shape(arms, legend)
    layers: list[Any] = [
        zero_line(source, "x"),
        zero_line(source, "y"),
        *(
            once(source)
            .mark_text(align=align, baseline="top" if top == 10 else "bottom", fontSize=12, dx=shift)
            .encode(x=alt.value(left), y=alt.value(top), text=alt.datum(words))
            for words, x_sign, y_sign, left, top, align, shift in CORNERS
            if bounds["x"][x_sign > 0] != 0 and bounds["y"][y_sign > 0] != 0
        ),
    ]
    if grid:
        searched = source.transform_filter("datum.part === 'grid'").encode(color=shade, x=x, y=y)
        about = tooltips(
            {"arm:N": "arm", "learning_rate:Q": "learning rate", "steps:Q": "steps", "seed:N": "seed"},
            {"x:Q": "in-domain (dev)", "y:Q": "out-of-domain (dev)"},
            "+.4f",
        )
        # Earlier rungs trained for fewer steps: they stand back.
        strong, faint = (alt.condition("datum.last", alt.value(high), alt.value(low)) for high, low in STRENGTH)
        traces = [
            searched.mark_rule(strokeWidth=1, clip=True).encode(x="x_low:Q", x2="x_high:Q", opacity=faint),
            searched.mark_rule(strokeWidth=1, clip=True).encode(y="y_low:Q", y2="y_high:Q", opacity=faint),
            searched.mark_line(strokeWidth=1.25, clip=True).encode(
                detail=["rung:N", "seed:N", "last:N"], order="learning_rate:Q", opacity=strong
            ),
            searched.mark_point(filled=True, size=26, clip=True).encode(shape=mark, tooltip=about, opacity=strong),
            searched.transform_filter("datum.chosen").mark_point(
                size=150, strokeWidth=1.5, opacity=0.9, shape="circle", clip=True
            ),
        ]
        layers += [layer.properties(name=f"traces-{place}") for place, layer in enumerate(traces)]
    if not tests:
        return specification(layers, height=360)
    test = source.transform_filter("datum.part === 'test'").encode(color=shade, x=x, y=y)
    about = tooltips({"arm:N": "arm"}, {"x:Q": "in-domain", "x_low:Q": "from", "x_high:Q": "to"}, "+.4f")
    about += tooltips({}, {"y:Q": "out-of-domain", "y_low:Q": "from", "y_high:Q": "to"}, "+.4f")
    layers += [
        test.mark_rule(strokeWidth=2).encode(x="x_low:Q", x2="x_high:Q"),
        test.mark_rule(strokeWidth=2).encode(y="y_low:Q", y2="y_high:Q"),
        test.mark_point(size=210, **POINT).encode(shape=mark, tooltip=about),
    ]
    spec = specification(layers, height=360)
    return {**spec, "params": [{"name": "traces", "value": False}]} if switched else spec


def _scale(near: tuple[float, float], far: tuple[float, float] | None) -> Any:
    """An axis over the limits `near`, and over `far` where they are given and the traces are shown."""
    if far is None:
        return alt.Scale(domain=list(near), nice=True)
    low, high = (alt.ExprRef(f"traces ? {wide!r} : {close!r}") for close, wide in zip(near, far, strict=True))
    return alt.Scale(domainMin=low, domainMax=high, nice=True)


def outside(records: Sequence[Record]) -> int:
    """How many points of the search the picture leaves out."""
    bounds = _bounds(records)
    return sum(
        any(not low <= record[axis] <= high for axis, (low, high) in bounds.items())
        for record in records
        if record["part"] == "grid"
    )


def _bounds(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Lowest and highest x and y that are drawn: 0, the test scores' intervals and the last rung of the search; of
    earlier rungs the points that are no farther from 0 than those, since some rates ruin the model.
    """
    tested = [record for record in records if record["part"] == "test"]
    grid = [record for record in records if record["part"] == "grid"]
    values = {
        axis: [record[f"{axis}_{end}"] for record in tested for end in ("low", "high")]
        + [record[axis] for record in grid if record["last"]]
        for axis in ("x", "y")
    }
    reach = {axis: max((abs(value) for value in own), default=math.inf) for axis, own in values.items()}
    near = [record for record in grid if all(abs(record[axis]) <= reach[axis] for axis in reach)]
    every = {axis: [0.0, *own, *(record[axis] for record in near)] for axis, own in values.items()}
    return {axis: (min(own), max(own)) for axis, own in every.items()}


def _benefit(axis: str, entry: Any, about: Metric) -> Record:
    """A difference and its limits as a benefit in shown units: positive is better."""
    size = (-1.0 if about.lower_is_better else 1.0) * about.factor
    value = entry["difference"] if "difference" in entry else entry["value"]
    best, low, high = (size * limit for limit in (value, entry["low"], entry["high"]))
    return {axis: best, f"{axis}_low": min(low, high), f"{axis}_high": max(low, high)}


def _title(results: Results, name: str) -> tuple[str, str]:
    if name not in results["sets"]:
        return "bits per byte saved", f"{name}, scored by the search only"
    about = metric_on(results, name)
    unit = about.difference_unit.strip()
    words = f"{unit} of {about.phrase}" if unit else about.phrase
    return f"{words} {'saved' if about.lower_is_better else 'gained'}", set_label(results["sets"], name)

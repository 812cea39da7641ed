"""The learning-rate search of one arm: development loss against the rate, one line per rung."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from preskip.report.lookup import development, is_chosen
from preskip.report.plots.base import POINT, Record, Spec, chart, colour, specification, tooltips, value_axis, zero_line
from preskip.runs.schema import Search


def search_records(search: Search, arm: str) -> list[Record]:
    """One record per trained point: its rung and seed, the learning rate, the difference to the untouched model on
    development documents in bits per byte (None where it diverged).
    """
    records: list[Record] = []
    for point in search["trace"]:
        inside = development(point, "in") or {}
        records.append(
            {
                "arm": arm,
                "rung": f"{point['steps']} steps",
                "seed": str(point["seed"]),
                "learning_rate": point["learning_rate"],
                **{limit: inside.get(limit) for limit in ("value", "low", "high")},
                "kept": "kept" if point.get("kept") else "dropped",
                "chosen": is_chosen(search, point),
                "diverged": bool(point.get("diverged")),
            }
        )
    return records


def search(records: Sequence[Record], arms: Sequence[str], bounds: tuple[float, float]) -> Spec:
    """One arm's search, in the limits of the vertical axis that all arms share, so that their plots compare."""
    source = chart(records)
    x = alt.X(
        "learning_rate:Q",
        title="Learning rate",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(grid=False, format=".1~e", values=sorted({record["learning_rate"] for record in records})),
    )
    y = value_axis("value", "Δ bits per byte, dev", domain=list(bounds), clamp=True, nice=False, zero=alt.Undefined)
    about = tooltips(
        {"rung:N": "rung", "seed:N": "seed", "learning_rate:Q": "learning rate", "kept:N": "after it"},
        {"value:Q": "difference", "low:Q": "low", "high:Q": "high"},
        "+.4f",
    )
    order = list(dict.fromkeys(record["rung"] for record in records))
    dash = alt.StrokeDash(
        "rung:N",
        title=None,
        scale=alt.Scale(domain=order, range=rung_dashes(len(order))),
        legend=alt.Legend(symbolSize=130, labelFontSize=11, columns=4, symbolStrokeColor="#888888"),
    )
    base = source.encode(x=x, color=colour(arms))
    trained = base.transform_filter("!datum.diverged")
    layers = [
        zero_line(source),
        trained.mark_rule(strokeWidth=1.5, opacity=0.45).encode(y=alt.Y("low:Q"), y2="high:Q"),
        trained.mark_line(strokeWidth=1.75).encode(y=y, strokeDash=dash, detail="seed:N"),
        trained.mark_point(size=32, **POINT).encode(y=y, tooltip=about),
    ]
    if any(record["chosen"] and not record["diverged"] for record in records):
        chosen = trained.transform_filter("datum.chosen")
        layers.append(chosen.mark_point(size=190, strokeWidth=2, opacity=1).encode(y=y))
    if any(record["diverged"] for record in records):
        diverged = base.transform_filter("datum.diverged")
        cross = diverged.mark_text(text="✕", fontSize=14, fontWeight="bold", dy=16)
        layers.append(cross.encode(y=alt.value(0), tooltip=about[:3]))
    return specification(layers, height=190)


def rung_dashes(count: int) -> list[list[int]]:
    """Dashes that grow with the rung; the last one is drawn through."""
    return [[2 + 3 * rung, 3] for rung in range(count - 1)] + [[1, 0]]


def shared_bounds(records: Sequence[Record]) -> tuple[float, float]:
    """Limits of the vertical axis over all arms: what was measured and 0, with a twentieth to spare. A rate that ruins
    the model, that is loses more than the best one gains, stands at the upper edge.
    """
    values = [record[key] for record in records for key in ("value", "low", "high") if record[key] is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    high = min(high, -low) if low < 0 else high
    spare = 0.05 * (high - low) or 0.01
    return low - spare, high + spare

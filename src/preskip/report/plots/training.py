"""Loss while training: by step, thinned to the page's budget and smoothed, and on development documents by tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import altair as alt

from preskip.report.plots.base import Record, Spec, chart, colour, dash, specification, tooltips, value_axis
from preskip.runs.schema import CurvePoint

POINT_BUDGET = 12_000  # training points in the whole page: about 1 MB
POINTS_PER_CURVE = 600
MOST_RAW = 4  # arms whose raw lines are drawn: more of them hide what they should show


def training_records(curves: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> list[Record]:
    """Loss per step, raw and smoothed, thinned to the page's budget by means over equal runs of steps."""
    limit = max(20, min(POINTS_PER_CURVE, POINT_BUDGET // max(1, len(curves))))
    records: list[Record] = []
    for arm, seed, lines in curves:
        smooth = smoothed([line.get("loss") for line in lines])
        width = -(-len(lines) // limit) if lines else 1
        for start in range(0, len(lines), width):
            window = range(start, min(start + width, len(lines)))
            losses = [lines[i]["loss"] for i in window if lines[i].get("loss") is not None]
            last = smooth[window[-1]]
            records.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "step": lines[window[-1]]["step"],
                    "loss": round(sum(losses) / len(losses), 5) if losses else None,
                    "smoothed": None if last is None else round(last, 5),
                }
            )
    return records


def evaluation_records(curves: Mapping[str, Mapping[str, Sequence[CurvePoint]]]) -> list[Record]:
    """Loss on development documents by tokens read: mean, lowest and highest over the seeds of each arm."""
    records: list[Record] = []
    for arm, seeds in curves.items():
        by_tokens: dict[int, list[float]] = {}
        for point in chain.from_iterable(seeds.values()):
            by_tokens.setdefault(point["tokens"], []).append(point["eval_loss"])
        for tokens, losses in sorted(by_tokens.items()):
            if len(losses) == len(seeds):
                shown = {"mean": sum(losses) / len(losses), "low": min(losses), "high": max(losses)}
                rounded = {key: round(value, 5) for key, value in shown.items()}
                records.append({"arm": arm, "tokens": tokens, "seeds": len(losses), **rounded})
    return records


def evaluation(records: Sequence[Record], arms: Sequence[str]) -> Spec:
    """Loss on development documents by tokens read: a line for the mean over seeds, a band from lowest to highest."""
    legend = alt.Legend(symbolOpacity=1)
    base = chart(records).encode(
        x=alt.X("tokens:Q", title="Training tokens", axis=alt.Axis(grid=False, tickCount=6, format="~s")),
        color=colour(arms, legend),
    )
    low, mean = (
        value_axis(field, "Loss on development documents, nats per token", zero=False) for field in ("low", "mean")
    )
    about = tooltips({"arm:N": "arm"}, {"tokens:Q": "tokens"}, ",")
    about += tooltips({}, {"mean:Q": "mean", "low:Q": "lowest", "high:Q": "highest"}, ".4f")
    layers = [
        base.mark_area(opacity=0.2, clip=True).encode(y=low, y2="high:Q"),
        base.mark_line(strokeWidth=2, opacity=0.9).encode(y=mean, strokeDash=dash(arms, legend), tooltip=about),
    ]
    return specification(layers, height=320)


def smoothed(losses: Sequence[float | None]) -> list[float | None]:
    """Exponential moving average over about a twentieth of the run (at least 5 steps), without bias at the start."""
    keep = 1 - 1 / max(5, len(losses) / 20)
    total = weight = 0.0
    result: list[float | None] = []
    for loss in losses:
        if loss is not None:
            total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        result.append(total / weight if weight else None)
    return result


def training(records: Sequence[Record], arms: Sequence[str]) -> Spec:
    """Training loss by step, smoothed: a line for the mean over seeds and a band from the lowest to the highest; of one
    seed and up to four arms thin raw lines, too.
    """
    legend = alt.Legend(symbolOpacity=1)
    base = chart(records).encode(
        x=alt.X("step:Q", title="Optimiser step", axis=alt.Axis(grid=False, tickCount=6, format="d")),
        color=colour(arms, legend),
    )
    raw, low, mean = (value_axis(field, "Loss, nats per token", zero=False) for field in ("loss", "low", "mean"))
    about = tooltips(
        {"arm:N": "arm", "step:Q": "step"}, {"mean:Q": "mean", "low:Q": "lowest", "high:Q": "highest"}, ".4f"
    )
    seeds = base.transform_aggregate(
        mean="mean(smoothed)", low="min(smoothed)", high="max(smoothed)", groupby=["arm", "step"]
    )
    layers = [seeds.mark_line(strokeWidth=2).encode(y=mean, strokeDash=dash(arms, legend), tooltip=about)]
    if len({record["seed"] for record in records}) > 1:
        layers.insert(0, seeds.mark_area(opacity=0.6 / max(3, len(arms)), clip=True).encode(y=low, y2="high:Q"))
    elif len({record["arm"] for record in records}) <= MOST_RAW:
        layers.insert(0, base.mark_line(strokeWidth=1, opacity=0.35, clip=True).encode(y=raw))
    return specification(layers, height=320)

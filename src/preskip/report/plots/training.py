"""Loss while training: by step, thinned to the page's budget and smoothed, and on development documents by tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.report.plots.base import Record, Spec, arm_colour, arm_dash, specification, tooltips

POINT_BUDGET = 12_000  # training points in the whole page: about 1 MB
POINTS_PER_CURVE = 600


def training_records(curves: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> list[Record]:
    """Loss per step, raw and smoothed, thinned to the page's budget by means over equal runs of steps.

    Args:
        curves: (arm, seed, lines of train.jsonl) per trained arm and seed.
    """
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


def evaluation_records(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[Record]:
    """Loss on development documents by tokens read: mean, lowest and highest over the seeds of each arm.

    Args:
        curves: {arm: {seed: [{"tokens", "eval_loss"}]}} as in the results of `preskip pretrain`.
    """
    records: list[Record] = []
    for arm, seeds in curves.items():
        by_tokens: dict[int, list[float]] = {}
        for points in seeds.values():
            for point in points:
                by_tokens.setdefault(point["tokens"], []).append(point["eval_loss"])
        records += [
            {
                "arm": arm,
                "tokens": tokens,
                "seeds": len(losses),
                "mean": round(sum(losses) / len(losses), 5),
                "low": round(min(losses), 5),
                "high": round(max(losses), 5),
            }
            for tokens, losses in sorted(by_tokens.items())
            if len(losses) == len(seeds)
        ]
    return records


def evaluation(records: Sequence[Record], arms: Sequence[str]) -> Spec:
    """Loss on development documents by tokens read: a line for the mean over seeds, a band from lowest to highest."""
    import altair as alt

    legend = alt.Legend(symbolOpacity=1)
    scale = alt.Scale(zero=False, nice=True)
    base = alt.Chart(alt.InlineData(values=list(records))).encode(
        x=alt.X("tokens:Q", title="Training tokens", axis=alt.Axis(grid=False, tickCount=6, format="~s")),
        color=arm_colour(arms, legend),
    )
    band = base.mark_area(opacity=0.2, clip=True).encode(
        y=alt.Y("low:Q", title="Loss on development documents, nats per token", scale=scale), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2, opacity=0.9).encode(
        y=alt.Y("mean:Q", title="Loss on development documents, nats per token", scale=scale),
        strokeDash=arm_dash(arms, legend),
        tooltip=[
            *tooltips({"arm:N": "arm", "tokens:Q": "tokens"}, ","),
            *tooltips({"mean:Q": "mean", "low:Q": "lowest", "high:Q": "highest"}, ".4f"),
        ],
    )
    return specification(alt.layer(band, line), height=320)


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
    """Training loss by step: thin raw lines (for up to four arms), strong smoothed ones, one line per seed."""
    import altair as alt

    legend = alt.Legend(symbolOpacity=1)
    base = alt.Chart(alt.InlineData(values=list(records))).encode(
        x=alt.X("step:Q", title="Optimiser step", axis=alt.Axis(grid=False, tickCount=6, format="d")),
        color=arm_colour(arms, legend),
        detail="seed:N",
    )
    scale = alt.Scale(zero=False, nice=True)
    layers = []
    if len({record["arm"] for record in records}) <= 4:  # more of them hide what they should show
        layers.append(
            base.mark_line(strokeWidth=1, opacity=0.35, clip=True).encode(
                y=alt.Y("loss:Q", title="Loss, nats per token", scale=scale)
            )
        )
    layers.append(
        base.mark_line(strokeWidth=2, opacity=0.9).encode(
            y=alt.Y("smoothed:Q", title="Loss, nats per token", scale=scale),
            strokeDash=arm_dash(arms, legend),
            tooltip=[
                *tooltips({"arm:N": "arm", "seed:N": "seed", "step:Q": "step"}),
                *tooltips({"loss:Q": "loss", "smoothed:Q": "smoothed"}, ".4f"),
            ],
        )
    )
    return specification(alt.layer(*layers), height=320)

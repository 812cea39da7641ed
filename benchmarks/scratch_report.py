"""What a study from scratch found: its tables, in Markdown, and the loss against cost.

    python benchmarks/scratch_report.py results/peers/llama-1m     # of a study that is finished; it trains nothing

Of a folder as `benchmarks/scratch_study.py` makes it for each architecture, which prints the same at its end: `study`,
`speed` and `rates.json`. What was asked of the peers before anything was trained (`QUESTIONS`) comes with p-values
corrected over them, and beside it, exploratory (†), what the development loss says. `FOLDER/loss.svg` is drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import altair as alt
from scratch_rates import rates_tried, tried

from preskip.errors import PreskipError
from preskip.report.load import load_json
from preskip.report.lookup import find
from preskip.report.pictures import picture
from preskip.report.plots.base import POINT, Record, chart, colour, shape, shown_arms, specification, value_axis
from preskip.report.table import NONE
from preskip.report.words.verdicts import MINUS, difference_text, mean_difference_texts, p_text
from preskip.runs.schema import MetricValue, Results
from preskip.stats.equal_harm import mean_difference
from preskip.stats.families import holm

ARMS = "base,base-wide,base-flops,canon-a,canon,value-residual,value-embed,nonlinear-q,gated-attention,preskip"
ARMS += ",base-wide+canon-a,preskip+canon-a,preskip+canon,preskip+value-residual,preskip+value-embed"
ARMS += ",preskip+nonlinear-q,preskip+gated-attention"
# Arm and reference: does a peer help alone, with the weights that it has; beside the branch; and the branch beside it?
QUESTIONS = [(peer, "base") for peer in ("canon-a", "canon", "value-residual", "nonlinear-q", "gated-attention")]
QUESTIONS += [("value-embed", "base-wide")]
QUESTIONS += [(arm, "preskip") for arm in ARMS.split(",") if arm.startswith("preskip+")]
QUESTIONS += [("preskip+canon-a", "base-wide+canon-a")]
# Of the held-out texts the one with speakers enough for a verdict.
SPEECHES = "sotu"
COSTS = {
    "parameters": "Weights",
    "training_flops": "Training FLOPs",
    "seconds": "Seconds of a training",
}


def main() -> int:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of one architecture")
    parser.add_argument("--arms", default=ARMS, help="that were asked for, those that were left out included")
    options = parser.parse_args()
    try:
        report(options.folder, options.arms.split(","))
    except PreskipError as error:
        parser.error(str(error))
    return 0


def report(folder: Path, arms: Sequence[str]) -> None:
    """Draw what a finished study of one architecture found, and print its tables.

    Args:
        folder: of the architecture; has its `study`, `speed` and `rates.json`.
        arms: that were asked for, those that were left out included.
    """
    results, alone = (load_json(folder / name / "results.json") for name in ("study", "speed"))
    rows = records(results, alone)
    (folder / "loss.svg").write_text(draw(rows), encoding="utf-8")
    print(f"{folder.name}, {folder / 'loss.svg'}\n\n{table(rows, results, rates_tried(folder))}\n", flush=True)
    if answered := questions(results, arms):
        print(f"{answered}\n", flush=True)
    for note in results.get("notes", ()):
        print(note, flush=True)


def records(results: Results, alone: Results) -> list[Record]:
    """An arm each: its costs, and its loss on development documents over the seeds.

    Args:
        results: of the study.
        alone: of the trainings that measure the speed.
    """
    rows = []
    for arm, summary in results["arms"].items():
        curves = results["curves"][arm].values()
        losses = [points[-1]["eval_loss"] for points in curves]
        speed = alone["arms"][arm]["tokens_per_second"]
        assert speed  # every arm is trained
        rows.append(
            {
                "arm": arm,
                **{key: summary[key] for key in ("parameters", "training_flops", "learning_rate")},
                "seconds": summary["tokens"] / speed,
                "seeds": len(losses),
                "loss": statistics.fmean(losses),
                "low": min(losses),
                "high": max(losses),
            }
        )
    return rows


def draw(rows: Sequence[Record]) -> str:
    """Loss against weights, FLOPs and time: means over seeds, lines from the lowest to the highest."""
    arms = [row["arm"] for row in rows]
    figures = []
    for key, title in COSTS.items():
        x = alt.X(
            f"{key}:Q", title=title, scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(format="~s", tickCount=5)
        )
        legend = shown_arms(arms, rows, 110)
        legend.columns = 6  # 17 arms in one row are twice as wide as the panels
        base = chart(rows).encode(x=x, color=colour(arms, legend))
        loss, low = (value_axis(field, "Development loss, nats per token", zero=False) for field in ("loss", "low"))
        marks = base.mark_point(size=160, **POINT).encode(y=loss, shape=shape(arms, legend))
        layers = [base.mark_rule(strokeWidth=2).encode(y=low, y2="high:Q"), marks]
        figures.append({"title": title, "spec": specification(layers, height=320)})
    return picture(figures, columns=len(figures), shared=True)


def table(rows: Sequence[Record], results: Results, losses: Mapping[str, Mapping[int, float]]) -> str:
    """The same in Markdown, the lowest loss first, with the rates that were tried and what held-out text takes."""
    sets = [name for name, described in results["sets"].items() if described["kind"] == "document"]
    headings = ["arm", "lr, from those tried", "weights", "PFLOP", "seconds", "seeds", "loss, lowest to highest"]
    headings += [f"{name}, bits per byte [95 %]" for name in sets]
    lines = []
    for row in sorted(rows, key=lambda row: row["loss"]):
        cells = (
            f"`{row['arm']}`",
            f"{row['learning_rate']:g} from {tried(losses[row['arm']])}",
            f"{row['parameters']:,}",
            f"{row['training_flops'] / 1e15:.3g}",
            f"{row['seconds']:.0f}",
            f"{row['seeds']}",
            f"{row['loss']:.4f}, {row['low']:.4f} to {row['high']:.4f}",
            *map(limits, (results["arms"][row["arm"]]["metrics"][name].get("bits_per_byte") for name in sets)),
        )
        lines.append(cells)
    return markdown(headings, lines)


def questions(results: Results, arms: Sequence[str]) -> str:
    """The questions about these arms, on the speeches, in Markdown; "" where none can be answered.

    A question whose arm was left out, as it diverged, counts as p = 1: the family does not shrink after the fact.
    """
    asked = [pair for pair in QUESTIONS if {*pair} <= {*arms}] if SPEECHES in results["sets"] else []
    found = [find(results, *pair, SPEECHES) for pair in asked]
    p_values = [1.0 if pair is None or pair["p_value"] is None else pair["p_value"] for pair in found]
    if not any(found):
        return ""
    headings = [f"asked before training, {SPEECHES}", "seeds", "difference [95 %]", f"p after Holm over {len(asked)}"]
    headings.append("development loss, nats [95 %] †")
    lines: list[Sequence[str]] = []
    for (arm, reference), pair, p in zip(asked, found, holm(p_values), strict=True):
        if pair is None:
            lines.append((f"`{arm}` {MINUS} `{reference}`", NONE, "not trained", "1", NONE))
            continue
        shown = difference_text(pair)
        names = f"`{pair['arm']}` {MINUS} `{pair['reference']}`"
        loss = development(results, pair["arm"], pair["reference"])
        lines.append((names, str(pair["seeds"]), f"{shown['value']} {shown['interval']}", p_text(p), loss))
    return markdown(headings, lines)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def development(results: Results, arm: str, reference: str) -> str:
    """The difference of two arms' last development losses and Student's interval over seeds: exploratory, since rates
    were chosen on these blocks and no other text is in the interval; "–" for fewer than two seeds.
    """
    losses = [
        {seed: points[-1]["eval_loss"] for seed, points in results.get("curves", {}).get(one, {}).items()}
        for one in (arm, reference)
    ]
    value, limits, _ = mean_difference_texts(mean_difference(*losses))
    return value if value == NONE else f"{value} {limits}"


def limits(found: MetricValue | None) -> str:
    """A value and its interval."""
    return NONE if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    sys.exit(main())

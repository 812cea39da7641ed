"""What every arm gains in-domain at each harm out of domain, from the rates that a run's search tried: a picture.

    python benchmarks/equal_harm_figure.py docs/confirmatory-equal-harm.svg results/confirmatory-smollm2-wikitext2

A line is the mean over the seeds of an arm, of the best for up to each harm (`preskip.stats.equal_harm`), drawn where
the rates of every seed tell. All is measured on development texts, after the steps of the search's last rung; the
dashed line is the declared limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import altair as alt
import numpy as np

from preskip.report.load import load_json
from preskip.report.lookup import trained_arms
from preskip.report.pictures import picture
from preskip.report.plots.base import Record, chart, colour, dash, once, shown_arms, specification, value_axis
from preskip.runs.schema import Results
from preskip.stats.equal_harm import changes_at

HARMS = np.linspace(-0.03, 0.05, 81)


def records(results: Results, harms: Sequence[float] | np.ndarray = HARMS) -> list[Record]:
    """A point per arm and harm of which every seed's rates tell: the mean gain in bits per byte."""
    found = []
    for arm in trained_arms(results):
        for harm in harms if arm in results["search"] else ():
            changes = list(changes_at(results["search"][arm], float(harm)).values())
            known = [change for change in changes if change is not None]
            if len(known) == len(changes):
                found.append({"arm": arm, "harm": float(harm), "gain": -fmean(known)})
    return found


def draw(results: Results, limit: float) -> str:
    """The picture as SVG."""
    rows, arms = records(results), trained_arms(results)
    legend = shown_arms(arms, rows, 110)
    source = chart(rows)
    x = alt.X("harm:Q", title="Harm: bits per byte lost out of domain", scale=alt.Scale(nice=True))
    y = value_axis("gain", "Gain: bits per byte saved in-domain → better", zero=False)
    lines = source.mark_line(strokeWidth=2.5).encode(
        x=x, y=y, color=colour(arms, legend), strokeDash=dash(arms, legend)
    )
    allowed = once(source).mark_rule(strokeDash=[4, 3]).encode(x=alt.datum(limit))
    spec = specification([allowed, lines], height=340)
    return picture([{"title": "Development texts, mean over seeds", "spec": spec}], columns=1, shared=True)


def main() -> None:
    """Read a run and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    results, manifest = (load_json(options.run / f"{name}.json") for name in ("results", "run"))
    options.picture.write_text(draw(results, manifest["config"]["lr_harm"]), encoding="utf-8")


if __name__ == "__main__":
    main()

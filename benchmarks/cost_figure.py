"""Quality against decoding cost, one point per form, with the base and merged LoRA on it.

    preskip bench smollm2 --work decode --batch 1 --json > bench.json
    preskip compare BASE_EVAL INT8_EVAL --json > int8.json          # optional: what int8 weights cost
    python benchmarks/cost_figure.py cost.svg bench.json RUN --set wikitext2 [--int8 int8.json]

RUN is a finished probe with the arms none, preskip, lora and any of preskip-lowrank, preskip-late and skip. Across:
seconds of a decoding step over the base's, with the middle half of the paired rounds. Up: bits per byte over the
base's, with its 95 % interval; down is better. Arms train on equal parameter budgets, so the cheap forms need a run
with `--match none` to have the size that the bench has timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# The row of the bench that decodes as the arm of the probe does, in the form that is cheapest to run.
ROW_OF = {
    "none": "base",
    "preskip": "optimized",
    "lora": "lora-merged",
    "preskip-lowrank": "low-rank",
    "preskip-late": "last-quarter",
    "skip": "skip",
}


def points(bench: dict[str, Any], results: dict[str, Any], name: str, int8: dict[str, Any] | None) -> list[dict]:
    """One record per form that both files have: its cost and its quality with their intervals.

    Raises:
        ValueError: the bench has no decoding, or the run does not compare this set.
    """
    decode = next((work for work in bench["work"] if work["work"] == "decode"), None)
    if decode is None:
        raise ValueError("the bench has timed no decoding")
    found = [{"arm": "base", "x": 1.0, "x_low": 1.0, "x_high": 1.0, "y": 0.0, "y_low": 0.0, "y_high": 0.0}]
    compared = [
        entry
        for entry in results["comparisons"]
        if (entry["reference"], entry["set"], entry["metric"]) == ("none", name, "bits_per_byte")
    ]
    if not compared:
        raise ValueError(f"the run does not compare bits per byte on {name!r} with the untouched model")
    for entry in compared:
        cost = decode["rows"].get(ROW_OF.get(entry["arm"], ""))
        if cost is not None:
            found.append(_point("LoRA, merged" if entry["arm"] == "lora" else entry["arm"], cost, entry))
    if int8 is not None and "int8" in decode["rows"]:
        price = next(e for e in int8["comparisons"] if (e["set"], e["metric"]) == (name, "bits_per_byte"))
        full = next(entry for entry in compared if entry["arm"] == "preskip")
        shifted = {key: full["difference"] + price[key] for key in ("difference", "low", "high")}
        found.append(_point("preskip, int8", decode["rows"]["int8"], shifted))
    return found


def _point(label: str, cost: dict[str, Any], quality: dict[str, Any]) -> dict[str, Any]:
    across = {"x": cost["ratio"], "x_low": cost["ratio_low"], "x_high": cost["ratio_high"]}
    return {"arm": label, **across, "y": quality["difference"], "y_low": quality["low"], "y_high": quality["high"]}


def draw(records: list[dict[str, Any]], name: str) -> str:
    """The figure as SVG."""
    import altair as alt

    from preskip.report.pictures import picture
    from preskip.report.plots.base import colour, shape

    names = [record["arm"] for record in records]
    across = alt.X("x:Q", title="Time per decoded token over the base's", scale=alt.Scale(zero=False, padding=20))
    up = alt.Y("y:Q", title=f"Bits per byte over the base's, {name}", scale=alt.Scale(zero=False, padding=20))
    chart = alt.Chart(alt.Data(values=records))
    layers = (
        chart.mark_rule().encode(across, alt.Y("y_low:Q"), alt.Y2("y_high:Q"), colour(names)),
        chart.mark_rule().encode(alt.X("x_low:Q"), alt.X2("x_high:Q"), up, colour(names)),
        chart.mark_point(filled=True, size=90, opacity=1).encode(across, up, colour(names), shape(names)),
        chart.mark_text(align="left", dx=8, dy=-8, fontSize=13).encode(across, up, alt.Text("arm:N")),
    )
    return picture([{"title": "Quality against decoding cost", "spec": alt.layer(*layers).to_dict()}], height=420)


def main() -> None:
    """Read the files and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("bench", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", default="wikitext2")
    parser.add_argument("--int8", type=Path)
    given = parser.parse_args()
    bench, results = json.loads(given.bench.read_text()), json.loads((given.run / "results.json").read_text())
    try:
        records = points(bench, results, given.set, json.loads(given.int8.read_text()) if given.int8 else None)
    except ValueError as error:
        parser.error(str(error))
    given.picture.write_text(draw(records, given.set), encoding="utf-8")


if __name__ == "__main__":
    main()

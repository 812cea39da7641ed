"""Quality against decoding cost, one point per form, with the base and merged LoRA on it; and the table beside it.

    preskip bench smollm2 --dtype bfloat16 --work decode --batch 1 --cache dynamic --rounds 25 --json \
--rows base,optimized,lora-merged,int8,low-rank,bottleneck,last-third,last-quarter,skip > results/cheap-forms/bench.json
    python benchmarks/cheap_forms.py RUN QUALITY     # results/cheap-forms/quality.json
    python benchmarks/cost_figure.py docs/cheap-forms.svg results/cheap-forms/bench.json QUALITY

QUALITY may be the results.json of any probe with the arms none and preskip; arms that the bench has no row for
are left out. Across: time of a decoding step over the base's, with the middle half of the paired rounds. Up: bits per
byte over the base's, with its 95 % interval; down is better. The table is printed, as docs/bench.md has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preskip.bench.settings import CHEAP
from preskip.errors import PreskipError
from preskip.report.words.verdicts import difference_text

# The row of the bench that decodes as the arm of the probe does, in the form that is cheapest to run.
ROW_OF = {"preskip": "optimized", "lora": "lora-merged", "preskip-int8": "int8", **{a: row for row, a in CHEAP.items()}}
RATIO, DIFFERENCE = ("ratio", "ratio_low", "ratio_high"), ("difference", "low", "high")
LABELS = {"lora": "LoRA, merged", "preskip-int8": "preskip, int8"}


def points(bench: dict[str, Any], quality: dict[str, Any], name: str | None = None) -> list[dict[str, Any]]:
    """One record per form that both files have: cost and quality with their intervals.

    Args:
        bench: what `preskip bench --json` prints.
        quality: with `comparisons`, as benchmarks/cheap_forms.py and probes write them.
        name: the set whose bits per byte are taken; None for the only one.

    Raises:
        PreskipError: the bench has timed no decoding, the run does not compare this set, or it has several.
    """
    decode = _decode(bench)
    against = list(_compared(quality, "none"))
    sets = sorted({entry["set"] for entry in against})
    if name is None and len(sets) != 1:
        raise PreskipError(f"the sets are {', '.join(sets) or 'none'}: name one with --set")
    name = name or sets[0]
    if name not in sets:
        raise PreskipError(f"bits per byte on {name!r} are not compared with the untouched model's: choose of {sets}")
    found = [{"arm": "base", "x": 1.0, "x_low": 1.0, "x_high": 1.0, "y": 0.0, "y_low": 0.0, "y_high": 0.0}]
    for entry in against:
        row = ROW_OF.get(entry["arm"])
        if entry["set"] == name and row in decode:
            cost = {x: decode[row][key] for x, key in zip(("x", "x_low", "x_high"), RATIO, strict=True)}
            up = {y: entry[key] for y, key in zip(("y", "y_low", "y_high"), DIFFERENCE, strict=True)}
            found.append({"arm": LABELS.get(entry["arm"], entry["arm"]), **cost, **up})
    return found


def table(bench: dict[str, Any], quality: dict[str, Any]) -> str:
    """Markdown: of each form its branch, its price in bits per byte, and its decoding against what is owed."""
    decode, weights = _decode(bench), quality["weights"]
    price = {entry["arm"]: entry for entry in _compared(quality, "preskip")}
    lines: list[Sequence[str]] = [
        ("arm", "row of the bench", "weights", "bits/byte − base's", "price: − `preskip`'s", "decode ratio", "owed"),
        ("---",) * 7,
    ]
    for entry in _compared(quality, "none"):
        arm, row = entry["arm"], ROW_OF.get(entry["arm"], "")
        cost = decode.get(row)
        lines.append(
            (
                f"`{arm}`" if arm != "preskip-int8" else "`preskip` baked to int8",
                f"`{row}`",
                f"{weights[arm] / 1e6:.1f}M",
                _difference(entry),
                _difference(price[arm]) if arm in price else "–",
                f"{cost['ratio']:.2f} ({cost['ratio_low']:.2f} to {cost['ratio_high']:.2f})" if cost else "–",
                f"{cost['ratio_owed']:.3f}" if cost else "–",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _decode(bench: dict[str, Any]) -> dict[str, Any]:
    work = next((work for work in bench["work"] if work["work"] == "decode"), None)
    if work is None:
        raise PreskipError("the bench has timed no decoding")
    return work["rows"]


def _compared(quality: dict[str, Any], reference: str) -> Iterator[dict[str, Any]]:
    for entry in quality["comparisons"]:
        if (entry["reference"], entry["metric"]) == (reference, "bits_per_byte"):
            yield entry


def _difference(entry: dict[str, Any]) -> str:
    shown = difference_text(entry)
    return f"{shown['value']} {shown['interval']}"


def draw(records: list[dict[str, Any]]) -> str:
    """The figure as SVG."""
    import altair as alt

    from preskip.report.pictures import picture
    from preskip.report.plots.base import colour, shape

    names = [record["arm"] for record in records]
    axis, scale = alt.Axis(tickCount=8), alt.Scale(zero=False, padding=30)
    across = alt.X("x:Q", title="Time per decoded token over the base's", axis=axis, scale=scale)
    up = alt.Y("y:Q", title="Bits per byte minus the base's", scale=alt.Scale(zero=False, padding=20))
    chart = alt.Chart(alt.Data(values=records))
    below = alt.datum.arm == LABELS["preskip-int8"]  # it lies beside preskip
    layers = (
        chart.mark_rule().encode(across, alt.Y("y_low:Q"), alt.Y2("y_high:Q"), colour(names)),
        chart.mark_rule().encode(alt.X("x_low:Q"), alt.X2("x_high:Q"), up, colour(names)),
        chart.mark_point(filled=True, size=90, opacity=1).encode(across, up, colour(names), shape(names)),
        *(
            chart.mark_text(fontSize=13, **where).encode(across, up, alt.Text("arm:N")).transform_filter(chosen)
            for where, chosen in (
                ({"align": "left", "dx": 8, "dy": -8}, ~below),
                ({"align": "right", "dx": -8, "dy": 14}, below),
            )
        ),
    )
    return picture([{"title": "Quality against decoding cost", "spec": alt.layer(*layers).to_dict()}], height=420)


def main() -> None:
    """Read the files, draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("bench", type=Path)
    parser.add_argument("quality", type=Path)
    parser.add_argument("--set")
    given = parser.parse_args()
    bench, quality = (json.loads(path.read_text(encoding="utf-8")) for path in (given.bench, given.quality))
    try:
        given.picture.write_text(draw(points(bench, quality, given.set)), encoding="utf-8")
    except PreskipError as error:
        parser.error(str(error))
    if "weights" in quality:
        print(table(bench, quality))


if __name__ == "__main__":
    main()

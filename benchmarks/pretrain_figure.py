"""Loss curves of a run of `preskip pretrain` as SVG: means over seeds with bands from lowest to highest.

    python benchmarks/pretrain_figure.py RUN docs/pretraining-books.svg

Left the whole training, right its second half, where the arms differ by less. Needs `preskip[report]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from preskip.report.load import load_json
from preskip.report.plots.training import evaluation, evaluation_records

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#6b7280"]


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    import vl_convert

    results = load_json(options.run / "results.json")
    arms, records = list(results["arms"]), evaluation_records(results["curves"])
    half = max(record["tokens"] for record in records) / 2
    panels = []
    for rows in (records, [record for record in records if record["tokens"] >= half]):
        panel = evaluation(rows, arms)
        panel["width"] = 340
        panels.append(panel)
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "hconcat": panels,
        "config": {
            "background": "white",
            "font": "DejaVu Sans, sans-serif",
            "range": {"category": COLOURS},
            "view": {"stroke": None},
            "axis": {"gridColor": "#e5e7eb"},
        },
    }
    options.out.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")


if __name__ == "__main__":
    main()

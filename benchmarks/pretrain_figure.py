"""Loss curves of a run of `preskip pretrain` as SVG: means over seeds with bands from lowest to highest.

    python benchmarks/pretrain_figure.py RUN docs/pretraining-books.svg

Left the whole training, right its second half, where the arms differ by less. Needs `preskip[report]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from preskip.report.load import load_json
from preskip.report.pictures import picture
from preskip.report.plots.training import evaluation, evaluation_records


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    results = load_json(options.run / "results.json")
    arms, records = list(results["arms"]), evaluation_records(results["curves"])
    half = max(record["tokens"] for record in records) / 2
    later = [record for record in records if record["tokens"] >= half]
    panels = {"the whole training": records, "its second half": later}
    figures = [{"title": title, "spec": evaluation(rows, arms)} for title, rows in panels.items()]
    options.out.write_text(picture(figures, shared=True), encoding="utf-8")


if __name__ == "__main__":
    main()

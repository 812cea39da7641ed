"""In-domain gain against out-of-domain change, a panel for each run and set: pictures of docs/results.md and its kin.

    python benchmarks/results_figure.py docs/standard-runs.svg results/standard-{wikitext2,books}

From results.json, and run.json for the model's name. Every mark is an arm against the untouched model, with its 95 %
intervals; the untouched model stands where the lines cross. Up and right is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from preskip.report.load import load_json
from preskip.report.pictures import picture
from preskip.report.plots.plane import plane, plane_records
from preskip.report.words.frontier import planes
from preskip.report.words.verdicts import set_label
from preskip.runs.schema import Results


def differences(
    results: Results, arm: str, in_domain: str, out_of_domain: str
) -> dict[str, tuple[float, float, float]]:
    """Gain (positive is better) of an arm over the untouched model on both sets: value, low, high, as shown."""
    [mark] = [row for row in _tested(results, in_domain, out_of_domain) if row["arm"] == arm]
    return {
        name: (mark[axis], mark[f"{axis}_low"], mark[f"{axis}_high"])
        for name, axis in ((in_domain, "x"), (out_of_domain, "y"))
    }


def _tested(results: Results, in_domain: str, out_of_domain: str) -> list[dict]:
    return [row for row in plane_records(results, in_domain, out_of_domain) if row["part"] == "test"]


def draw(runs: Sequence[Results], models: Sequence[str]) -> str:
    """The figure as SVG: a row of panels for each run's results.json; where each run has one panel, two or three a row.

    Args:
        runs: the results.
        models: what each was trained on top of; where they differ, panels name them.
    """
    of = [f"{model}, " if len(set(models)) > 1 else "" for model in models]
    figures = [
        {
            "title": f"{model}trained on {set_label(results['sets'], in_domain)}",
            "spec": plane(_tested(results, in_domain, out_of_domain), results, in_domain, out_of_domain),
        }
        for model, results in zip(of, runs, strict=True)
        for in_domain, out_of_domain in planes(results)
    ]
    own = len(planes(runs[0]))
    columns = own if own > 1 else 3 if len(figures) % 2 else 2
    return picture(figures, columns=columns, height=300, shared=True)


def main() -> None:
    """Read the runs and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    models = [load_json(run / "run.json")["model"]["name"].removesuffix(".gguf") for run in options.runs]
    results = [load_json(run / "results.json") for run in options.runs]
    options.picture.write_text(draw(results, models), encoding="utf-8")


if __name__ == "__main__":
    main()

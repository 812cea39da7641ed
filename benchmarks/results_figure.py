"""In-domain gain against out-of-domain change of every arm, a panel for each run and other set (docs/results.md).

    python benchmarks/results_figure.py docs/results.svg results/standard-wikitext2 results/standard-books

From results.json alone. Every mark is an arm against the untouched model, with its 95 % intervals; the untouched model
stands where the lines cross. Up and right is better. A filled mark is declared on both axes, a hollow one exploratory.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preskip.metrics import metric_named
from preskip.report.frontier import planes
from preskip.report.load import load_json
from preskip.report.lookup import find, is_declared, plain_arm, primary, trained_arms
from preskip.report.static_figures import STYLE, WIDTH
from preskip.report.verdicts import set_label

# Okabe and Ito's palette, and a mark for each arm as well.
LOOKS = {
    "preskip": ("#0072b2", "o"),
    "preproj": ("#e69f00", "s"),
    "skip": ("#009e73", "^"),
    "content": ("#cc79a7", "D"),
    "parallel": ("#d55e00", "v"),
    "lora": ("#1f2937", "P"),
    "layernorm": ("#56b4e9", ">"),
}


def differences(results: Mapping[str, Any], arm: str, set_name: str) -> tuple[float, float, float]:
    """Gain (positive is better) of an arm over the untouched model: value, low, high, as shown."""
    metric = primary(results, set_name)
    entry = find(results, arm, plain_arm(results), set_name, metric)
    about = metric_named(metric, results["sets"][set_name])
    factor = -about.factor if about.lower_is_better else about.factor
    low, high = sorted((factor * entry["low"], factor * entry["high"]))
    return factor * entry["difference"], low, high


def _declared(results: Mapping[str, Any], arm: str, set_name: str) -> bool:
    entry = find(results, arm, plain_arm(results), set_name, primary(results, set_name))
    return entry is not None and is_declared(entry)


def _axis(results: Mapping[str, Any], set_name: str) -> str:
    about = metric_named(primary(results, set_name), results["sets"][set_name])
    gain = "bits per byte saved" if about.lower_is_better else f"{about.difference_unit.strip()} gained"
    return f"{set_label(results['sets'], set_name)}: {gain} →"


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure.

    Args:
        runs: content of results.json, a row of panels for each.
        path: of the picture; its suffix says the format.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    columns = max(len(planes(results)) for results in runs)
    with mpl.rc_context({**STYLE, "axes.grid": False, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, grid = pyplot.subplots(len(runs), columns, figsize=(WIDTH + 1, 2.7 * len(runs)), squeeze=False)
        for row, results in zip(grid, runs, strict=True):
            for axes, (own, other) in zip(row, planes(results), strict=False):
                for place in (axes.axhline, axes.axvline):
                    place(0, color="#6b7280", linewidth=0.8, linestyle=(0, (3, 2)))
                for arm in trained_arms(results):
                    (x, *ends_x), (y, *ends_y) = (differences(results, arm, name) for name in (own, other))
                    colour, mark = LOOKS[arm]
                    declared = all(_declared(results, arm, name) for name in (own, other))
                    spread = [[[x - ends_x[0]], [ends_x[1] - x]], [[y - ends_y[0]], [ends_y[1] - y]]]
                    axes.errorbar(
                        x, y, xerr=spread[0], yerr=spread[1], color=colour, marker=mark, markersize=6, linewidth=1.2,
                        markerfacecolor=colour if declared else "white", markeredgecolor=colour, markeredgewidth=1.2,
                        label=arm,
                    )  # fmt: skip
                axes.set_title(f"trained on {set_label(results['sets'], own)}")
                axes.set_xlabel(_axis(results, own))
                axes.set_ylabel(_axis(results, other))
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def main() -> None:
    """Read the runs and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    draw([load_json(run / "results.json") for run in options.runs], options.picture)


if __name__ == "__main__":
    main()

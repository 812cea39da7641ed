"""Every arm's in-domain gain and out-of-domain change in several runs, as the two Markdown tables of docs/results.md.

    python benchmarks/results_overview.py results/confirmatory-{smollm2-wikitext2,smollm2-books24}

From results.json, and run.json for the model's name; against the untouched model, in bits per byte.
tests/report/test_results_page.py holds the page to these tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preskip.report.load import load_json
from preskip.report.lookup import find, plain_arm, trained_arms
from preskip.report.words.verdicts import limits_text, number, set_label
from preskip.runs.schema import Domain, Results

RIVAL = "lora"


def tables(runs: Sequence[tuple[str, Results]]) -> Iterator[tuple[str, str]]:
    """Heading and Markdown of each table: a row per arm, a column per run, which is given with its model's name."""
    headings = [f"{model}, {set_label(results['sets'], _set_of(results, 'in'))}" for model, results in runs]
    arms = list(dict.fromkeys(arm for _, results in runs for arm in trained_arms(results)))
    for heading, cell in (("In-domain gain", _gain), ("Out-of-domain change", _harm)):
        rows = [(f"`{arm}`", *(cell(results, arm) for _, results in runs)) for arm in arms]
        lines = [("arm", *headings), ["---"] * (len(headings) + 1), *rows]
        yield heading, "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _set_of(results: Results, domain: Domain) -> str:
    return next(name for name, entry in results["sets"].items() if entry["domain"] == domain)


def _against_plain(results: Results, arm: str, domain: Domain) -> Mapping[str, Any] | None:
    return find(results, arm, plain_arm(results), _set_of(results, domain))


def _gain(results: Results, arm: str) -> str:
    """What it has less than the untouched model, and as a share of LoRA's."""
    found, rival = (_against_plain(results, name, "in") for name in (arm, RIVAL))
    if found is None or rival is None:
        return "–"
    return f"{number(-found['difference'], 3)} ({100 * found['difference'] / rival['difference']:.0f} %)"


def _harm(results: Results, arm: str) -> str:
    """What it has more than the untouched model, with the interval."""
    found = _against_plain(results, arm, "out")
    if found is None:
        return "–"
    return f"{number(found['difference'], 3, sign=True)} {limits_text(found['low'], found['high'], 3)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    runs = []
    for run in options.runs:
        results, manifest = (load_json(run / f"{name}.json") for name in ("results", "run"))
        runs.append((manifest["model"]["name"].removesuffix(".gguf"), results))
    for heading, table in tables(runs):
        print(f"{heading}:\n\n{table}\n")


if __name__ == "__main__":
    main()

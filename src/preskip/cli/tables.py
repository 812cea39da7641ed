"""The final table of a probe in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from preskip.report.verdicts import outcome

WIDTH = 90
UNITS = {"bits_per_byte": "bits/byte", "last_word_accuracy": "last word"}


def print_results(results: dict[str, Any], run: Path, page: Path | None) -> None:
    """Print what a run found: a row per arm, then the paired differences.

    Args:
        results: content of results.json.
        run: the run directory.
        page: its HTML page, or None.
    """
    console = Console()
    # Too narrow a terminal wraps lines; cutting figures off would be worse.
    console.width = max(console.width, WIDTH)
    evaluation = results["evaluation"]
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for heading in ("weights", "lr", "bits/byte", "word ppl", "last word", "s/step", "GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, arm in results["arms"].items():
        metrics = arm["metrics"]
        table.add_row(
            name,
            f"{arm['trainable_parameters'] / 1e6:.3f}M" if arm["trainable_parameters"] else "0",
            f"{arm['learning_rate']:g}" if arm["learning_rate"] else "–",
            _figure(metrics.get("bits_per_byte"), "{:.4f}"),
            _perplexity(metrics.get("word_perplexity")),
            _figure(metrics.get("last_word_accuracy"), "{:.1%}"),
            f"{arm['seconds_per_step']:.2f}" if arm["seconds_per_step"] else "–",
            f"{arm['peak_memory_bytes'] / 2**30:.2f}",
        )
    console.print(table)
    differences = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    differences.add_column("paired", no_wrap=True)
    for heading in ("", "difference [95 % interval]", "p", "reading"):
        differences.add_column(heading, justify="left" if heading in ("", "reading") else "right", no_wrap=True)
    for entry in results["comparisons"]:
        shown = "{:+.1%}" if entry["metric"] == "last_word_accuracy" else "{:+.4f}"
        low, high = shown.format(entry["low"]), shown.format(entry["high"])
        differences.add_row(
            f"{entry['arm']} − {entry['reference']}",
            UNITS[entry["metric"]],
            f"{shown.format(entry['difference'])} [{low}, {high}]",
            f"{entry['p_value']:.3g}" if entry["p_value"] is not None else "",
            outcome(entry),
        )
    if results["comparisons"]:
        console.print(differences)
    seeds = max(len(arm["seeds"]) for arm in results["arms"].values())
    covers = "documents only, not training randomness (one seed)" if seeds == 1 else f"{seeds} seeds and documents"
    lines = [
        f"held-out: {evaluation['documents']} documents, {evaluation['tokens']:,} tokens, context "
        f"{evaluation['context_length']}"
    ]
    if evaluation["last_word_items"]:
        lines[0] += f"; {evaluation['last_word_items']} items of {evaluation['last_word_name']}"
    if results["comparisons"]:
        test = "; p is the exact McNemar test" if evaluation["last_word_items"] else ""
        lines.append(f"intervals cover {covers}{test}")
    console.print(
        "\n".join(lines),
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"run: {run}" + (f"\nreport: {page}" if page else ""), highlight=False, soft_wrap=True)


def _perplexity(metric: dict[str, float] | None) -> str:
    # Beyond this, as from a random model, decimals only widen the table.
    return _figure(metric, "{:.2f}" if metric is None or metric["value"] < 1e5 else "{:.2e}")


def _figure(metric: dict[str, float] | None, form: str) -> str:
    return form.format(metric["value"]) if metric is not None else "–"

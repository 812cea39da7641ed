"""`preskip power`: what a planned design, or a run, can resolve, and what a difference needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preskip.errors import PreskipError

if TYPE_CHECKING:
    from preskip.stats import Design

DESIGN = "A planned design"


def power(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(help="A run directory. Without it: a planned design.", show_default=False)
    ] = None,
    items: Annotated[
        int | None, typer.Option("--items", help="Items scored right or wrong.", rich_help_panel=DESIGN)
    ] = None,
    documents: Annotated[
        int | None, typer.Option("--documents", help="Documents scored in bits per byte.", rich_help_panel=DESIGN)
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Training seeds.", rich_help_panel=DESIGN)] = 1,
    discordant: Annotated[
        float, typer.Option("--discordant", help="Share of items on which two arms differ.", rich_help_panel=DESIGN)
    ] = 0.1,
    sd: Annotated[
        float | None,
        typer.Option(
            "--sd", help="SD over units of one seed's paired difference. Default: as assumed.", rich_help_panel=DESIGN
        ),
    ] = None,
    seed_sd: Annotated[
        float | None,
        typer.Option("--seed-sd", help="SD over seeds of the difference. Default: as assumed.", rich_help_panel=DESIGN),
    ] = None,
    shared: Annotated[
        float,
        typer.Option("--shared", help="Part of the units' variance that all seeds share.", rich_help_panel=DESIGN),
    ] = 0.5,
    family: Annotated[int, typer.Option("--family", help="Comparisons declared (Holm).", rich_help_panel=DESIGN)] = 1,
    difference: Annotated[
        float | None,
        typer.Option("--difference", help="True difference to find: 0.01 is one point, or 0.005 bits per byte."),
    ] = None,
    wanted: Annotated[float, typer.Option("--power", help="Probability of finding it.")] = 0.8,
    alpha: Annotated[float, typer.Option("--alpha", help="Level of the two-sided test.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say how small a difference is found, and how many items and seeds find a given one.

    For a planned design (--items or --documents), or for the comparisons of a run, from its measured spread.
    """
    if run is not None:
        _refuse_design_options(context)
        rows = _of_run(run, difference, wanted, alpha)
    else:
        design, metric = _planned(items, documents, seeds, discordant, sd, seed_sd, shared)
        rows = [_row({"metric": metric, "family": family, "basis": "assumed"}, design, difference, wanted, alpha)]
    if as_json:
        print(json.dumps({"power": wanted, "alpha": alpha, "designs": rows}, indent=1, allow_nan=False))
    else:
        _print(rows, wanted, alpha)


def _planned(
    items: int | None,
    documents: int | None,
    seeds: int,
    discordant: float,
    sd: float | None,
    seed_sd: float | None,
    shared: float,
) -> tuple[Design, str]:
    from preskip.metrics import METRICS
    from preskip.stats import Design
    from preskip.stats.power import discordant_deviation

    if (items is None) == (documents is None):
        raise PreskipError("give --items or --documents for a planned design, or a run directory")
    assumed = METRICS["acc" if items is not None else "bits_per_byte"]
    if sd is None:
        sd = discordant_deviation(discordant) if items is not None else assumed.unit_deviation or 0.0
    return (
        Design.assumed(
            units=items or documents or 0,
            seeds=seeds,
            deviation=sd,
            seed_deviation=assumed.seed_deviation if seed_sd is None else seed_sd,
            shared=shared,
        ),
        assumed.key,
    )


def _of_run(run: Path, difference: float | None, wanted: float, alpha: float) -> list[dict[str, Any]]:
    """The declared comparisons of a run, or all where none was declared."""
    from preskip.runs.stored import load_runs
    from preskip.stats import compare_arms
    from preskip.stats.power import measured_design

    stored = load_runs([run], allow_different_dtype=True)
    entries = compare_arms(stored.items, stored.family)
    if not entries:
        raise PreskipError(f"{run} has one finished arm, {next(iter(stored.items))}, and nothing to compare: finish it")
    declared = [entry for entry in entries if entry["declared"]]
    size = max(1, len(stored.family.get("declared", ())))
    return [
        _row(
            {
                **{key: entry[key] for key in ("set", "metric", "arm", "reference", "low", "high")},
                "observed": entry["difference"],
                "family": size if entry["declared"] else 1,
                "basis": "measured",
            },
            measured_design(entry),
            difference if difference is not None else entry["difference"] or None,
            wanted,
            alpha,
        )
        for entry in declared or entries
    ]


def _row(
    facts: dict[str, Any], design: Design, difference: float | None, wanted: float, alpha: float
) -> dict[str, Any]:
    from dataclasses import asdict

    from preskip.stats import needed, resolvable

    options: dict[str, Any] = {"power": wanted, "alpha": alpha, "family": facts["family"]}
    smallest = resolvable(design, **options)
    if design.standard_error == 0 and "low" in facts:  # nothing differed: what the interval still allows
        smallest = (facts["high"] - facts["low"]) / 2
    row = {**facts, **asdict(design), "resolvable": smallest, "difference": difference}
    if difference is not None and design.standard_error > 0:
        found = needed(design, difference, **options)
        row |= {"needed_units": found.units, "needed_seeds": found.seeds}
    return row


def _refuse_design_options(context: typer.Context) -> None:
    """What a run measured is not assumed: such an option beside it would be silently ignored."""
    own = {"run", "difference", "wanted", "alpha", "as_json"}
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in own and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise PreskipError(f"a run brings its own design and spread: leave out {', '.join(sorted(given))}")


def _print(rows: Sequence[Mapping[str, Any]], wanted: float, alpha: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from preskip.cli.wide import print_wide
    from preskip.metrics import metric_named
    from preskip.report.verdicts import MINUS, amount

    console = Console()
    measured = rows[0]["basis"] == "measured"
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("comparison" if measured else "metric", no_wrap=True)
    asked = any("needed_units" in row for row in rows)
    headings = ["units", "seeds", "found from", *(["observed"] if measured else [])]
    for heading in [*headings, *(["to find", "needs units", "or seeds"] if asked else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        metric = row["metric"]
        name = metric_named(metric).name
        if measured:
            name = f"{row['arm']} {MINUS} {row['reference']}, {row['set']} {metric}"
        cells = [f"{row['units']:,}", str(row["seeds"]), amount(metric, row["resolvable"])]
        if measured:
            cells.append((MINUS if row["observed"] < 0 else "") + amount(metric, row["observed"]))
        if asked:
            cells += ["–"] * 3
            if "needed_units" in row:
                cells[-3:] = [
                    amount(metric, row["difference"]),
                    *(_count(row[f"needed_{k}"]) for k in ("units", "seeds")),
                ]
        table.add_row(name, *cells)
    print_wide(console, table)
    family = max(row["family"] for row in rows)
    lines = [
        f"found from: the smallest true difference found with {100 * wanted:g} % power at the {100 * alpha:g} % level"
        + (f", corrected for a family of {family}" if family > 1 else "")
    ]
    if any(row["seeds"] == 1 for row in rows):
        lines.append("one seed: what these trained weights differ by; training randomness is not in it")
    if not measured:
        row = rows[0]
        over_seeds = row["seed_deviation"] if row["seeds"] > 1 else 0
        lines.append(
            f"assumed: SD over units {row['unit_deviation']:.3g} shared by all seeds and "
            f"{row['residual_deviation']:.3g} per seed, SD over seeds {over_seeds:.3g}"
        )
    if asked:
        lines.append("needs: units at these seeds, or seeds at these units; – means that no number of them is enough")
    console.print("\n".join(lines), style="dim", highlight=False, soft_wrap=True, markup=False)


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"

"""`preskip power`: what a planned design, or a run, can resolve, and what a difference needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from preskip.cli.options import Json, flag
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from preskip.runs.schema import Family
    from preskip.stats import Design

DESIGN = "A planned design"
# What a planned design assumes where nothing is given.
ASSUMED = {"seeds": 1, "discordant": 0.1, "shared": 0.5, "family": 1}


def power(
    run: Annotated[Optional[Path], flag("A run directory. Without it: a planned design.")] = None,
    *,
    items: Annotated[Optional[int], flag("Items scored right or wrong.", DESIGN)] = None,
    documents: Annotated[Optional[int], flag("Documents scored in bits per byte.", DESIGN)] = None,
    seeds: Annotated[Optional[int], flag("Training seeds. Default: 1.", DESIGN)] = None,
    discordant: Annotated[
        Optional[float], flag("Share of items on which two arms differ. Default: 0.1.", DESIGN)
    ] = None,
    sd: Annotated[
        Optional[float],
        flag("SD over units of one seed's paired difference. Default: as assumed.", DESIGN, hint=float, least=0),
    ] = None,
    seed_sd: Annotated[
        Optional[float], flag("SD over seeds of the difference. Default: as assumed.", DESIGN, hint=float, least=0)
    ] = None,
    shared: Annotated[
        Optional[float], flag("Part of the units' variance that all seeds share. Default: 0.5.", DESIGN)
    ] = None,
    freedom: Annotated[
        Optional[float],
        flag(
            "Degrees of freedom of the units, fewer where sizes differ (in run.json). Default: units - 1.",
            DESIGN,
            hint=float,
            least=1,
        ),
    ] = None,
    family: Annotated[Optional[int], flag("Comparisons declared (Holm). Default: 1.", DESIGN)] = None,
    difference: Annotated[
        Optional[float], flag("True difference to find: 0.01 is one point, or 0.005 bits per byte.")
    ] = None,
    looks: Annotated[
        Optional[str],
        flag("Numbers of seeds at which a growing run is looked at, 3,5,8; needs --difference.", DESIGN, is_list=True),
    ] = None,
    wanted: Annotated[float, flag("Probability of finding it.", name="--power")] = 0.8,
    alpha: Annotated[float, flag("Level of the two-sided test.")] = 0.05,
    as_json: Json = False,
) -> None:
    """Say how small a difference is found, and how many items and seeds find a given one.

    For a planned design (--items or --documents), or for the comparisons of a run, from its measured spread; where the
    run declared looks, also how often its first question is decided at each.
    """
    every: dict[str, Any] = {"items": items, "documents": documents, "seeds": seeds, "discordant": discordant}
    every |= {"looks": looks, "sd": sd, "seed_sd": seed_sd, "shared": shared, "family": family}
    every["freedom"] = freedom
    given = {name: value for name, value in every.items() if value is not None}
    if discordant is not None and (documents is not None or sd is not None):
        raise PreskipError("--discordant gives the SD of --items: leave it out beside --documents or --sd")
    notes: list[str] = []
    if run is None:
        rows = [_planned(given, difference, wanted, alpha)]
    elif given:  # what a run measured is not assumed: such an option beside it would be silently ignored
        flags = ", ".join(sorted("--" + name.replace("_", "-") for name in given))
        raise PreskipError(f"a run brings its own design and spread: leave out {flags}")
    else:
        rows, notes = _of_run(run, difference, wanted, alpha)
    if as_json:
        found = {"power": wanted, "alpha": alpha, "notes": notes, "designs": rows}
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        _print(rows, wanted, alpha, notes)
        for row in rows:
            _print_looks(row)


def _planned(given: Mapping[str, Any], difference: float | None, wanted: float, alpha: float) -> dict[str, Any]:
    from dataclasses import replace

    from preskip.metrics import METRICS
    from preskip.stats import Design
    from preskip.stats.designs import checked_level, discordant_deviation
    from preskip.stats.families import levels_at

    if ("items" in given) == ("documents" in given):
        raise PreskipError("give --items or --documents for a planned design, or a run directory")
    own_options = set(given)
    looks = _parsed_looks(given["looks"], given.get("seeds")) if "looks" in given else ()
    given = {**ASSUMED, **({"seeds": looks[-1]} if looks else {}), **given}  # the last look is at all seeds
    assumed = METRICS["acc" if "items" in given else "bits_per_byte"]
    if "sd" not in given:
        own = discordant_deviation(given["discordant"]) if "items" in given else assumed.unit_deviation or 0.0
        given = {**given, "sd": own}
    design = Design.assumed(
        units=given.get("items") or given.get("documents") or 0,
        seeds=given["seeds"],
        deviation=given["sd"],
        seed_deviation=given.get("seed_sd", assumed.seed_deviation),
        shared=given["shared"],
    )
    if given.get("freedom", 1) > design.units - 1:
        raise PreskipError(f"--freedom {given['freedom']:g} is more than {design.units} units have: at most 1 less")
    design = replace(design, unit_freedom=given.get("freedom"))
    if design.seeds == 1 and difference is None and (unused := {"shared", "seed_sd"} & own_options):
        flags = ", ".join(sorted("--" + name.replace("_", "-") for name in unused))
        raise PreskipError(f"{flags}: with one seed that changes nothing; give --seeds, or a --difference to find")
    facts = {"metric": assumed.key, "family": given["family"], "basis": "assumed"}
    level = checked_level(wanted, alpha, given["family"])
    if looks:
        facts["planned_seeds"] = looks[-1]
    levels, last = (levels_at(looks, seeds, level, level) for seeds in (design.seeds, max(looks, default=0)))
    row = _row(facts, design, difference, wanted, levels, last[0])
    if looks:
        row["looks"] = _looks(looks, design, difference, level)
    return row


def _parsed_looks(text: str, seeds: int | None) -> Sequence[int]:
    from preskip.experiment.options import check_looks
    from preskip.experiment.parse import parse_looks

    looks = parse_looks(text)
    check_looks(looks, max(looks, default=0) if seeds is None else seeds)
    return looks


def _looks(looks: Sequence[int], design: Design, difference: float | None, level: float) -> list[dict[str, Any]]:
    """What each planned look holds p to, and how often the run is decided there if the difference is true, or none."""
    from preskip.stats.stops import planned_stops

    if difference is None:
        raise PreskipError("--looks needs the true --difference to find")
    found, by_chance = (planned_stops(design, true, looks, alpha=level) for true in (difference, 0.0))
    return [{**stop, "by_chance": other["stops"]} for stop, other in zip(found, by_chance, strict=True)]


def _print_looks(row: Mapping[str, Any]) -> None:
    from preskip.cli.printing import columns, print_table
    from preskip.report.words.verdicts import MINUS

    if not (looks := row.get("looks", ())):
        return
    about = f"{row['arm']} {MINUS} {row['reference']}, {row['set']}" if "arm" in row else "look"
    table = columns(about, right=("seeds", "p held to", "decided here", "so far", "by chance so far"))
    for number in range(len(looks)):
        look, taken = looks[number], looks[: number + 1]
        shares = (look["stops"], *(sum(other[key] for other in taken) for key in ("stops", "by_chance")))
        table.add_row(
            str(number + 1), str(look["seeds"]), f"{look['level']:.2g}", *(f"{100 * share:.1f} %" for share in shares)
        )
    print_table(table, ["looks: the level is spent by Lan and DeMets's O'Brien-Fleming-like function; simulated"])


def _of_run(run: Path, difference: float | None, wanted: float, alpha: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The declared comparisons of a run, or all where none was declared; and what is missing of it."""
    from preskip.runs.stored import load_runs
    from preskip.stats import compare_arms, looks_without_seeds
    from preskip.stats.designs import checked_level
    from preskip.stats.families import first_questions, key_of, levels_of, tests_beside
    from preskip.stats.power import measured_design
    from preskip.stats.records import nothing_compared
    from preskip.stats.verdicts import FEWEST_UNITS, independent_units

    checked_level(wanted, alpha, 1)
    stored = load_runs([run], allow_different_dtype=True)
    left_out: list[str] = []
    entries = compare_arms(stored.items, stored.family, notes=left_out)
    if len(stored.items) == 1:
        raise PreskipError(f"{run} has one finished arm, {next(iter(stored.items))}, and nothing to compare: finish it")
    if not entries:
        raise nothing_compared(left_out)
    notes = [*stored.notes, *left_out, *looks_without_seeds(stored.items, stored.family, stored.seeds)]
    declared = [entry for entry in entries if entry["declared"]]
    family: Family = {**stored.family, "alpha": alpha}
    looks = family.get("looks") or ()
    rows = [
        _row(
            {
                **{key: entry[key] for key in ("set", "metric", "arm", "reference", "low", "high")},
                "observed": entry["difference"],
                "independent_units": independent_units(entry),
                "margin": entry["margin"],
                "verdict": entry["verdict"],
                "family": tests_beside(stored.family, entry),
                "basis": "measured",
                **({"planned_seeds": max(looks)} if looks else {}),
            },
            measured_design(entry),
            difference if difference is not None else entry["difference"] or None,
            wanted,
            levels_of(family, entry, entry["seeds"]),
            levels_of(family, entry, max(looks, default=entry["seeds"]))[0],
        )
        for entry in declared or entries
    ]
    for entry, row in zip(declared or entries, rows, strict=True):
        is_judged = row["independent_units"] >= FEWEST_UNITS and row["difference"] is not None
        if looks and key_of(entry) in first_questions(family) and is_judged:
            level = alpha / tests_beside(stored.family, entry)
            row["looks"] = _looks(looks, measured_design(entry), row["difference"], level)
    return rows, notes


def _row(
    facts: dict[str, Any],
    design: Design,
    difference: float | None,
    wanted: float,
    levels: tuple[float, float],
    last: float,
) -> dict[str, Any]:
    """A design's figures at its levels of difference and equivalence (`preskip.stats.families.levels_of`).

    Seeds that are needed are those at the level `last`: of the last look, where there are looks.
    """
    from dataclasses import asdict

    from preskip.metrics import DEFAULT_MARGINS
    from preskip.stats import needed, resolvable
    from preskip.stats.designs import resolvable_if_doubled
    from preskip.stats.verdicts import FEWEST_UNITS

    options: dict[str, Any] = {"power": wanted, "alpha": levels[0]}
    smallest, doubled = resolvable(design, **options), resolvable_if_doubled(design, **options)
    nothing_differs = design.standard_error == 0 and "low" in facts
    if nothing_differs:  # what the interval still allows
        smallest = doubled = (facts["high"] - facts["low"]) / 2
    margin = facts.pop("margin", DEFAULT_MARGINS.get(facts["metric"]))
    row = {**facts, **asdict(design), "resolvable": smallest, "difference": difference}
    row |= {"doubled": doubled, "margin": margin}
    # What the run says anything at all with: better, worse or equivalent; of equal arms only the last.
    row["decides_none"] = design.decides(0.0, margin, *levels)
    row["decides"] = None if difference is None else design.decides(difference, margin, *levels)
    if nothing_differs:  # what the comparison says is what it would decide
        row["decides_none"] = float(facts["verdict"] == "equivalent")
    if row.setdefault("independent_units", design.units) < FEWEST_UNITS:
        row |= {"decides_none": 0.0, "decides": None if difference is None else 0.0}
    if difference is not None and design.standard_error > 0:
        row["needed_units"] = needed(design, difference, **options).units
        row["needed_seeds"] = needed(design, difference, power=wanted, alpha=last).seeds
    return row


def _print(rows: Sequence[Mapping[str, Any]], wanted: float, alpha: float, notes: Sequence[str]) -> None:
    from rich.text import Text

    from preskip.cli.printing import columns, print_table, size_cell
    from preskip.metrics import metric_named
    from preskip.report.words.verdicts import MINUS

    measured, asked, wants, several = _is_measured(rows), _is_asked(rows), _wants(rows), _has_several_seeds(rows)
    decides = any(row["decides"] is not None for row in rows)

    def cells(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(heading, text) of every column behind the first."""
        metric = row["metric"]
        yield "units", f"{row['units']:,}"
        yield "seeds", str(row["seeds"])
        yield "found from", size_cell(metric, row["resolvable"])
        if several:
            yield "seeds ×2", size_cell(metric, row["doubled"]) if row["seeds"] > 1 else "–"
        if measured:
            yield "observed", (MINUS if row["observed"] < 0 else "") + size_cell(metric, row["observed"])
        if wants:
            yield "to find", size_cell(metric, row["difference"]) if "needed_units" in row else "–"
        if asked:
            yield "needs\nunits", _count(row.get("needed_units"))
            yield "or\nseeds", _count(row.get("needed_seeds"))
        if decides:
            yield "decides", _share(row["decides"])
        yield "decides\nif equal", _share(row["decides_none"])

    table = columns("comparison" if measured else "metric", right=[heading for heading, _ in cells(rows[0])])
    measures = list(dict.fromkeys((row.get("set"), row["metric"]) for row in rows))
    group = None
    for row in sorted(rows, key=lambda row: measures.index((row.get("set"), row["metric"]))):
        about = metric_named(row["metric"])
        unit = f" ({about.difference_unit.strip()})" if about.difference_unit else ""
        name = f"{about.name}{unit}"
        if measured:
            own = f"{row['set']}, {about.name[0].lower()}{about.name[1:]}{unit}"
            if own != group:
                table.add_row(Text(own, style="bold"))
            group, name = own, f"  {row['arm']} {MINUS} {row['reference']}"
        table.add_row(name, *(text for _, text in cells(row)))
    print_table(table, [*_legend(rows, wanted, alpha), *notes])


def _is_measured(rows: Sequence[Mapping[str, Any]]) -> bool:
    return rows[0]["basis"] == "measured"


def _is_asked(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a difference to find."""
    return any("needed_units" in row for row in rows)


def _wants(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what is to be found is another difference than the one observed in a run."""
    if not _is_asked(rows):
        return False
    return not _is_measured(rows) or any(row["difference"] != row["observed"] for row in rows)


def _has_several_seeds(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["seeds"] > 1 for row in rows)


def _legend(rows: Sequence[Mapping[str, Any]], wanted: float, alpha: float) -> list[str]:
    """What the columns of the table say, a line each."""
    from preskip.cli.printing import size_cell
    from preskip.stats.verdicts import FEWEST_UNITS

    families = sorted({row["family"] for row in rows})
    several = " to ".join(str(family) for family in dict.fromkeys((families[0], families[-1])))
    lines = [
        f"found from: the smallest true difference found with {100 * wanted:g} % power at the {100 * alpha:g} % level"
        + (f", corrected for the tests at a comparison's own level, {several}" if families[-1] > 1 else "")
    ]
    if any("planned_seeds" in row for row in rows):
        lines.append("looks: levels are those of the look that the seeds reach; seeds that are needed, of the last one")
    if _has_several_seeds(rows):
        lines.append("seeds ×2: the same if training seeds vary twice as much; so few know their own spread badly")
    lines.append(
        "decides: the probability that the comparison reads better, worse or equivalent"
        + (" at the difference " + ("to find" if _wants(rows) else "observed") if _is_asked(rows) else "")
        + "; if equal: when the true difference is 0"
    )
    if any(row["independent_units"] < FEWEST_UNITS for row in rows):
        lines.append(f"fewer than {FEWEST_UNITS} independent units: no verdict is given, whatever is found")
    if any(row["seeds"] == 1 for row in rows):
        lines.append("one seed: what these trained weights differ by; training randomness is not in it")
    if not _is_measured(rows):
        row = rows[0]
        for_more = "" if row["seeds"] > 1 else " where there are more than one"
        lines.append(
            f"assumed: SD over units {row['unit_deviation']:.3g} shared by all seeds and "
            f"{row['residual_deviation']:.3g} per seed, SD over seeds {row['seed_deviation']:.3g}{for_more}"
        )
    if _is_asked(rows):
        lines.append("needs: units at these seeds, or seeds at these units; – means that no number of them is enough")
    if any(size_cell(row["metric"], row["resolvable"]) == "nothing" for row in rows):
        lines.append("nothing: no difference between two accuracies is large enough for this design")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"

"""`preskip compare --combine`: each pair of arms over several runs, with one estimate over all of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.experiment.parse import parse_names
from preskip.runs.declaration import identity
from preskip.runs.schema import Manifest

_COMBINED = "combined: random effects over runs; p is not corrected, not for looks either"
_ONE_MORE = "one more: where the difference of another model or corpus would lie"


def combine_runs(
    runs: Sequence[Path],
    arms: str | None,
    reference: str | None,
    confidence: float,
    allow_different_dtype: bool,
    as_json: bool,
) -> None:
    """Compare the arms within each run, and print every pair that two runs or more hold, single and combined.

    Arguments are those of `preskip compare`.

    Raises:
        PreskipError: fewer than two runs, runs on a frozen model and from scratch, what cannot be compared within one,
            or no pair that two runs hold.
    """
    from preskip.progress import progress_bar
    from preskip.runs.directory import RunDirectory
    from preskip.runs.stored import load_runs, run_labels
    from preskip.stats import compare_arms, looks_without_seeds
    from preskip.stats.combined import combine_comparisons

    if len(runs) < 2:
        raise PreskipError("--combine needs two runs or more")
    manifests = [RunDirectory.open(path).manifest for path in runs]
    if len({manifest.get("kind") for manifest in manifests}) > 1:
        raise PreskipError("runs on a frozen model and runs from scratch have no arm in common: combine either")
    wanted = parse_names(arms) if arms else ()
    compared = {}
    notes: list[str] = []
    with progress_bar("comparing", len(runs), quiet=as_json) as advance:
        for number, (label, path) in enumerate(zip(run_labels(runs), runs, strict=True), 1):
            stored = load_runs([path], allow_different_dtype=allow_different_dtype)
            left_out: list[str] = []
            notes += [f"{label}: {line.removeprefix(f'{label}: ')}" for line in stored.notes]
            if absent := [arm for arm in dict.fromkeys([*wanted, reference]) if arm and arm not in stored.items]:
                notes.append(f"{label}: {', '.join(absent)} has no finished cell; pairs with it are left out")
            chosen = [arm for arm in wanted or stored.items if arm in stored.items]
            if reference not in absent and len({*chosen, reference} - {None}) > 1:
                pairs = stored.pairs(chosen, reference)
                entries = compare_arms(
                    stored.items, stored.family, stored.sets, pairs=pairs, confidence=confidence, notes=left_out
                )
                compared[label] = (entries, stored.sets)
                left_out += looks_without_seeds(stored.items, stored.family, stored.seeds)
            notes += [f"{label}: {line}" for line in left_out]
            advance(number, label)
    found = combine_comparisons(compared, confidence=confidence, notes=notes)
    if not found:
        why = "".join(f"; {note}" for note in notes)
        raise PreskipError(f"no pair of arms has a spread in two of these runs, on sets of one metric and domain{why}")
    notes += namesakes(manifests, {arm for entry in found for arm in (entry["arm"], entry["reference"])})
    notes += draws(manifests)
    if as_json:
        print(json.dumps({"notes": notes, "combined": found}, indent=1, allow_nan=False))
    else:
        for entry in found:
            _print(entry, notes if entry is found[-1] else ())


def draws(manifests: Sequence[Manifest]) -> list[str]:
    """What the runs' models and corpora leave open: a line where one of them repeats, else none."""
    models, corpora = (
        # From scratch a digest depends on how much of a corpus was read, too.
        len({facts["name"] if kind == "pretrain" else identity(facts) or facts["name"] for kind, facts in every})
        for every in (
            [(manifest.get("kind"), manifest[what]) for manifest in manifests] for what in ("model", "corpus")
        )
    )
    if 1 < models < len(manifests) or 1 < corpora < len(manifests):
        return [
            f"{len(manifests)} runs of {models} models and {corpora} corpora are not independent draws: the interval "
            "is too narrow where models or corpora differ"
        ]
    same = [name for name, count in (("model", models), ("corpus", corpora)) if count == 1]
    return [f"all runs are of one {' and one '.join(same)}: the estimate is of no other"] if same else []


def namesakes(manifests: Sequence[Manifest], arms: Collection[str]) -> list[str]:
    """A line for each of these arms that is not described alike in all runs, such as `lora` of an earlier preskip."""
    notes = []
    for arm in sorted(arms):
        told = dict.fromkeys(manifest["arms"][arm]["description"] for manifest in manifests if arm in manifest["arms"])
        if len(told) > 1:
            notes.append(f"{arm} is not the same in all runs: {'; '.join(told)}")
    return notes


def _print(entry: Mapping[str, Any], more: Sequence[str]) -> None:
    from rich.text import Text

    from preskip.cli.printing import columns, difference_cell, print_table
    from preskip.metrics import metric_named
    from preskip.report.lookup import DOMAINS
    from preskip.report.words.verdicts import MINUS, amount, margin_text, p_text

    about = metric_named(entry["metric"])
    table = columns("experiment", right=("seeds", f"difference [{100 * entry['confidence']:g} %]", "p (raw)"))
    role = DOMAINS.get(entry["role"], entry["role"])
    unit = f" ({about.difference_unit.strip()})" if about.difference_unit else ""
    table.title = Text(f"{entry['arm']} {MINUS} {entry['reference']}: {about.name}{unit}, {role}")
    for part in entry["parts"]:
        single = part["comparison"]
        few = f", {single['verdict']}" if single["verdict"] == "too few units" else ""
        name, seeds = f"{part['run']}: {single['set']}{few}", str(single["seeds"])
        table.add_row(name, seeds, difference_cell(single), p_text(single["p_value"]))
    mean = {"metric": entry["metric"], "difference": entry["value"], "low": entry["low"], "high": entry["high"]}
    mean["margin"] = entry["margin"]
    table.add_section()
    table.add_row(f"combined, {entry['experiments']}", "", difference_cell(mean), p_text(entry["p_value"]))
    freedom = entry["experiments"] - 1
    notes = [
        f"between runs: standard deviation {amount(entry['metric'], entry['between'])}; {freedom} "
        f"degree{'s' if freedom > 1 else ''} of freedom",
        _COMBINED,
        *(f"{run} is left out: its difference has no spread" for run in entry["left_out"]),
    ]
    if entry["margin"] is not None:
        within = margin_text(entry["metric"], entry["margin"])
        which = "" if len({part["comparison"]["margin"] for part in entry["parts"]}) == 1 else ", the narrowest margin"
        notes.insert(0, f"equivalent within {within}{which}: p {p_text(entry['p_equivalence'])}")
    if entry["predicted_low"] is not None:
        notes.append(_ONE_MORE)
        one = {**mean, "low": entry["predicted_low"], "high": entry["predicted_high"]}
        table.add_row("one more", "", difference_cell(one), "")
    print_table(table, [*notes, *more, ""])

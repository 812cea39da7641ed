"""The learning rate of each arm, searched on development documents that no result is reported on.

A log grid of half decades around the arm's default, the same first three for every arm. Successive halving: every
rate trains for a quarter of the steps (the schedule running to its end), the better half for half of them; the best of
those is taken. Where the best is at the grid's edge, the next rate beyond is tried, too, and the arm is marked as
extended. The data order is that of `tune_seed`, the same for all arms.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from preskip.arms import ARMS
from preskip.errors import DivergedError, PreskipError
from preskip.evaluate.texts import TextSet, score_texts
from preskip.experiment.execute import Execute
from preskip.experiment.frozen import Frozen
from preskip.progress import Advance, progress_bar
from preskip.runs.directory import Cell
from preskip.runs.files import read_json, read_jsonl, write_json, write_jsonl
from preskip.runs.schema import Limits, Record, Search, Trial
from preskip.stats import paired_ratio_difference

# Half decades around the arm's default.
GRID = (-1, 0, 1)
RUNGS = (1 / 4, 1 / 2)
# The first step warms up from a rate of 0: after it alone all rates would tie.
LEAST_STEPS = 2
# Rates beyond the grid's edge that are tried on either side.
EXTENSIONS = 3


def tune(prepared: Frozen, execute: Execute) -> list[str]:
    """Find the learning rates that are to be tuned, and record them in run.json; finished trainings are not repeated.

    Returns:
        The arms whose rate is tuned.
    """
    run, config = prepared.run, prepared.config
    tuned = [arm for arm in config.arms if config.is_tuned(arm)]
    waiting = [arm for arm in tuned if not (run.search / arm / "search.json").is_file()]
    base = base_records(prepared) if waiting else []
    found = dict(execute("search", search_rate, [(arm, base) for arm in tuned], tuned))
    facts = run.manifest["arms"]
    for index, arm in enumerate(tuned):
        facts[arm]["learning_rate"] = found[index]["chosen"]
    run.update_manifest(arms=facts)
    return tuned


def search_rate(prepared: Frozen, arm: str, base: list[Record]) -> Search:
    """Find an arm's learning rate; finished trainings are not repeated.

    Args:
        prepared: what the run shares.
        arm: name of a trained arm.
        base: the untouched model's records of the development sets (`base_records`).

    Returns:
        The `search` entry of results.json: default, chosen, extended, trace.

    Raises:
        PreskipError: every rate diverged.
    """
    folder = prepared.run.search / arm
    done = folder / "search.json"
    if done.is_file():
        return read_json(done)
    default = ARMS[arm].learning_rate
    assert default is not None
    steps = [max(LEAST_STEPS, round(share * prepared.config.steps)) for share in RUNGS]
    trials: dict[tuple[int, int], Trial] = {}

    def trial(rung: int, power: int) -> float:
        if (rung, power) not in trials:
            rate = float(f"{default * 10 ** (power / 2):.3g}")
            trials[rung, power] = _trial(prepared, arm, folder, rung, steps[rung], rate, base)
        entry = trials[rung, power]
        return math.inf if entry["dev"] is None else entry["dev"]["in"]["value"]

    def extend(powers: list[int]) -> list[int]:
        """Try rates beyond the edge on the first rung for as long as the best one is there."""
        while True:
            best = min(powers, key=lambda power: (trial(0, power), abs(power)))
            beyond = best - 1 if best == min(powers) else best + 1
            interior = min(powers) < best < max(powers)
            if interior or abs(beyond) > 1 + EXTENSIONS or math.isinf(trial(0, best)):
                return powers
            powers = sorted([*powers, beyond])

    first = extend(list(GRID))
    if all(math.isinf(trial(0, power)) for power in first):
        raise PreskipError(f"arm {arm}: training diverged at every learning rate: use --dtype float32 or fixed --lr")
    ranked = sorted(first, key=lambda power: (trial(0, power), abs(power)))
    kept = [power for power in ranked[: -(-len(GRID) // 2)] if not math.isinf(trial(0, power))]
    for power in kept:
        trials[0, power]["kept"] = True
        trial(1, power)
    best = min(kept, key=lambda power: trial(1, power))
    # More steps may want a rate that the first rung had no reason to try.
    while beyond := [power for power in (best - 1, best + 1) if not trials.keys() & {(0, power), (1, power)}]:
        if abs(best) >= 1 + EXTENSIONS:
            break
        best = min((best, *beyond), key=lambda candidate: trial(1, candidate))
    if math.isinf(trial(1, best)):
        raise PreskipError(f"arm {arm}: training diverged at its best learning rate: give a fixed --lr")
    trials[1, best]["kept"] = True
    found: Search = {
        "default": default,
        "chosen": trials[1, best]["learning_rate"],
        "extended": any(power not in GRID for _, power in trials),
        "trace": [trials[key] for key in sorted(trials)],
    }
    write_json(done, found)
    return found


def base_records(prepared: Frozen) -> list[Record]:
    """The untouched model's records of the development sets, scored once per run."""
    done = prepared.run.search / "none.jsonl"
    if done.is_file():
        return read_jsonl(done)
    texts = prepared.heldout.development
    windows = sum(len(text.windows) for text in texts)
    with progress_bar("development texts, none", windows, quiet=prepared.quiet) as advance:
        records = _score(prepared, prepared.base, texts, advance)
    write_jsonl(done, records)
    return records


def _score(prepared: Frozen, model: nn.Module, texts: Sequence[TextSet], advance: Advance) -> list[Record]:
    return score_texts(
        model, texts, prepared.tokenizer, batch_tokens=prepared.config.eval_batch_tokens, advance=advance
    )


def _trial(prepared: Frozen, arm: str, folder: Path, rung: int, steps: int, rate: float, base: list[Record]) -> Trial:
    cell = Cell(folder / f"rung-{rung}" / f"{rate:g}")
    done = cell.folder / "trial.json"
    entry: Trial
    if done.is_file():
        entry = read_json(done)
        entry["kept"] = False
        return entry
    seed = prepared.config.tune_seed
    entry = {
        "rung": rung,
        "steps": steps,
        "learning_rate": rate,
        "seed": seed,
        "dev": None,
        "kept": False,
        "diverged": False,
    }
    cell.folder.mkdir(parents=True, exist_ok=True)
    texts = prepared.heldout.development
    label = f"tune {arm} {rate:g}"
    try:
        with prepared.build(arm, seed) as built:
            prepared.train(built, arm, seed, cell, label, rate=rate, steps=steps)
            windows = sum(len(text.windows) for text in texts)
            with progress_bar(f"{label}: score", windows, quiet=prepared.quiet) as advance:
                records = _score(prepared, built.model, texts, advance)
        entry["dev"] = {
            "in": _difference(records, base, texts[0].name),
            "out": {text.name: _difference(records, base, text.name) for text in texts[1:]},
        }
    except DivergedError:
        entry["diverged"] = True
    write_json(done, entry)
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return entry


def _difference(records: Sequence[Any], base: Sequence[Any], name: str) -> Limits:
    """Bits per byte, arm minus base, over the documents of one set."""
    own, other = (
        {row["id"]: row for row in rows if row["kind"] == "document" and row["set"] == name} for rows in (records, base)
    )
    ids = sorted(own)  # all have a score: what is not finite has ended the trial
    interval = paired_ratio_difference(
        [own[id]["nll"] for id in ids], [other[id]["nll"] for id in ids], [own[id]["bytes"] for id in ids]
    )
    return {"value": interval.value, "low": interval.low, "high": interval.high}

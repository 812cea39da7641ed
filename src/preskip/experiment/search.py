"""The learning rate of each arm, searched on development documents that no result is reported on.

Each training seed has a search of its own, with its own initialisation and data order, so that what the choice of the
rate varies by is part of what the seeds vary by. The first seed's search is full. A log grid of half decades around the
arm's default, the same three for every arm: every rate trains for half of the search's steps (the schedule running to
its end), the better half for all of them. Those are `--tune-share` of the run's, by default half. Then quarter decades:
both neighbours of the best are trained as long, and it moves until it is better than both. The search of a later seed
is that last part alone, and begins at the rate that the first one found. Where the best is at the grid's edge, the next
rate beyond is tried, too, and the arm is marked as extended. With `--lr-rule frontier` one more rate is trained where
the next above the best does too much harm: the one between them at which the harm should reach the limit, so that arms
are compared at one harm and not at what the grid's steps leave of it; where it passes the limit, a second one below it.
Where no rate keeps the limit, lower ones are tried, half decades apart, until one does. All arms share the data order.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from preskip.arms import ARMS
from preskip.errors import DivergedError
from preskip.evaluate.texts import TextSet, score_texts
from preskip.experiment.execute import Execute
from preskip.experiment.frozen import Frozen
from preskip.experiment.probe_options import ProbeConfig
from preskip.progress import Advance, progress_bar
from preskip.runs.directory import Cell
from preskip.runs.files import read_json, read_jsonl, write_json, write_jsonl
from preskip.runs.schema import Development, Limits, Record, Search, Trial
from preskip.stats import compare
from preskip.stats.equal_harm import worst_harm

# Rates are counted in quarter decades from the arm's default; the first three are half decades apart.
STEPS_PER_DECADE = 4
HALF_DECADE = 2
GRID = (-HALF_DECADE, 0, HALF_DECADE)
# The first step warms up from a rate of 0: after it alone all rates would tie.
LEAST_STEPS = 2
# The farthest rate that is tried on either side: three half decades beyond the grid's edge.
FARTHEST = 8
# Of a step of the grid: a rate that is nearer to the best one is not worth a training.
LEAST_STEP = 0.1
# Of the way to a rate that does too much harm: the most that the next one goes, and how many are tried.
MOST_OF_THE_WAY = 0.9
TRIES = 2
# Counted up with every change of this file by which a search may find another rate; 0 in files that lack it.
RULE = 3


def tune(prepared: Frozen, execute: Execute) -> dict[tuple[str, int], str]:
    """Find the learning rates that are to be tuned, and record them in run.json; finished trainings are not repeated.

    Returns:
        Why there is no rate, by arm and seed, where training diverged at all of them.
    """
    run, config = prepared.run, prepared.config
    tuned = config.tuned_arms
    first, *later = searched_seeds(prepared)
    waiting = [arm for arm in tuned for seed in (first, *later) if not run.search_file(arm, seed).is_file()]
    base = base_records(prepared) if waiting else []
    found: dict[tuple[str, int | None], Search] = {}
    failed: dict[tuple[str, int], str] = {}
    for what, seeds in (("search", [first]), ("later search", later)):
        starts = {arm: found[arm, first]["chosen"] if what == "later search" else None for arm in tuned}
        calls = [(arm, seed, base, starts[arm]) for seed in seeds for arm in tuned]
        names = [arm if seed is None else f"{arm}, seed {seed}" for arm, seed, *_ in calls]
        for index, search in execute(what, _search_or_fault, calls, names):
            arm, seed, *_ = calls[index]
            if isinstance(search, str):  # without the first seed's rate the search of a later one cannot begin
                without = config.seeds if seed is None or seed == first else (seed,)
                failed |= {(arm, own): search for own in without}
            else:
                found[arm, seed] = search
        tuned = [arm for arm in tuned if (arm, first) in found]
    facts = run.manifest["arms"]
    for arm in tuned:
        facts[arm]["learning_rate"] = found[arm, first]["chosen"]
        if first is not None:
            rates = {seed: found[arm, seed]["chosen"] for seed in config.seeds if (arm, seed) in found}
            facts[arm]["learning_rates"] = {str(seed): rate for seed, rate in rates.items()}
    run.update_manifest(arms=facts)
    return failed


def _search_or_fault(prepared: Frozen, arm: str, *call: Any) -> Search | str:
    """`search_rate`; of an arm that diverges at every rate the reason, so that the others are compared all the same."""
    try:
        return search_rate(prepared, arm, *call)
    except DivergedError as error:
        return str(error)


def searched_seeds(prepared: Frozen) -> tuple[int | None, ...]:
    """The training seeds that have a search of their own; in a run of an earlier preskip one search served all."""
    return prepared.config.seeds if "declaration" in prepared.run.manifest else (None,)


def rungs(config: ProbeConfig) -> tuple[float, float]:
    """Shares of the run's steps that a rate is trained for in a search: at first, and where it is chosen."""
    return config.tune_share / 2, config.tune_share


def tuning_seed(config: ProbeConfig, seed: int | None) -> int:
    """The seed of initialisation and data order in the search of a training seed."""
    if seed is None:
        return config.tune_seed
    return int(np.random.SeedSequence([config.tune_seed, seed]).generate_state(1)[0])


def search_rate(prepared: Frozen, arm: str, seed: int | None, base: list[Record], start: float | None = None) -> Search:
    """Find an arm's learning rate for one training seed; finished trainings are not repeated.

    Args:
        prepared: what the run shares.
        arm: name of a trained arm.
        seed: the training seed; None for one search that serves all.
        base: the untouched model's records of the development sets (`base_records`).
        start: the rate that the search begins at, in place of the grid.

    Returns:
        The content of search.json.

    Raises:
        DivergedError: every rate diverged.
    """
    done = prepared.run.search_file(arm, seed)
    if done.is_file():
        return read_json(done)
    config, default = prepared.config, ARMS[arm].learning_rate
    assert default is not None
    steps = [max(LEAST_STEPS, round(share * config.steps)) for share in rungs(config)]
    trials: dict[tuple[int, float], Trial] = {}

    def loss(rung: int, power: float) -> tuple[float, float]:
        """What the rule makes least: harm beyond what is allowed, then the in-domain loss; of a diverged rate ∞."""
        if (rung, power) not in trials:
            rate = float(f"{default * 10 ** (power / STEPS_PER_DECADE):.3g}")
            trials[rung, power] = _trial(prepared, arm, seed, done.parent, rung, steps[rung], rate, base)
        dev = trials[rung, power]["dev"]
        # Of two that diverged the lower rate is the better place to go on from.
        return (math.inf, power) if dev is None else (excess_harm(config, dev), dev["in"]["value"])

    if start is None:
        kept = _first_rung(loss)
        if not kept:
            raise DivergedError("training diverged at every learning rate: use --dtype float32 or fixed --lr")
        for power in kept:
            trials[0, power]["kept"] = True
    else:
        kept = [round(STEPS_PER_DECADE * math.log10(start / default))]
    of_grid = _bracketed(loss, min(kept, key=lambda power: loss(1, power)))
    if math.isinf(loss(1, of_grid)[0]):
        raise DivergedError("training diverged at its best learning rate: give a fixed --lr")
    best: float = of_grid
    if config.lr_rule == "frontier":
        best = _near_limit(loss, trials, _within_limit(loss, of_grid), config.lr_harm)
    trials[1, best]["kept"] = True
    found: Search = {
        "default": default,
        "chosen": trials[1, best]["learning_rate"],
        "extended": any(abs(power) > GRID[-1] for _, power in trials),
        "trace": [trials[key] for key in sorted(trials)],
        "rule": RULE,
    }
    if config.lr_rule == "frontier":
        found["within_harm"] = loss(1, best)[0] == 0
    write_json(done, found)
    return found


def _first_rung(loss: Callable[[int, float], tuple[float, float]]) -> list[int]:
    """The better half of the grid, which grows for as long as its best rate is at its edge."""

    def ranked(powers: Sequence[int]) -> list[int]:
        return sorted(powers, key=lambda power: (loss(0, power), abs(power)))

    powers = ranked(GRID)
    while not math.isinf(loss(0, powers[0])[0]):
        best = powers[0]
        if min(powers) < best < max(powers):
            break
        beyond = best - HALF_DECADE if best == min(powers) else best + HALF_DECADE
        if abs(beyond) > FARTHEST:
            break
        powers = ranked([*powers, beyond])
    return [power for power in powers[: -(-len(GRID) // 2)] if not math.isinf(loss(0, power)[0])]


def _bracketed(loss: Callable[[int, float], tuple[float, float]], best: int) -> int:
    """The best rate of the last rung, from a first guess: both of its neighbours are worse, or beyond the limits."""
    while True:
        near = [best, *(power for power in (best - 1, best + 1) if abs(power) <= FARTHEST)]
        better = min(near, key=lambda power: loss(1, power))
        if better == best:
            return best
        best = better


def _within_limit(loss: Callable[[int, float], tuple[float, float]], best: int) -> int:
    """The best rate of the last rung, from one beyond the limit on harm: lower ones, until one keeps the limit.

    Harm need not grow with the rate everywhere: the least of it may lie between two rates that do more.
    """
    lower = best
    while loss(1, best)[0] > 0 and lower - HALF_DECADE >= -FARTHEST:
        lower -= HALF_DECADE
        best = min(best, lower, key=lambda power: loss(1, power))
    return _bracketed(loss, best)


def _near_limit(
    loss: Callable[[int, float], tuple[float, float]], trials: dict[tuple[int, float], Trial], best: float, harm: float
) -> float:
    """The best rate of the last rung: that of the grid, or one between it and the next, near the limit on harm."""
    above = best + 1
    for _ in range(TRIES):
        way = min(share_within(trials[1, best], trials.get((1, above)), harm), MOST_OF_THE_WAY) * (above - best)
        if way < LEAST_STEP:
            break
        above = best + way
        if loss(1, above) < loss(1, best):
            return above
    return best


def share_within(best: Trial, above: Trial | None, harm: float) -> float:
    """The part of the way to a higher rate after which the harm reaches a limit, linear between the two.

    0 where the higher rate is not tried, diverged, does no more harm than that, or is no better in-domain.
    """
    if above is None or best["dev"] is None or above["dev"] is None:
        return 0.0
    low, high = worst_harm(best["dev"]), worst_harm(above["dev"])
    if not low <= harm < high or above["dev"]["in"]["value"] >= best["dev"]["in"]["value"]:
        return 0.0
    return (harm - low) / (high - low)


def excess_harm(config: ProbeConfig, dev: Development) -> float:
    """Bits per byte by which the worst out-of-domain set is beyond what `--lr-rule frontier` allows; else 0."""
    return 0.0 if config.lr_rule != "frontier" else max(0.0, worst_harm(dev) - config.lr_harm)


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


def _trial(
    prepared: Frozen, arm: str, for_seed: int | None, folder: Path, rung: int, steps: int, rate: float,
    base: list[Record],
) -> Trial:  # fmt: skip
    cell = Cell(folder / f"rung-{rung}" / f"{rate:g}")
    done = cell.folder / "trial.json"
    entry: Trial
    if done.is_file():
        entry = read_json(done)
        entry["kept"] = False
        return entry
    seed = tuning_seed(prepared.config, for_seed)
    entry = {
        "rung": rung,
        "steps": steps,
        "learning_rate": rate,
        "seed": seed,
        "dev": None,
        "kept": False,
        "diverged": False,
    }
    if for_seed is not None:
        entry["for_seed"] = for_seed
    cell.folder.mkdir(parents=True, exist_ok=True)
    texts = prepared.heldout.development
    label = f"tune {arm} {rate:g}" + (f" for seed {for_seed}" if len(prepared.config.seeds) > 1 else "")
    try:
        with prepared.build(arm, seed) as built:
            prepared.train(built, arm, seed, cell, label, rate=rate, steps=steps)
            windows = sum(len(text.windows) for text in texts)
            with progress_bar(f"{label}: score", windows, quiet=prepared.quiet) as advance:
                records = _score(prepared, built.model, texts, advance)
        inside, *outside = _differences(records, base)
        entry["dev"] = {"in": inside[1], "out": dict(outside)}
    except DivergedError:
        entry["diverged"] = True
    write_json(done, entry)
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return entry


def _differences(records: list[Record], base: list[Record]) -> list[tuple[str, Limits]]:
    """Bits per byte, arm minus base, by set: over its documents, of which those of one book are a cluster."""
    return [
        (entry["set"], {"value": entry["difference"], "low": entry["low"], "high": entry["high"]})
        for entry in compare(records, base, margins={})
    ]

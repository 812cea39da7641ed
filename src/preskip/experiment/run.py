"""One run from start to results: prepare, search, train and score every arm and seed, compare.

Each arm and seed is a cell of the run directory, each training of the search for a learning rate a trial. What is
finished is never computed again; what is not continues from its last checkpoint, so that an interrupted run ends with
the result of an uninterrupted one. A cell whose training diverges is left out of the results, which say so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from preskip.analysis.depth_results import add_trends
from preskip.arms import Arm, resolve_arms
from preskip.arms.plan import Plan
from preskip.errors import DivergedError, PreskipError
from preskip.experiment.cell import KINDS, kind_of, opened, run_cell, usable_options
from preskip.experiment.controls import run_controls
from preskip.experiment.execute import Execute, open_executor, threads_of_a_worker
from preskip.experiment.frozen import Frozen
from preskip.experiment.heldout import Config
from preskip.experiment.measured import measured
from preskip.experiment.outlook import Outlook, measured_token, outlook, plan_text
from preskip.experiment.preflight import check_space, needed_bytes
from preskip.experiment.prepared import Prepared
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.results import rule_ahead, summarise_run
from preskip.experiment.scratch import Scratch
from preskip.experiment.search import RULE, tune
from preskip.metrics import DEFAULT_MARGINS, metric_named
from preskip.progress import about, say, spinner
from preskip.runs.attempt import attempt, check_same_inputs, new_run, note_other_environments
from preskip.runs.declaration import declare, extension
from preskip.runs.directory import RunDirectory
from preskip.runs.environment import resolve_device
from preskip.runs.files import write_json, write_jsonl
from preskip.runs.schema import CellSummary, Facts, Results
from preskip.stats import planned_power
from preskip.stats.families import first_questions, key_of
from preskip.stats.power import decided
from preskip.stats.verdicts import FEWEST_UNITS, margin_of
from preskip.train.distributed import Crew, share_batch, world_size
from preskip.train.frozen import check_sharding
from preskip.train.scratch import trackers


def start_run(config: Config, out: Path, command: Sequence[str]) -> RunDirectory:
    """Create the run directory of a new run.

    Args:
        config: what to do; its class says on what: a frozen base, or from scratch.
        out: the run directory; must not exist.
        command: the command line, for the record.

    Raises:
        PreskipError: the path exists, the device or a tracker is unavailable, or the processes of this launch cannot do
            it; nothing has been written then.
    """
    _check_launch(config)
    if not isinstance(config, PretrainConfig):
        return new_run(out, config.to_json(), command)
    stored = config.to_json() | {"report_to": list(trackers(config.report_to)) or ["none"]}
    return new_run(out, stored, command, kind="pretrain")


def _check_launch(config: Config) -> None:
    """Refuse what this launch cannot do, on this machine or with its processes, before anything is trained."""
    share_batch(config.batch_size, config.micro_batch)
    if isinstance(config, PretrainConfig):
        trackers(config.report_to)
    else:
        check_sharding(equal_step=config.equal_step, keep=config.keep_weight > 0)


def check_command(run: RunDirectory, command: str) -> None:
    """Refuse a run that another command has made.

    Raises:
        PreskipError: it is not of this one, "probe" or "pretrain".
    """
    if (own := kind_of(run)) != command:
        raise PreskipError(f"{run.path} is no run of `preskip {command}`: resume it with `preskip {own} --resume`")


def finish_run(
    run: RunDirectory,
    *,
    seeds: Sequence[int] = (),
    quiet: bool = False,
    workers: int = 1,
    executor: str = "local",
    ray_address: str | None = None,
    show_plans: Callable[[dict[str, Plan]], None] = lambda plans: None,
) -> Results:
    """Do, or finish, what the run's run.json says; under a launcher, as the main process of several that train.

    Args:
        run: the run directory.
        seeds: all that the run is to have, where seeds are added to it.
        quiet: no progress.
        workers: processes of this machine that compute cells side by side.
        executor: where cells are computed, "local" or "ray"; the results are the same.
        ray_address: of the Ray cluster; None starts one on this machine.
        show_plans: from scratch: given the solved arms before anything is trained.

    Returns:
        The content of results.json.

    Raises:
        PreskipError: anything a user can mend; the run directory then says "failed", where every training diverged
            "diverged", and can be resumed. Or another process is working on the run.
    """
    own = kind_of(run)
    extended_seeds(run, seeds)
    with attempt(run) as now:
        with now.stage("load"):
            added = extended_seeds(run, seeds)
            stored = run.manifest["config"]
            stored = {**stored, "seeds": [*stored["seeds"], *added]}
            config = usable_options(own, stored)
            if missing := sorted(set(stored.get("report_to", ())).difference(getattr(config, "report_to", ()))):
                say(f"not reported to {', '.join(missing)}, unavailable here: that changes no result", quiet=quiet)
            _check_launch(config)
            if config.device == "cuda" and resolve_device("auto") != "cuda":
                raise PreskipError(
                    f"{run.path} is computed on cuda, and torch sees no CUDA device here: resume it where there is "
                    f"one, or begin anew with --config {run.path / 'run.json'} --device cpu"
                )
            crew = Crew(config.device)
            prepared, facts = KINDS[own].prepare(run, config, quiet, crew)
            if executor == "local" and workers > 1:
                facts["environment"]["threads"] = threads_of_a_worker(workers)
            is_complete = all(run.cell(arm.name, seed).is_done for arm, seed in _cells(prepared))
            check_same_inputs(run, facts, is_complete=is_complete)
            _declare(prepared, stored, facts, added, quiet)
            facts |= note_other_environments(run, facts["environment"], quiet)
            if isinstance(prepared, Scratch):
                show_plans(prepared.plans)
            _keep_found_rates(prepared, facts)
            if first := run.manifest.get("tokenizer"):
                facts["tokenizer"] |= first
                if "opening" not in first:  # nothing is said of how the first attempt's blocks began
                    facts["tokenizer"].pop("opening", None)
            run.update_manifest(status="running", config=stored, **facts)
            cells = _missing_cells(prepared)
            every: Any = facts["arms"]
            weights = [every[arm].get("trainable_parameters", every[arm].get("parameters")) for arm, _ in cells]
            check_space(run.path, needed_bytes(weights, checkpoints=config.save_steps > 0))
            ahead = outlook(prepared, cells, None)
            if not quiet:
                ahead = _announce(prepared, cells, facts)
            crew.announce(run.path.resolve())
        ahead.started = ahead.clock()
        with open_executor(prepared, workers=workers, kind=executor, address=ray_address, done=ahead.done) as execute:
            diverged = []
            if isinstance(prepared, Frozen) and prepared.config.tuned_arms:
                with now.stage("tune"):
                    without = tune(prepared, execute)
                cells = [cell for cell in cells if cell not in without]
                diverged = [_no_results(arm, seed, why, quiet) for (arm, seed), why in without.items()]
            diverged += _compute(execute, cells, now.seconds, quiet)
        _check_compares(prepared, diverged)
        extra: Any = run_controls(prepared) if isinstance(prepared, Frozen) else {}
        crew.dismiss()
        for note in extra.get("notes", ()):
            say(note, quiet=quiet)
        with spinner("comparing the arms", quiet=quiet):
            results = summarise_run(run)
            notes = [*results.get("notes", ()), *diverged, *extra.pop("notes", ())]
            results |= extra
            with measured(notes, "trends over depth"):
                add_trends(results)
            if notes:
                results["notes"] = notes
        write_json(run.path / "results.json", results)
        now.finish(results)
    shutil.rmtree(run.prefix, ignore_errors=True)
    return results


def _compute(execute: Execute, cells: Sequence[tuple[str, int]], seconds: dict[str, float], quiet: bool) -> list[str]:
    """Compute the cells and add up their seconds; a line for each that has diverged."""
    names = [f"{arm}, seed {seed}" for arm, seed in cells]
    seconds.update(train=0.0, evaluate=0.0)
    diverged = []
    for index, summary in execute("cell", _cell_or_fault, cells, names):
        if isinstance(summary, str):
            diverged.append(_no_results(*cells[index], summary, quiet))
        else:
            seconds["train"] += summary["train_seconds"]
            seconds["evaluate"] += summary["evaluate_seconds"]
    return diverged


def _no_results(arm: str, seed: int, why: str, quiet: bool) -> str:
    """Say which cell is missing; the line goes into the results, too."""
    line = f"no results of {arm}, seed {seed}: {why}"
    say(line, quiet=quiet)
    return line


def _cell_or_fault(prepared: Prepared, arm: str, seed: int) -> CellSummary | str:
    """`run_cell`; of one that diverges the reason, so that the other cells are computed all the same."""
    try:
        return run_cell(prepared, arm, seed)
    except DivergedError as error:
        return str(error)


def _check_compares(prepared: Prepared, diverged: Sequence[str]) -> None:
    """Refuse to end a run in which nothing that trains has come through."""
    done = [arm.name for arm, seed in _cells(prepared) if arm.trains and prepared.run.cell(arm.name, seed).is_done]
    if diverged and not done:
        raise DivergedError(f"every training diverged ({diverged[0]}): a run keeps its options, start a new one")


def extended_seeds(run: RunDirectory, seeds: Sequence[int]) -> list[int]:
    """Which of the seeds a run does not have yet.

    Args:
        run: the run directory.
        seeds: all that it is to have; empty for those that it has.

    Raises:
        PreskipError: one that it has is missing, a seed is impossible, or no look at so many was declared.
    """
    config, has = run.manifest["config"], run.manifest["config"]["seeds"]
    if not seeds:
        return []
    if missing := [seed for seed in has if seed not in seeds]:
        raise PreskipError(
            f"--seeds leaves out {', '.join(map(str, missing))}, which {run.path} has: seeds can only be added; give "
            f"{', '.join(map(str, has))} and new ones"
        )
    added = [seed for seed in seeds if seed not in has]
    KINDS[kind_of(run)].options.from_json({**config, "seeds": [*has, *added]})
    return added


def _declare(prepared: Prepared, config: dict[str, Any], facts: Facts, added: list[int], quiet: bool) -> None:
    """What is declared once, before any result: the family, and with the options its hash; and seeds that are added."""
    before = prepared.run.manifest
    is_new = "arms" not in before  # of a run of an earlier preskip nothing is declared after the fact
    facts["family"] = before.get("family", facts["family"])
    if is_new:
        rule = RULE if isinstance(prepared, Frozen) and prepared.config.tuned_arms else None
        facts["declaration"] = declare(config, facts, rule)
        say(f"declared, SHA-256 {facts['declaration']['sha256']}: keep it to show later that nothing was changed",
            quiet=quiet)  # fmt: skip
    elif added:
        record = extension(facts["family"], before["config"]["seeds"], added)
        facts["extensions"] = [*before.get("extensions", []), record]
        if not record["planned"]:
            say("seeds are added without a declared look: the page and `preskip compare` say so", quiet=quiet)


def _keep_found_rates(prepared: Prepared, facts: Any) -> None:
    """Rates that a search has found stay in run.json, also where the search of an added seed is interrupted."""
    for arm, known in prepared.run.manifest.get("arms", {}).items():
        if isinstance(prepared, Frozen) and prepared.config.is_tuned(arm):
            rates = ("learning_rate", "learning_rates")
            facts["arms"][arm] |= {name: rate for name, rate in known.items() if name in rates}


def follow_run(device: str) -> None:
    """Take part in the trainings of a run that the main process of this launch leads; only that one prints and writes.

    Args:
        device: "cpu" or "cuda", where the models are.
    """
    tasks = Crew(device).tasks()
    for path in tasks:  # the run, once the main process has prepared it
        prepared = opened(path)
        for task in tasks:
            with suppress(DivergedError), prepared.build(task["arm"], task["seed"]) as built:  # the leader tells of it
                prepared.train(built, label="", **task)


def _missing_cells(prepared: Prepared) -> list[tuple[str, int]]:
    """The arms and seeds that are still to be computed; seeds outermost: what is done early compares all arms."""
    missing = []
    for arm, seed in _cells(prepared):
        cell = prepared.run.cell(arm.name, seed)
        if cell.is_done:
            _, items = cell.load()  # damaged files are found now, not after hours of training
            if (clustered := prepared.heldout.in_clusters(items)) != items:
                write_jsonl(cell.items, clustered)
        else:
            missing.append((arm.name, seed))
    return missing


def _cells(prepared: Prepared) -> list[tuple[Arm, int]]:
    """The arms and seeds of a run; the untouched model has no seed and is evaluated once."""
    seeds, arms = prepared.config.seeds, resolve_arms(prepared.config.arms, prepared.arms)
    return [(arm, seed) for seed in seeds for arm in arms if arm.trains or seed == seeds[0]]


def _announce(prepared: Prepared, cells: Sequence[tuple[str, int]], facts: Facts) -> Outlook:
    """Say what is computed, what is scored, what can be detected, and how long it takes, before anything starts."""
    if isinstance(prepared, Frozen) and facts["model"]["dtype"] != prepared.config.dtype:
        say(f"base weights as loaded: {facts['model']['dtype']}")
    say(plan_text(prepared, cells, facts))
    if isinstance(prepared, Frozen):
        config = prepared.config
        if mixed := rule_ahead(prepared.run, config.tuned_arms, config.seeds, RULE):
            say(mixed)
    say(_extent(facts))
    _say_power(facts)
    seconds = None
    if cells and world_size() == 1:
        # What only estimates must not end the run: a training that fits may need less memory than this step.
        with spinner("measuring a step"), suppress(Exception):
            seconds = measured_token(prepared, facts)
    ahead = outlook(prepared, cells, seconds)
    left = ahead.left()
    if left:
        say(f"{about(left)} in all, by one measured step; corrected as cells are done")
    return ahead


def _extent(facts: Facts) -> str:
    """What is trained on and scored, in one line; a corpus that is read several times is worth knowing."""
    corpus = facts["corpus"]
    passes = corpus["training_passes"]
    scored = [
        f"{name} ({described.get('documents', described.get('items'))} {described['kind']}s)"
        for name, described in facts["sets"].items()
    ]
    return (
        f"training text {corpus['training_tokens']:,} tokens"
        + (f", each seen {passes:g} times" if passes > 1 else "")
        + f"; scored: {', '.join(scored)}"
    )


def _say_power(facts: Facts) -> None:
    """What this run will be able to tell, before it costs anything."""
    said: dict[str, str] = {}
    equal: list[float] = []
    try:
        entries = planned_power(facts["sets"], len(facts["seeds"]), facts["family"])
    except PreskipError as error:  # as of a task of one item: what is only said must not end the run
        say(f"What this run can detect is unknown: {error}")
        return
    for entry in entries:
        about = metric_named(entry["metric"])
        size = f"{about.factor * entry['resolvable']:.{about.decimals}f}{about.difference_unit or f' {about.phrase}'}"
        if about.is_accuracy and entry["resolvable"] >= 1:
            size = "nothing"
        if entry["units"] < FEWEST_UNITS:
            size = f"nothing (of {entry['units']} independent units no verdict is given)"
        said[entry["set"]] = f"{size} on {entry['set']}"
        equal.append(entry["decides_none"])
    if said:
        say(
            f"This run can detect (80 % power, assumed spreads, {len(facts['family']['declared'])} declared "
            f"comparisons): {', '.join(said.values())}. Of arms that do not differ it shows that they are equivalent "
            f"with {100 * min(equal):.0f} to {100 * max(equal):.0f} % probability."
        )
    first = first_questions(facts["family"])
    for entry in (entry for entry in entries if key_of(entry) in first):
        margin = margin_of(facts["family"].get("margins", DEFAULT_MARGINS), entry["set"], entry["metric"])
        if margin is None:
            continue
        none, by_margin, by_two = (100 * decided(entry, facts["family"], times * margin) for times in (0, 1, 2))
        say(
            f"Its first question, {entry['arm']} against {entry['reference']} on {entry['set']}, is decided with "
            f"{none:.0f} % probability if they do not differ, {by_margin:.0f} % if by the margin, {by_two:.0f} % if by "
            "twice the margin."
        )

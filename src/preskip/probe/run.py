"""One probe from start to report: load, tune, train every arm and seed, evaluate, compare.

Each arm and seed is a cell of the run directory, each training of the search for a learning rate a trial. What is
finished is never computed again; what is not continues from its last checkpoint, so that an interrupted run ends with
the result of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from preskip.analysis.depth_results import drop_documents, trends
from preskip.arms import Arm, resolve_arms
from preskip.experiment.probe_options import ProbeConfig
from preskip.metrics import metric_named
from preskip.probe.bench import Bench, prepare
from preskip.probe.cells import follow
from preskip.probe.controls import run_controls
from preskip.probe.executor import LocalExecutor, open_executor
from preskip.probe.results import summarise_run
from preskip.probe.search import base_records
from preskip.progress import say, spinner
from preskip.runs.attempt import Attempt, attempt, check_same_inputs, new_run, note_other_environments
from preskip.runs.directory import RunDirectory
from preskip.runs.files import write_json
from preskip.stats import planned_power
from preskip.train.distributed import Crew, share_batch


def start_probe(config: ProbeConfig, out: Path, command: Sequence[str]) -> RunDirectory:
    """Create the run directory of a new run.

    Args:
        config: what to do.
        out: the run directory; must not exist.
        command: the command line, for the record.

    Raises:
        PreskipError: the path exists, or the device is not there; nothing has been written then.
    """
    return new_run(out, config.to_json(), command)


def run_probe(
    run: RunDirectory, *, quiet: bool = False, executor: str = "local", ray_address: str | None = None
) -> dict[str, Any]:
    """Do, or finish, what the run's run.json says; under a launcher, as the main process of several that train.

    Args:
        run: the run directory.
        quiet: no progress.
        executor: where the cells are computed, see `preskip.probe.executor`; the results are the same.
        ray_address: of the Ray cluster; None starts one on this machine.

    Returns:
        The content of results.json.

    Raises:
        PreskipError: anything a user can mend; the run directory then says "failed" and can be resumed. Or another
            process is working on the run.
    """
    config = ProbeConfig.from_json(run.manifest["config"])
    with attempt(run) as now:
        share_batch(config.batch_size, config.micro_batch)
        crew = Crew(config.device)
        bench, facts = prepare(config, Path(run.manifest.get("directory", ".")), quiet, crew)
        check_same_inputs(run, facts, ("model", "corpus"))
        facts["family"] = run.manifest.get("family", facts["family"])  # declared once, before any result
        facts |= note_other_environments(run, facts["environment"], quiet)
        say(_extent(facts), quiet=quiet)
        _say_power(facts, config, quiet)
        run.update_manifest(status="running", **facts)
        crew.announce(run.path.resolve())
        now.seconds = {"load": now.elapsed(), "tune": 0.0, "train": 0.0, "evaluate": 0.0}
        with closing(open_executor(executor, ray_address, config.device)) as where:
            _tune(run, bench, facts, now, where)
            for summary in where.cells(run, bench, _open_cells(run, config)):
                now.seconds["train"] += summary["train_seconds"]
                now.seconds["evaluate"] += summary["evaluate_seconds"]
        extra = run_controls(run, bench)
        crew.dismiss()
        with spinner("comparing the arms", quiet=quiet):
            results = summarise_run(run, config, run.manifest) | extra
            results |= trends(results)
            drop_documents(results)
        write_json(run.path / "results.json", results)
        now.finish(results)
    return results


def follow_probe(device: str) -> None:
    """Take part in the trainings of a probe that the main process of this launch runs; only that one prints and writes.

    Args:
        device: "cpu" or "cuda", where the model is.
    """
    crew = Crew(device)
    tasks = crew.tasks()
    for path in tasks:  # the run, once the main process has prepared it
        manifest = RunDirectory.open(path).manifest
        config = ProbeConfig.from_json(manifest["config"])
        follow(prepare(config, Path(manifest.get("directory", ".")), True, crew)[0], tasks)


def _open_cells(run: RunDirectory, config: ProbeConfig) -> list[tuple[Arm, int]]:
    """The arms and seeds that are still to be computed."""
    cells = []
    for seed in config.seeds:
        for arm in resolve_arms(config.arms):
            # The untouched model has no training seed: evaluated once.
            if not arm.trains and seed != config.seeds[0]:
                continue
            cell = run.cell(arm.name, seed)
            if cell.is_done:
                cell.load()  # damaged files are found now, not after hours of training
            else:
                cells.append((arm, seed))
    return cells


def _tune(run: RunDirectory, bench: Bench, facts: dict[str, Any], now: Attempt, where: LocalExecutor) -> None:
    """Find the learning rates that are to be tuned, and record them."""
    started = now.elapsed()
    tuned = [arm for arm in resolve_arms(bench.config.arms) if bench.config.is_tuned(arm.name)]
    if not tuned:
        return
    waiting = [arm for arm in tuned if not (run.search / arm.name / "search.json").is_file()]
    base = base_records(bench) if waiting else []
    for arm, found in zip(tuned, where.search(run, bench, tuned, base), strict=True):
        bench.rates[arm.name] = facts["arms"][arm.name]["learning_rate"] = found["chosen"]
        run.update_manifest(arms=facts["arms"])
    now.seconds["tune"] = now.elapsed() - started


def _extent(facts: dict[str, Any]) -> str:
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


def _say_power(facts: dict[str, Any], config: ProbeConfig, quiet: bool) -> None:
    """What this run will be able to tell, before it costs anything."""
    said: dict[str, str] = {}
    for entry in planned_power(facts["sets"], len(config.seeds), facts["family"]):
        about = metric_named(entry["metric"])
        size = f"{about.factor * entry['resolvable']:.{about.decimals}f}{about.difference_unit or f' {about.phrase}'}"
        if about.is_accuracy and entry["resolvable"] >= 1:
            size = "nothing"
        said[entry["set"]] = f"{size} on {entry['set']}"
    if said:
        say(
            f"to be found with 80 % power (assumed spreads; {len(facts['family']['declared'])} declared comparisons): "
            + ", ".join(said.values()),
            quiet=quiet,
        )

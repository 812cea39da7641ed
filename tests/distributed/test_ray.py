"""The cells of a probe as tasks of a Ray cluster: the results of a run without it, also when a worker is lost."""

import json
import os
import signal
import sys

import pytest

from preskip.errors import PreskipError
from preskip.probe import executor
from preskip.probe.config import ProbeConfig
from preskip.probe.run import run_probe, start_probe
from preskip.train.cluster import RayPool, check_executor
from tiny_model import save_tiny_llama, write_corpus

MEASURED = {"seconds", "seconds_per_step", "train_seconds", "evaluate_seconds", "peak_memory_bytes"}


def small_probe(folder) -> ProbeConfig:
    return ProbeConfig(
        model=str(save_tiny_llama(folder / "model")),
        corpus=str(write_corpus(folder / "corpus.jsonl", 60)),
        seeds=(1, 2),
        arms=("none", "preskip"),
        lr_mode="tune",
        development_documents=2,
        heldout_fraction=0.4,
        steps=3,
        batch_size=2,
        seq_len=16,
        context_length=32,
        eval_documents=3,
        eval_words=20,
        last_word_items=4,
        save_steps=1,
        dtype="float32",
        device="cpu",
    )


def unmeasured(value):
    """JSON without what differs from run to run: times and memory."""
    if isinstance(value, dict):
        return {key: unmeasured(part) for key, part in value.items() if key not in MEASURED}
    return [unmeasured(part) for part in value] if isinstance(value, list) else value


def stored(run) -> dict:
    files = [run / "results.json", *run.rglob("cell.json"), *run.rglob("search.json"), *run.rglob("*.jsonl")]
    return {
        str(path.relative_to(run)): [unmeasured(json.loads(line)) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else unmeasured(json.loads(path.read_text()))
        for path in files
    }


@pytest.mark.slow
def test_ray_gives_the_local_results_although_a_worker_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray")

    def dying_cell_task(run, bench, name, seed, rates):
        """The first worker that has trained seed 2 dies before it scores; nested, so that it travels by value."""
        from preskip.probe import cells
        from preskip.probe.executor import _cell_task

        marker = run.path / "killed"
        if name == "preskip" and seed == 2 and not marker.exists():

            def die(*arguments):
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

            cells.evaluate = die
        return _cell_task(run, bench, name, seed, rates)

    config = small_probe(tmp_path)
    run_probe(start_probe(config, tmp_path / "local", ["test"]), quiet=True)
    monkeypatch.setattr(executor, "_cell_task", dying_cell_task)
    run_probe(start_probe(config, tmp_path / "ray", ["test"]), quiet=True, executor="ray")
    assert (tmp_path / "ray" / "killed").exists()
    local, ray = stored(tmp_path / "local"), stored(tmp_path / "ray")
    assert {"results.json", "arms/preskip/seed-2/items.jsonl", "search/preskip/search.json"} <= local.keys()
    assert ray == local
    weights = "arms/preskip/seed-2/adapter/adapter_model.safetensors"
    assert (tmp_path / "ray" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()


def test_what_cannot_be_executed_is_refused_in_one_line(monkeypatch):
    with pytest.raises(PreskipError, match="--executor 'slurm' is unknown: choose local or ray"):
        check_executor("slurm", None)
    with pytest.raises(PreskipError, match="--ray-address goes with --executor ray"):
        check_executor("local", "auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PreskipError, match=r"needs Ray, which is not installed: pip install 'preskip\[ray\]'"):
        check_executor("ray", None)
    check_executor("local", None)


def test_ray_and_a_launcher_do_not_go_together(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PreskipError, match="leave out torchrun or accelerate launch"):
        check_executor("ray", None)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line():
    pytest.importorskip("ray")
    with pytest.raises(PreskipError, match="no Ray cluster at --ray-address auto"):
        RayPool("auto", "cpu")

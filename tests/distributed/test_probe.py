"""A probe as tasks of a Ray cluster, also when a worker is lost, and under a launcher: the results of one process."""

import os
import pickle
import signal
import sys
from contextlib import contextmanager

import pytest

from nested import assert_close
from preskip.cli.main import main
from preskip.errors import PreskipError
from preskip.experiment import execute
from preskip.experiment import run as experiment
from preskip.experiment.run import finish_run, start_run
from preskip.runs import environment
from preskip.runs.environment import processor_name
from preskip.train.cluster import check_executor
from small_probe import OTHER_ORDER, small_probe, stored
from two_processes import ROOT, launch

FSDP2 = ("accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "fsdp2.yaml"))
FSDP2 += ("--main_process_port", "0")  # any free one


@pytest.fixture(scope="module")
def local_probe(tmp_path_factory):
    """The configuration, and the folder of the run that one process has finished."""
    folder = tmp_path_factory.mktemp("local_probe")
    config = small_probe(folder)
    finish_run(start_run(config, folder / "run", ["test"]), quiet=True)
    return config, folder / "run"


def test_searches_and_cells_can_be_handed_to_other_processes(local_probe, tmp_path, monkeypatch, capsys):
    """By reference, as spawned processes take them, and results as they give them; here in this process."""

    @contextmanager
    def handed_over(count):
        def outcomes(function, calls, names):
            for index, call in enumerate(calls):
                taken, arguments = pickle.loads(pickle.dumps((function, call)))
                yield index, pickle.loads(pickle.dumps(taken(*arguments)))

        yield outcomes

    config, local_run = local_probe
    monkeypatch.setattr(execute, "processes", handed_over)
    finish_run(start_run(config, tmp_path / "run", ["test"]), workers=2)
    assert stored(tmp_path / "run") == stored(local_run)
    told = capsys.readouterr().err
    assert "search 1 of 1 done: preskip" in told
    assert "cell 2 of 2 done" in told or "cell 3 of 3 done" in told


@pytest.mark.slow
def test_ray_gives_the_local_results_although_a_worker_is_killed(local_probe, tmp_path, monkeypatch):
    pytest.importorskip("ray")

    def dying_cell(prepared, arm, seed):
        """The first worker that has trained seed 2 dies before it scores; nested, so that it travels by value."""
        from preskip.experiment.cell import run_cell
        from preskip.experiment.heldout import HeldOut

        marker = prepared.run.path / "killed"
        if arm == "preskip" and seed == 2 and not marker.exists():

            def die(*arguments, **options):
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

            HeldOut.score = die
        return run_cell(prepared, arm, seed)

    config, local_run = local_probe
    monkeypatch.setattr(experiment, "_cell_or_fault", dying_cell)
    monkeypatch.setattr(environment, "usable_cores", lambda: 1)  # a worker at a time: each imports all libraries
    finish_run(start_run(config, tmp_path / "ray", ["test"]), quiet=True, executor="ray")
    assert (tmp_path / "ray" / "killed").exists()
    local, ray = stored(local_run), stored(tmp_path / "ray")
    assert {"results.json", "arms/preskip/seed-2/items.jsonl", "search/preskip/seed-1/search.json"} <= local.keys()
    assert ray == local
    assert ray["arms/preskip/seed-2/cell.json"]["hardware"] == processor_name()
    weights = "arms/preskip/seed-2/adapter/adapter_model.safetensors"
    assert (tmp_path / "ray" / weights).read_bytes() == (local_run / weights).read_bytes()


@pytest.mark.slow
def test_a_probe_under_accelerate_with_fsdp2_equals_one_process(local_probe, tmp_path):
    """The whole command: search, two seeds, scores; the second process says nothing."""
    config, local_run = local_probe
    start_run(config, tmp_path / "run", ["test"])
    resume = ("-m", "preskip", "probe", "--resume", tmp_path / "run")
    finished = launch(*resume, launcher=FSDP2)
    if "(exitcode: -11)" in finished.stderr:  # torch itself crashed, seen once in many suites: the run goes on
        finished = launch(*resume, launcher=FSDP2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stderr.count("train preskip seed 2 ...") == 1
    assert finished.stdout.count("report: ") == 1
    sharded, whole = stored(tmp_path / "run"), stored(local_run)
    assert sharded.keys() == whole.keys()
    for part in (
        "arms/preskip/seed-1/items.jsonl",
        "arms/preskip/seed-2/cell.json",
        "search/preskip/seed-1/search.json",
    ):
        assert_close(sharded[part], whole[part], part, **OTHER_ORDER)


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
def test_a_cluster_that_is_not_there_is_one_line(local_probe, tmp_path, capsys):
    pytest.importorskip("ray")
    run = start_run(local_probe[0], tmp_path / "run", ["test"]).path
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(run), "--executor", "ray", "--ray-address", "auto"])
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "no Ray cluster at --ray-address auto" in line

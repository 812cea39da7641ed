"""SIGKILL at any moment, then resume: weights, optimiser, logs and results equal an uninterrupted run's to the bit.

On CPU in fp32, with dropout; the moments are drawn with a fixed seed from all that a training does, see `killing`.
"""

import json
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import killing
from preskip.runs.directory import RunDirectory
from preskip.runs.files import read_jsonl
from preskip.train.checkpoints import find_fault
from tiny_model import save_tiny_llama, write_corpus

TIMED = re.compile(r"seconds|runtime|per_second|peak_memory|timings")


def exact(value, folder: Path = Path("/nowhere")):
    """A value that equals another one only if every bit does, without what a clock or the place gives."""
    if isinstance(value, dict):
        return {key: exact(entry, folder) for key, entry in value.items() if not TIMED.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [exact(entry, folder) for entry in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.numpy().tobytes()]
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value.replace(str(folder), "") if isinstance(value, str) else value


def state(folder: Path) -> dict:
    """Everything that a training ends with: its last checkpoint, and its log."""
    last = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert find_fault(last) is None
    found = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    for path in {*last.glob("*.pt"), *last.glob("*.pth")}:
        found[path.name] = torch.load(path, weights_only=False)
    found |= {f"{path.parent.name}/{path.name}": path.read_bytes() for path in last.rglob("*.distcp")}
    if "optimizer.pt" in found:
        assert all(entry["exp_avg_sq"].any() for entry in found["optimizer.pt"]["state"].values())
    found |= {path.name: json.loads(path.read_text()) for path in (last / "trainer_state.json", *last.glob("losses*"))}
    if (folder / "train.jsonl").exists():
        found["train.jsonl"] = read_jsonl(folder / "train.jsonl")
    return exact(found, folder)


def kill_and_finish(work, folder: Path, moments: list[killing.Moment], kills: int = 4) -> None:
    """Kill up to so many children at the last of the moments, each going on from the one before, then let one finish.

    The moments that came are taken from the list; one that a resumed child has no occasion for stays.
    """
    for number in range(kills):
        if not moments:
            break
        code = killing.child(work, folder, moment=moments[-1])
        if code == 0:
            assert number > 0, f"{moments[-1]} never comes"
            return
        assert code == -signal.SIGKILL
        moments.pop()
    assert killing.child(work, folder) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("work", "tensor_files", "others"), [(killing.frozen, 6, 5), (killing.scratch, 5, 3)])
def test_a_killed_training_ends_as_an_uninterrupted_one(work, tensor_files, others, tmp_path):
    draw = random.Random(4)
    whole = tmp_path / "whole"
    counts = killing.moments(work, whole)
    expected = state(whole)
    torn = sorted(label for label in counts if label.startswith("tear"))
    assert len(torn) == tensor_files
    drawn = draw.sample(sorted(counts.keys() - set(torn)), others)
    drawn += [*torn, "optimiser step", "rename checkpoint-N/seal.json.tmp", "rmtree checkpoints/checkpoint-N"]
    moments = [(label, draw.randint(1, counts[label])) for label in drawn]
    draw.shuffle(moments)
    number = 0
    while moments:
        folder = tmp_path / f"killed-{number}"
        kill_and_finish(work, folder, moments)
        assert state(folder) == expected
        number += 1


def test_a_crash_of_gloo_is_no_outcome(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").touch()
    with pytest.warns(UserWarning, match="crashed, once more"):
        assert killing.crew(killing.crash_once, folder, killing.DDP) == [0, 0]
    assert {path.name for path in folder.iterdir()} == {"before", "0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "holds"),
    [(killing.DDP, {"optimizer.pt", "model.safetensors"}), (killing.FSDP, {"optimizer_0/__1_0.distcp"})],
    ids=["DDP", "FSDP"],
)
def test_two_processes_that_are_killed_go_on_together(launch, holds, tmp_path):
    assert killing.crew(killing.scratch, tmp_path / "whole", launch) == [0, 0]
    expected = state(tmp_path / "whole")
    assert {"rng_state_0.pth", "rng_state_1.pth", "losses_1.json", *holds} <= expected.keys()
    folder = tmp_path / "killed"
    for moment in (("open checkpoint-N/seal.json.tmp", 2), ("tear by save checkpoint-N/scheduler.pt", 2)):
        first, second = killing.crew(killing.scratch, folder, launch, moment=moment)
        assert first == -signal.SIGKILL
        assert second in (-signal.SIGKILL, 1)  # killed with it, or ended by itself when its partner was gone
    assert killing.crew(killing.scratch, folder, launch) == [0, 0]
    assert state(folder) == expected


def outcome(run: Path) -> dict:
    """Everything that a run ends with."""
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "report.html").is_file()
    assert not list(run.rglob("checkpoints")) + list(run.rglob(".*.tmp"))
    found = {"results": json.loads((run / "results.json").read_text())}
    for path in sorted(run.glob("*/**/*.json*")):
        content = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
        found[str(path.relative_to(run))] = content
    found |= {str(path.relative_to(run)): load_file(path) for path in run.rglob("*.safetensors")}
    return exact(found, run.parent)


@pytest.mark.slow
def test_a_killed_probe_ends_as_an_uninterrupted_one(tmp_path):
    """In the search, in a checkpoint, in the scoring, between a cell's files, at the results and at the report."""
    draw = random.Random(6)
    save_tiny_llama(tmp_path / "model")
    write_corpus(tmp_path / "corpus.jsonl", 40)
    (tmp_path / "whole").mkdir()
    assert killing.child(killing.probe, tmp_path / "whole") == 0
    expected = outcome(tmp_path / "whole" / "run")
    assert {"results", "arms/preskip/seed-42/adapter/adapter_model.safetensors"} <= expected.keys()
    first = ["rename run.tmp", "score", "rmtree 0.0005/checkpoints", "rename seed-N/search.json.tmp"]
    then = ["tear by serialize_file adapter/adapter_model.safetensors", "open adapter/adapter_config.json"]
    last = ["rename seed-N/cell.json.tmp", "rename run/results.json.tmp", "rename run/report.html.tmp"]
    moments = [(label, 1) for label in [*first, "tear by save checkpoint-N/optimizer.pt", *then, *last]][::-1]
    moments[moments.index(("score", 1))] = ("score", draw.randint(1, 4))
    folder = tmp_path / "killed"
    folder.mkdir()
    kill_and_finish(killing.probe, folder, moments, kills=len(moments))
    assert not moments
    assert outcome(folder / "run") == expected
    with RunDirectory.open(folder / "run").lock():
        assert killing.child(killing.probe, folder) == 1
    assert "another process is working on" in (tmp_path / "killed.log").read_text()
    assert outcome(folder / "run") == expected

"""The commands under a launcher: the results of one process, one voice, and one line for what cannot be shared."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from preskip.errors import PreskipError
from preskip.experiment.run import finish_run, start_run
from preskip.train.distributed import adapt_trainer, share_batch, shared_training
from small_probe import small_probe, stored
from tiny_model import write_corpus
from two_processes import ROOT, launch

FSDP2 = ("accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "fsdp2.yaml"))
FSDP2 += ("--main_process_port", "0")  # any free one
PRETRAIN = "--arch llama-1m --num-layers 2 --hidden-size 32 --heads 4 --kv-heads 2 --mlp-width 64 --set head_dim=8"
PRETRAIN += " --vocab-size 400 --seq-len 16 --batch-size 4 --tokens 256 --arms base,preskip --seeds 1 --device cpu"
PRETRAIN += " --dtype float32 --eval-steps 2 --eval-blocks 4 --eval-documents 3 --eval-words 30 --log-steps 1"


def assert_close(value, expected, path=""):
    if isinstance(expected, dict):
        assert value.keys() == expected.keys(), path
        for key in expected:
            assert_close(value[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(value) == len(expected), path
        for index, (own, other) in enumerate(zip(value, expected, strict=True)):
            assert_close(own, other, f"{path}/{index}")
    elif isinstance(expected, float):
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5), path
    else:
        assert value == expected, path


def logged(run: Path) -> dict[str, list[float]]:
    return {
        str(log.relative_to(run)): [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        for log in run.rglob("train.jsonl")
    }


@pytest.mark.slow
def test_a_probe_under_accelerate_with_fsdp2_equals_one_process(local_probe, tmp_path):
    """The whole command: search, two seeds, scores; the second process says nothing."""
    config, local_run = local_probe
    start_run(config, tmp_path / "run", ["test"])
    finished = launch("-m", "preskip", "probe", "--resume", tmp_path / "run", launcher=FSDP2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stderr.count("train preskip seed 2 ...") == 1
    assert finished.stdout.count("report: ") == 1
    sharded, whole = stored(tmp_path / "run"), stored(local_run)
    assert logged(tmp_path / "run").keys() == logged(local_run).keys()
    for part in (
        "arms/preskip/seed-1/items.jsonl",
        "arms/preskip/seed-2/cell.json",
        "search/preskip/seed-1/search.json",
    ):
        assert_close(sharded[part], whole[part], part)


class PoolOfOne:
    """A Ray cluster's stand-in: every task in this process, the last one first."""

    def __init__(self, address, device):
        assert (address, device) == (None, "cpu")

    def outcomes(self, function, calls, names):
        assert len(names) == len(calls)
        return ((index, function(*calls[index])) for index in reversed(range(len(calls))))

    def close(self):
        pass


@pytest.mark.slow
def test_pretraining_under_torchrun_and_as_tasks_equals_one_process(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from preskip.cli.main import main
    from preskip.experiment import execute

    corpus = str(write_corpus(tmp_path / "corpus.jsonl", 60))
    options = ["pretrain", *PRETRAIN.split(), "--corpus", corpus, "--json"]
    monkeypatch.setattr(execute, "RayPool", PoolOfOne)
    for name, more in (("one", []), ("tasks", ["--executor", "ray"])):
        with pytest.raises(SystemExit) as stop:
            main([*options, *more, "--out", str(tmp_path / name)])
        assert stop.value.code == 0
    assert logged(tmp_path / "tasks") == logged(tmp_path / "one")
    finished = launch("-m", "preskip", *options, "--out", tmp_path / "two")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout)["run"] == str(tmp_path / "two")
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert one.keys() == two.keys() == {"arms/base/seed-1/train.jsonl", "arms/preskip/seed-1/train.jsonl"}
    for log, losses in one.items():
        assert len(losses) == 4
        assert two[log] == pytest.approx(losses, abs=1e-5)
    for arm in ("base", "preskip"):
        items = f"arms/{arm}/seed-1/items.jsonl"
        assert_close(stored(tmp_path / "two")[items], stored(tmp_path / "one")[items], items)


def test_shares_of_a_batch(monkeypatch):
    assert share_batch(8, 8) == (8, 1)
    assert share_batch(8, 2) == (2, 4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share_batch(8, 8) == (2, 1)
    assert share_batch(8, 1) == (1, 2)
    with pytest.raises(PreskipError, match="4 processes cannot share a batch of 6 sequences evenly"):
        share_batch(6, 6)
    with pytest.raises(PreskipError, match="--micro-batch-size 2 does not divide the 3 sequences"):
        share_batch(12, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equal_step": True}, "equal steps need whole weights"),
        ({"keep_weight": 0.5}, "--keep-weight needs the base's"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_anything_is_trained(tmp_path, monkeypatch, options, message):
    config = small_probe(tmp_path, **options)
    run = start_run(config, tmp_path / "alone", ["test"])
    before = (run.path / "run.json").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PreskipError, match=message):
        start_run(config, tmp_path / "sharded", ["test"])
    assert not (tmp_path / "sharded").exists()
    with pytest.raises(PreskipError, match=message):
        finish_run(run, quiet=True)
    assert {path.name for path in run.path.iterdir()} == {"run.json", ".lock"}
    manifest = run.manifest
    del manifest["timings"]
    assert json.loads(before) | {"status": "failed"} == manifest


def test_every_process_draws_its_own_dropout_masks(tmp_path, monkeypatch):
    draws = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(7)
        arguments = SimpleNamespace(seed=7, process_index=int(rank), output_dir=str(tmp_path))
        adapt_trainer(SimpleNamespace(args=arguments))
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3
    assert draws[0] == torch.rand(1, generator=torch.Generator().manual_seed(7)).item()  # as in a single process


def test_a_lost_process_is_one_line_from_the_main_one_and_none_from_the_others(monkeypatch):
    lost = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5332"
    with pytest.raises(PreskipError, match="another process of this launch has ended"), shared_training(nn.Module()):
        raise RuntimeError(lost)
    with pytest.raises(RuntimeError, match="shapes"), shared_training(nn.Module()):
        raise RuntimeError("shapes do not match")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, shared_training(nn.Module()):
        raise RuntimeError(lost)
    assert stop.value.code == 1


@pytest.mark.parametrize("command", ["probe", "pretrain"])
def test_a_batch_that_cannot_be_shared_is_one_line_and_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    """As the main process of three sees it, before any other is needed."""
    from preskip.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stop:
        main([command, "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "3 processes cannot share a batch of 8 sequences evenly: give a --batch-size that is a multiple of 3" in line
    assert not (tmp_path / "run").exists()

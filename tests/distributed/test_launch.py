"""Training that several processes share: the results of one process, and one line for what cannot be shared."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import killing
from nested import assert_close
from preskip.errors import PreskipError
from preskip.experiment.run import finish_run, start_run
from preskip.train.distributed import adapt_trainer, share_batch, shared_training
from small_probe import OTHER_ORDER, small_probe, stored
from tiny_model import write_corpus


def logged(run: Path) -> dict[str, list[float]]:
    return {
        str(log.relative_to(run)): [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        for log in run.rglob("train.jsonl")
    }


@pytest.mark.slow
def test_pretraining_in_two_processes_equals_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_corpus(tmp_path / "corpus.jsonl", 60)
    assert killing.child(killing.pretrain, one) == 0
    assert killing.crew(killing.pretrain, two, killing.DDP) == [0, 0], killing.log(two)
    whole, shared = logged(one / "run"), logged(two / "run")
    assert whole.keys() == shared.keys() == {"arms/base/seed-1/train.jsonl", "arms/preskip/seed-1/train.jsonl"}
    for log, losses in whole.items():
        assert len(losses) == 4
        assert shared[log] == pytest.approx(losses, abs=1e-5)
    for arm in ("base", "preskip"):
        items = f"arms/{arm}/seed-1/items.jsonl"
        assert_close(stored(two / "run")[items], stored(one / "run")[items], items, **OTHER_ORDER)


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

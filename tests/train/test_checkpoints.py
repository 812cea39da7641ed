import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments
from transformers import trainer as transformers_trainer

from preskip import PreskipConfig
from preskip.arms import ARMS, ArmContext, attention_paths, branch_parameters
from preskip.arms.insert import insert
from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.train import checkpoints
from preskip.train.checkpoints import SEAL, ResumableTrainer, find_fault, last_good_checkpoint, seal
from preskip.train.frozen import train_frozen
from preskip.train.settings import TrainingSettings
from tiny_model import tiny_llama

BLOCKS = np.random.default_rng(0).integers(2, 400, (8, 16)).astype(np.int32)


def checkpoint(folder: Path, step: int = 1, sealed: bool = True) -> Path:
    """A made-up checkpoint: two files, one in a folder as FSDP leaves them."""
    path = folder / f"checkpoint-{step}"
    (path / "optimizer_0").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)))
    (path / "optimizer_0" / ".metadata").write_bytes(b"shards")
    if sealed:
        seal(path)
    return path


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_seal_lists_every_file_with_size_and_checksum(tmp_path):
    path = checkpoint(tmp_path)
    assert json.loads((path / SEAL).read_text())["files"] == {
        "model.safetensors": {"bytes": 256, "sha256": hashlib.sha256(bytes(range(256))).hexdigest()},
        "optimizer_0/.metadata": {"bytes": 6, "sha256": hashlib.sha256(b"shards").hexdigest()},
    }
    assert find_fault(path) is None


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: flip_bit(path / "model.safetensors"), "model.safetensors has another checksum"),
        (lambda path: flip_bit(path / "optimizer_0" / ".metadata"), "optimizer_0/.metadata has another checksum"),
        (lambda path: os.truncate(path / "model.safetensors", 255), "255 bytes instead of 256"),
        (lambda path: (path / "optimizer_0" / ".metadata").unlink(), "optimizer_0/.metadata is missing"),
        (lambda path: os.truncate(path / SEAL, 30), "seal.json cannot be read"),
        (lambda path: (path / SEAL).write_text('{"files": {"model.safetensors": 3}}'), "seal.json cannot be read"),
        (lambda path: (path / SEAL).unlink(), "not written to its end"),
    ],
)
def test_faults(tmp_path, harm, told):
    path = checkpoint(tmp_path)
    harm(path)
    assert told in find_fault(path)


def test_the_newest_good_checkpoint_is_found_and_bad_ones_are_put_away(tmp_path, capsys):
    good, damaged = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    half, older = checkpoint(tmp_path, 11, sealed=False), checkpoint(tmp_path, 8)
    flip_bit(damaged / "model.safetensors")
    assert last_good_checkpoint(tmp_path) == good
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{tmp_path}: checkpoint-11 was not written to its end and is removed; checkpoint-10 is damaged "
        "(model.safetensors has another checksum than when it was written) and set aside as damaged-checkpoint-10; "
        "training goes on from checkpoint-9"
    ]
    assert not half.exists()
    assert older.exists()
    assert (tmp_path / "damaged-checkpoint-10" / "model.safetensors").exists()
    assert last_good_checkpoint(tmp_path) == good
    assert capsys.readouterr().err == ""


def test_without_a_good_checkpoint_there_is_none(tmp_path, capsys):
    assert last_good_checkpoint(tmp_path / "nowhere") is None
    assert last_good_checkpoint(tmp_path) is None
    flip_bit(checkpoint(tmp_path) / "model.safetensors")
    assert last_good_checkpoint(tmp_path) is None
    assert capsys.readouterr().err.endswith("training starts anew\n")
    checkpoint(tmp_path, 2, sealed=False)
    assert last_good_checkpoint(tmp_path, quiet=True) is None
    assert capsys.readouterr().err == ""


def train(folder: Path, advance=lambda step, note="": None) -> tuple[torch.Tensor, list]:
    """Six steps with dropout and a checkpoint every second; the weights and the log, without times."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper", init_std=0.1, dropout=0.2))
    settings = TrainingSettings(steps=6, batch_size=4, micro_batch_size=4, learning_rate=1e-2, seed=1, save_steps=2)
    rows = train_frozen(
        model,
        BLOCKS,
        settings,
        arm="x",
        checkpoints=folder / "checkpoints",
        log=folder / "train.jsonl",
        advance=advance,
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and log of an uninterrupted training."""
    return train(tmp_path_factory.mktemp("whole"))


def assert_same(outcome, whole):
    assert torch.equal(outcome[0], whole[0])
    assert outcome[1] == whole[1]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "trained.safetensors", "optimizer.pt", "trainer_state.json"]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole, capsys, name):
    train(tmp_path)
    flip_bit(tmp_path / "checkpoints" / "checkpoint-6" / name)
    assert_same(train(tmp_path), whole)
    assert f"{name} has another checksum than when it was written" in capsys.readouterr().err
    assert find_fault(tmp_path / "checkpoints" / "checkpoint-6") is None


def sealed_with(path: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Give a sealed checkpoint another file of tensors."""
    (path / SEAL).unlink()
    save_file(tensors, path / name)
    seal(path)


def test_trained_weights_do_not_come_from_the_adapters_file(tmp_path, whole):
    """PEFT 0.20 stores of stacked adapters the outer one's weights alone; here its file holds zeros."""
    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    older = tmp_path / "checkpoints" / "checkpoint-4"
    zeros = {key: torch.zeros_like(value) for key, value in load_file(older / "adapter_model.safetensors").items()}
    sealed_with(older, "adapter_model.safetensors", zeros)
    seen = []
    assert_same(train(tmp_path, lambda step, note="": seen.append(step)), whole)
    assert seen == [5, 6]


def test_a_checkpoint_without_all_trained_weights_is_refused(tmp_path):
    train(tmp_path)
    newest = tmp_path / "checkpoints" / "checkpoint-6"
    weights = load_file(newest / "trained.safetensors")
    lost = sorted(weights)[0]
    del weights[lost]
    sealed_with(newest, "trained.safetensors", weights)
    with pytest.raises(PreskipError, match=f"checkpoint-6 lacks 1 trained weights, {lost} among them: delete .*anew"):
        train(tmp_path)


def train_arm(folder: Path, name: str, advance=lambda step, note="": None) -> tuple[dict, list, dict]:
    """Four steps of an arm that is no PEFT adapter: its trained weights, the log without times, the whole model."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    targets = tuple(attention_paths(base))
    shape = {"settings": BranchSettings(), "skip_position": "attention", "layers": None, "match": "none"}
    context = ArmContext(base=base, targets=targets, budget=branch_parameters(base, BranchSettings(), targets), **shape)
    settings = TrainingSettings(steps=4, batch_size=4, micro_batch_size=4, learning_rate=1e-2, seed=1, save_steps=2)
    where = {"arm": name, "checkpoints": folder / "checkpoints", "log": folder / "train.jsonl"}
    with insert(ARMS[name], context, seed=1) as inserted:
        rows = train_frozen(inserted.model, BLOCKS, settings, **where, advance=advance)
        trained = {key: weight.detach().clone() for key, weight in inserted.trainable.items()}
        whole = {key: value.clone() for key, value in inserted.model.state_dict().items()}
    return trained, [{key: value for key, value in row.items() if key != "seconds"} for row in rows], whole


@pytest.mark.parametrize("name", ["bitfit", "content-gated"])
def test_checkpoints_of_arms_without_peft_hold_what_is_trained_alone(tmp_path, name, monkeypatch):
    """Those of an earlier preskip hold the frozen base, too, and are read all the same."""
    told: list[str] = []
    monkeypatch.setattr(transformers_trainer.logger, "warning", told.append)
    expected, rows, whole = train_arm(tmp_path / "whole", name)

    def stop(step, note=""):
        if step == 3:
            raise KeyboardInterrupt

    for kind in ("own", "old"):
        folder = tmp_path / kind
        with pytest.raises(KeyboardInterrupt):
            train_arm(folder, name, stop)
        (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
        stored = load_file(checkpoint / "model.safetensors")
        assert checkpoint.name == "checkpoint-2"
        assert stored.keys() == expected.keys()
        assert not any(torch.equal(stored[key], expected[key]) for key in stored if stored[key].any())
        assert not (checkpoint / "trained.safetensors").exists()
        if kind == "old":
            frozen = {key: value for key, value in whole.items() if key != "lm_head.weight"}  # which is tied
            sealed_with(checkpoint, "model.safetensors", frozen | stored)
        again, log, _ = train_arm(folder, name)
        assert log == rows
        assert all(torch.equal(again[key], weight) for key, weight in expected.items())
    assert told == []


def test_a_compiled_model_that_is_frozen_in_part_is_resumed_from_what_is_trained(tmp_path):
    """`Trainer` looks for the names of the compiled one, and passes over those of the checkpoint."""
    own = trainer(tmp_path, max_steps=1)
    own.model.model.embed_tokens.weight.requires_grad_(False)
    own.train()
    expected = own.model.model.layers[0].mlp.up_proj.weight
    again = trainer(tmp_path, max_steps=1)
    again.model.model.embed_tokens.weight.requires_grad_(False)
    plain = again.model
    again.model = again.model_wrapped = torch.compile(plain, backend="eager")
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, expected)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, expected)


def test_a_model_that_is_frozen_in_part_is_saved_whole_where_that_is_asked(tmp_path):
    own = trainer(tmp_path, max_steps=1)
    own.model.model.embed_tokens.weight.requires_grad_(False)
    own.train()
    own.save_model(str(tmp_path / "model"))
    kept = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("model", "checkpoint-1")]
    assert kept[0] - kept[1] == {"model.embed_tokens.weight"}


def test_nothing_but_damage_starts_anew(tmp_path, whole, capsys):
    train(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        flip_bit(path / "optimizer.pt")
    assert_same(train(tmp_path), whole)
    assert "training starts anew" in capsys.readouterr().err


def fill_the_disk(monkeypatch, at: str, count: int) -> None:
    """Let the count-th torch.save of a file of this name fail as on a full disk, with half of it written."""
    real, seen = torch.save, []

    def save(value, path, *arguments, **options):
        real(value, path, *arguments, **options)
        seen.append(Path(path).name)
        if seen.count(at) == count and seen[-1] == at:
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_loses_nothing(tmp_path, whole, monkeypatch):
    fill_the_disk(monkeypatch, "optimizer.pt", 3)
    with pytest.raises(PreskipError, match=r"^no space left on the disk while writing .*: free some and resume$"):
        train(tmp_path)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.undo()
    assert_same(train(tmp_path), whole)


def test_older_checkpoints_stay_until_the_new_one_is_sealed(tmp_path, monkeypatch):
    seen = {}

    def look(path):
        seen[path.name] = sorted(other.name for other in path.parent.iterdir() if (other / SEAL).exists())
        seal(path)

    monkeypatch.setattr(checkpoints, "seal", look)
    train(tmp_path)
    assert seen == {
        "checkpoint-2": [],
        "checkpoint-4": ["checkpoint-2"],
        "checkpoint-6": ["checkpoint-2", "checkpoint-4"],
    }
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_log_that_is_lost_comes_back_from_the_checkpoint(tmp_path, whole):
    class Stopped(Exception):
        pass

    def stop(step, note=""):
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path, stop)
    (tmp_path / "train.jsonl").write_text('{"step": 1, "lo')
    assert_same(train(tmp_path), whole)


def trainer(folder: Path, **changes) -> ResumableTrainer:
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(BLOCKS.astype(np.int64))]
    options = {"max_steps": 4, "save_steps": 1, "logging_steps": 4, "use_cpu": True, "report_to": [], **changes}
    return ResumableTrainer(
        model=tiny_llama(),
        args=TrainingArguments(str(folder), per_device_train_batch_size=4, disable_tqdm=True, **options),
        train_dataset=rows,
        eval_dataset=rows,
    )


class StopAt(TrainerCallback):
    """Ends a training as a kill right after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_best_checkpoint_is_kept_and_found_from_another_place(tmp_path, monkeypatch):
    """With a rate of 0 no evaluation is better than the first."""
    options = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    options |= {"greater_is_better": False, "save_total_limit": 2}
    monkeypatch.chdir(tmp_path)
    trainer(Path("run"), **options).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in Path("run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = trainer(tmp_path / "run", **options, load_best_model_at_end=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")


def test_a_resumed_training_counts_the_losses_of_before(tmp_path):
    """Logged every fourth step, stopped after the third: the logged mean is of all four, as is the whole's."""
    expected = trainer(tmp_path / "whole")
    expected.train()
    first = trainer(tmp_path / "parts")
    first.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from == tmp_path / "parts" / "checkpoint-3"
    logs = [
        [{key: row[key] for key in ("step", "loss", "train_loss") if key in row} for row in run.state.log_history]
        for run in (expected, resumed)
    ]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [4, 4]


def test_a_given_checkpoint_is_verified(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    flip_bit(tmp_path / "checkpoint-1" / "model.safetensors")
    with pytest.raises(PreskipError, match=r"checkpoint-1 cannot be used \(model.safetensors has another checksum"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(PreskipError, match="it does not exist"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))

"""The penalty on what is changed out of domain: its value and gradient written out, for every way of training."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zoo
from preskip.arms import ARMS, ArmContext, attention_paths, branch_parameters
from preskip.arms.insert import insert
from preskip.branch_settings import BranchSettings
from preskip.runs.files import read_jsonl
from preskip.train.frozen import train_frozen
from preskip.train.keep import Keep, KeepDataset, KeepTrainer, divergence
from preskip.train.settings import TrainingSettings
from preskip.train.steps import BlockDataset
from tiny_model import tiny_llama

RANDOM = np.random.default_rng(0)
BLOCKS = RANDOM.integers(2, 200, (8, 16)).astype(np.int32)
OTHER = RANDOM.integers(200, 400, (5, 16)).astype(np.int32)
RANKS = {"lora": 4, "preproj+lora": 2}
# One arm of each way in which weights come into the model: adapters, stacked ones, norms, peers, its own weights.
WAYS = ["preskip", "lora", "preproj+lora", "layernorm", "value-residual", "canon", "full"]


def context(base):
    branch, targets = BranchSettings(expansion=1.0), tuple(attention_paths(base))
    size = {"budget": branch_parameters(base, branch, targets), "match": "none", "lora_ranks": RANKS}
    return ArmContext(base=base, settings=branch, skip_position="attention", layers=None, targets=targets, **size)


def settings(**changes):
    given = {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 2e-2, "seed": 1, "save_steps": 2}
    return TrainingSettings(**{**given, **changes})


def train(built, folder, weight, stop_at=None, **changes):
    def stop(step, note=""):
        if step == stop_at:
            raise InterruptedError

    keep = None if weight is None else Keep(weight=weight, blocks=OTHER, as_base=built.as_base)
    where = {"checkpoints": folder / "checkpoints", "log": folder / "train.jsonl", "advance": stop}
    return train_frozen(built.model, BLOCKS, settings(**changes), arm="x", keep=keep, **where)


def weights(built):
    return torch.cat([weight.detach().flatten() for weight in built.trainable.values()])


def test_the_divergence_is_that_of_the_base_from_the_arm():
    torch.manual_seed(0)
    base, own = torch.randn(2, 5, 7), torch.randn(2, 5, 7, requires_grad=True)
    p, q = base[:, :-1].softmax(-1), own[:, :-1].softmax(-1)
    wanted = sum(p[r, t, v] * (p[r, t, v] / q[r, t, v]).log() for r in range(2) for t in range(4) for v in range(7))
    found = divergence(base, own)
    torch.testing.assert_close(found, wanted)
    found.backward()
    torch.testing.assert_close(own.grad[:, :-1], (q - p).detach())  # of the cross-entropy with p, by its logits
    assert not own.grad[:, -1].any()
    assert divergence(base, base).item() == 0


def test_every_fourth_sequence_brings_one_of_the_other_text_and_each_step_at_least_one():
    for batch_size, places in ((8, [0, 4]), (6, [0, 4, 6]), (2, [0, 2, 4, 6]), (1, list(range(8)))):
        data = KeepDataset(BLOCKS, 8, 3, other=OTHER, batch_size=batch_size)
        brings = [index for index in range(8) if data[index]["kept_ids"][0] >= 0]
        assert brings == places
        kept = torch.stack([data[index]["kept_ids"] for index in brings])
        assert all(any((row.numpy() == block).all() for block in OTHER) for row in kept)
        assert all((data[index]["kept_ids"] == -1).all() for index in set(range(8)) - {*places})
    assert len({tuple(data[index]["kept_ids"].tolist()) for index in range(5)}) == 5  # each block once per pass
    # Every step has as many: two of 6 in each of four steps.
    data = KeepDataset(BLOCKS, 24, 3, other=OTHER, batch_size=6)
    brings = [int(data[index]["kept_ids"][0] >= 0) for index in range(24)]
    assert [sum(brings[first : first + 6]) for first in range(0, 24, 6)] == [2, 2, 2, 2]


def test_a_process_without_rows_sums_on_the_device_that_the_others_sum_on(monkeypatch):
    """Over NCCL a tensor on the CPU cannot be reduced."""
    devices = []
    monkeypatch.setattr("preskip.train.keep.PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    monkeypatch.setattr(
        "preskip.train.keep.reduce", lambda both, how: devices.append(both.device.type) or torch.zeros(2)
    )
    assert Keep(weight=1.0, blocks=OTHER, as_base=nullcontext).mean() == 0.0
    assert devices == ["meta"]


@pytest.mark.parametrize("arm", WAYS)
def test_what_every_arm_has_changed_is_held_against_the_untouched_base(arm):
    base = tiny_llama().eval()
    ids = torch.from_numpy(OTHER[:2]).long()
    before = base(ids).logits
    with insert(ARMS[arm], context(base), seed=1) as built:
        with torch.no_grad():
            for weight in built.trainable.values():
                weight += 0.1 * torch.randn_like(weight)
        trained, flags = weights(built), [p.requires_grad for p in built.model.parameters()]
        changed = built.model(ids).logits
        assert not torch.equal(changed, before)
        with built.as_base():
            assert torch.equal(built.model(ids).logits, before)
        assert torch.equal(built.model(ids).logits, changed)
        assert torch.equal(weights(built), trained)
        assert [p.requires_grad for p in built.model.parameters()] == flags
    assert torch.equal(base(ids).logits, before)


def test_the_base_computes_without_dropout():
    model, ids = tiny_llama(attention_dropout=0.5), torch.from_numpy(OTHER[:2]).long()
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    model.train()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped), keep=SimpleNamespace(as_base=nullcontext)
    )
    assert torch.equal(KeepTrainer._of_base(trainer, model, ids), wanted)
    assert model.training


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_trainer_equals_a_written_out_loop(tmp_path, arm):
    """Losses, divergences and weights of the penalised training, by hand on a second model."""
    strength, steps = 20.0, 4
    with insert(ARMS[arm], context(tiny_llama()), seed=1) as built:
        rows = train(built, tmp_path, strength)
        found = weights(built)
    fixed = tiny_llama().eval()
    with insert(ARMS[arm], context(tiny_llama()), seed=1) as built:
        model = built.model.train()
        parameters = list(built.trainable.values())
        optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
        data = KeepDataset(BLOCKS, steps * 4, 1, other=OTHER, batch_size=4)
        for step in range(steps):
            rate = 2e-2 * (step if step < 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / (steps - 1))))
            optimizer.param_groups[0]["lr"] = rate
            ids = torch.stack([data[4 * step + i]["input_ids"] for i in range(4)])
            other = data[4 * step]["kept_ids"][None]
            nll = model(input_ids=ids, labels=ids).loss
            p, q = (m(input_ids=other).logits[:, :-1].log_softmax(-1) for m in (fixed, model))
            kl = (p.exp() * (p - q)).sum(-1).mean()
            assert rows[step]["loss"] == pytest.approx(nll.item(), abs=1e-5)
            assert rows[step]["keep_kl"] == pytest.approx(kl.item(), abs=1e-5)
            optimizer.zero_grad()
            (nll + strength * kl).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        assert torch.allclose(found, weights(built), atol=2e-5)
    assert rows[-1]["keep_kl"] > 1e-4
    assert read_jsonl(tmp_path / "train.jsonl") == rows


@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_language_models_part_is_the_mean_over_the_tokens_that_are_predicted(tmp_path, family, micro_batch):
    """So that a weight means the same on every model."""
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    base = zoo.build(family, vocab_size=400, **dropout)
    ids = torch.stack([BlockDataset(BLOCKS, 4, 1)[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        mean = base(input_ids=ids, labels=ids).loss.item()
    with insert(ARMS["preskip"], context(base), seed=1) as built:
        row, *_ = train(built, tmp_path, 20.0, steps=1, micro_batch_size=micro_batch)
    assert row["loss"] == pytest.approx(mean, abs=1e-5)


def test_micro_batches_add_up_and_a_weight_keeps_the_model_nearer(tmp_path):
    last = {}
    for name, weight, micro in (("whole", 100.0, 4), ("parts", 100.0, 1), ("weak", 1e-6, 4)):
        with insert(ARMS["lora"], context(tiny_llama()), seed=1) as built:
            rows = train(built, tmp_path / name, weight, micro_batch_size=micro, steps=6)
            last[name] = (weights(built), [row["keep_kl"] for row in rows])
    assert last["parts"][1] == pytest.approx(last["whole"][1], abs=1e-6)
    assert torch.allclose(last["parts"][0], last["whole"][0], atol=1e-5)
    assert last["whole"][1][-1] < last["weak"][1][-1]


def test_resume_gives_the_uninterrupted_result_bit_for_bit(tmp_path):
    with insert(ARMS["preskip"], context(tiny_llama()), seed=1) as built:
        rows = train(built, tmp_path / "whole", 1.0)
        whole = weights(built)
    with (
        insert(ARMS["preskip"], context(tiny_llama()), seed=1) as built,
        pytest.raises(InterruptedError),
    ):
        train(built, tmp_path / "parts", 1.0, stop_at=3)
    with insert(ARMS["preskip"], context(tiny_llama()), seed=1) as built:
        again = train(built, tmp_path / "parts", 1.0)
        assert torch.equal(weights(built), whole)
    assert [row["keep_kl"] for row in again] == [row["keep_kl"] for row in rows]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]

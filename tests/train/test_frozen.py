import mmap
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

import zoo
from preskip import PreskipConfig
from preskip.errors import PreskipError
from preskip.runs.files import read_jsonl
from preskip.train.frozen import train_frozen
from preskip.train.memory import peak_memory
from preskip.train.settings import TrainingSettings
from preskip.train.steps import BlockDataset
from tiny_model import tiny_llama

BLOCKS = np.random.default_rng(0).integers(2, 400, (8, 16)).astype(np.int32)


def settings(**changes) -> TrainingSettings:
    defaults = {"steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3, "seed": 1, "save_steps": 2}
    return TrainingSettings(**{**defaults, **changes})


def model():
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper", init_std=0.1))


def weights(peft_model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in peft_model.parameters() if p.requires_grad])


def train(peft_model, folder, **changes):
    return train_frozen(
        peft_model,
        BLOCKS,
        settings(**changes),
        arm="preskip",
        checkpoints=folder / "checkpoints",
        log=folder / "train.jsonl",
    )


def test_order_is_a_permutation_per_pass_and_depends_on_the_seed_alone():
    data = BlockDataset(BLOCKS, 20, seed=3)
    assert len(data) == 20
    assert sorted(data.order[:8]) == sorted(data.order[8:16]) == list(range(8))
    assert list(data.order) == list(BlockDataset(BLOCKS, 20, seed=3).order)
    assert list(data.order) != list(BlockDataset(BLOCKS, 20, seed=4).order)
    assert torch.equal(data[5]["input_ids"], torch.from_numpy(BLOCKS[data.order[5]]).long())


def test_a_machine_with_several_gpus_trains_on_the_same_batches(tmp_path, monkeypatch):
    set_up = TrainingArguments.__post_init__

    def on_two_gpus(self):
        set_up(self)
        self._n_gpu = 2

    expected = train(model(), tmp_path / "one")
    monkeypatch.setattr(TrainingArguments, "__post_init__", on_two_gpus)
    rows = train(model(), tmp_path / "two")
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


def test_the_launchers_mixed_precision_does_not_decide_the_dtype(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    peft_model, seen = model(), set()
    peft_model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(
        lambda module, given, output: seen.add(output.dtype)
    )
    train(peft_model, tmp_path, steps=2)
    assert seen == {torch.float32}


def test_trainer_equals_a_written_out_loop(tmp_path):
    """AdamW with warm-up and cosine on the frozen base, written out; the same batches, losses and weights."""
    steps, peak = 6, 1e-3
    by_trainer = model()
    rows = train(by_trainer, tmp_path)
    by_hand = model().train()
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    data = BlockDataset(BLOCKS, steps * 4, seed=1)
    for step in range(steps):
        rate = peak * (step if step < 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / (steps - 1))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.stack([data[4 * step + i]["input_ids"] for i in range(4)])
        loss = by_hand(input_ids=ids, labels=ids).loss
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(weights(by_trainer), weights(by_hand), atol=1e-6)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert read_jsonl(tmp_path / "train.jsonl") == rows


def test_base_stays_and_branch_moves(tmp_path):
    peft_model = model()
    base = {n: p.detach().clone() for n, p in peft_model.named_parameters() if not p.requires_grad}
    before = weights(peft_model).clone()
    train(peft_model, tmp_path)
    assert all(torch.equal(p, base[n]) for n, p in peft_model.named_parameters() if n in base)
    assert (weights(peft_model) != before).float().mean() > 0.99


def test_accumulation_equals_one_large_batch(tmp_path):
    whole, parts = model(), model()
    rows = train(whole, tmp_path / "a")
    rows_parts = train(parts, tmp_path / "b", micro_batch_size=2)
    assert [row["loss"] for row in rows_parts] == pytest.approx([row["loss"] for row in rows], abs=1e-5)
    assert torch.allclose(weights(whole), weights(parts), atol=1e-5)


@pytest.mark.parametrize("stop_at", [3, 5])
def test_resume_gives_the_uninterrupted_result_bit_for_bit(tmp_path, stop_at):
    whole = model()
    rows = train(whole, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(step, note=""):
        if step == stop_at:
            raise Stopped

    folder = tmp_path / "parts"
    with pytest.raises(Stopped):
        train_frozen(
            model(),
            BLOCKS,
            settings(),
            arm="x",
            checkpoints=folder / "checkpoints",
            log=folder / "train.jsonl",
            advance=stop,
        )
    resumed = model()
    rows_resumed = train(resumed, folder)
    assert torch.equal(weights(resumed), weights(whole))
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in rows_resumed] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in rows
    ]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    whole = model()
    train(whole, tmp_path / "whole")
    folder = tmp_path / "parts"
    train(model(), folder, steps=6)
    (folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = model()
    train(resumed, folder)
    assert torch.equal(weights(resumed), weights(whole))


def test_nan_stops_names_the_step_and_keeps_the_last_checkpoint(tmp_path):
    peft_model = model()

    def poison(step, note=""):
        if step == 3:
            with torch.no_grad():
                next(p for p in peft_model.parameters() if p.requires_grad).fill_(float("nan"))

    with pytest.raises(PreskipError, match=r"arm x: the loss is nan .* at step 4"):
        train_frozen(
            peft_model,
            BLOCKS,
            settings(),
            arm="x",
            checkpoints=tmp_path / "checkpoints",
            log=tmp_path / "train.jsonl",
            advance=poison,
        )
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file()
    assert [row["step"] for row in read_jsonl(tmp_path / "train.jsonl")] == [1, 2]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = model(), model()
    rows = train(plain, tmp_path / "a")
    rows_checkpointed = train(checkpointed, tmp_path / "b", gradient_checkpointing=True)
    assert [r["loss"] for r in rows_checkpointed] == pytest.approx([r["loss"] for r in rows], abs=1e-6)
    assert torch.allclose(weights(plain), weights(checkpointed), atol=1e-6)
    embedding = checkpointed.get_input_embeddings()
    assert not embedding._forward_hooks  # the next arm's layers in front of its own weights need no gradient


def test_nothing_to_train_is_refused(tmp_path):
    base = tiny_llama()
    base.requires_grad_(False)
    with pytest.raises(PreskipError, match="no trainable parameter"):
        train(base, tmp_path)


def test_peak_memory_sees_an_allocation():
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        block = mmap.mmap(-1, 100 * 2**20)  # pages of its own: an allocator may hand out some that it kept
        block.write(bytes(range(256)) * (100 * 2**20 // 256))
    block.close()
    assert large.bytes - small.bytes > 80 * 2**20


def test_peak_memory_sees_what_is_gone_before_the_block_ends(monkeypatch):
    sizes, seen = iter([1, 7, 7, 7]), threading.Event()

    class Process:
        def memory_info(self):
            size = next(sizes, 2)
            if size == 2:
                seen.set()
            return SimpleNamespace(rss=size)

    monkeypatch.setattr("preskip.train.memory.psutil.Process", Process)
    with peak_memory(torch.device("cpu")) as peak:
        assert seen.wait(60)
    assert peak.bytes == 7


@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_the_mean_over_the_tokens_that_are_predicted(tmp_path, family, micro_batch):
    """A block's first token is none, whatever the model's class is called."""
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    peft_model = get_peft_model(zoo.build(family, vocab_size=400, **dropout), PreskipConfig())
    ids = torch.stack([BlockDataset(BLOCKS, 4, 1)[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        mean = peft_model(input_ids=ids, labels=ids).loss.item()
    (row,) = train(peft_model, tmp_path, steps=1, micro_batch_size=micro_batch)
    assert row["loss"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_the_routers_term_of_a_mixture_of_experts_is_trained_on_and_not_reported(tmp_path, micro_batch):
    """The log holds the next-token loss alone, computed here from the logits; the weights follow the whole loss."""
    rows, moved, trained = {}, {}, {}
    for term in (True, False):
        torch.manual_seed(0)
        base = zoo.build("mixtral", vocab_size=400, output_router_logits=term, router_aux_loss_coef=5.0)
        trained[term] = get_peft_model(base, PreskipConfig(init_weights="paper", init_std=0.1))
        before = weights(trained[term])
        with torch.no_grad():
            ids = torch.stack([BlockDataset(BLOCKS, 4, 1)[i]["input_ids"] for i in range(4)])
            logits = trained[term](input_ids=ids).logits[:, :-1].flatten(0, 1)
            first = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
        rows[term] = train(trained[term], tmp_path / str(term), steps=2, micro_batch_size=micro_batch)
        moved[term] = weights(trained[term]) - before
        assert rows[term][0]["loss"] == pytest.approx(first, abs=1e-5)
    assert not torch.allclose(moved[True], moved[False], rtol=0.1)

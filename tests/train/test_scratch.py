"""Training from scratch: against a written-out loop, its groups, its log and its stops."""

import json
import math
import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import preskip.architecture  # noqa: F401
from preskip.arms.flops import forward_flops_per_token
from preskip.errors import DivergedError, PreskipError
from preskip.train.scratch import ScratchSettings, ScratchTrainer, parameter_groups, trackers, train_scratch
from preskip.train.speed import measured_peak
from preskip.train.steps import BlockDataset, fit

BLOCKS = np.random.default_rng(0).integers(2, 96, (24, 16)).astype(np.uint16)
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": None,
}  # fmt: skip


def model(model_type="preskip_llama", **changes):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}))


def settings(**changes):
    defaults = {"steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "seed": 1}
    return ScratchSettings(**{**defaults, "save_steps": 2, **changes})


def train(net, folder, **changes):
    evaluation = changes.pop("evaluation", None)
    return train_scratch(
        net,
        BLOCKS,
        settings(**changes),
        arm="preskip",
        checkpoints=folder / "checkpoints",
        log=folder / "train.jsonl",
        evaluation=evaluation,
    )


def flat(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_trainer_equals_a_written_out_loop(tmp_path):
    """AdamW in groups, warm-up, cosine to a tenth, clipping, micro-batches, the branch at half the rate: by hand."""
    by_trainer = model()
    rows = train(by_trainer, tmp_path, micro_batch_size=2, branch_rate_factor=0.5, max_grad_norm=0.5)
    by_hand = model().train()
    named = list(by_hand.named_parameters())
    branch = [p for name, p in named if ".preskip." in name]
    matrices = [p for name, p in named if ".preskip." not in name and p.ndim == 2 and "embed_tokens" not in name]
    rest = [p for name, p in named if ".preskip." not in name and (p.ndim == 1 or "embed_tokens" in name)]
    optimizer = torch.optim.AdamW(
        [
            {"params": branch, "weight_decay": 0.1},
            {"params": matrices, "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    data = BlockDataset(BLOCKS, 24, seed=1)
    for step in range(6):
        progress = (step - 2) / 4
        share = step / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group, factor in zip(optimizer.param_groups, (0.5, 1, 1), strict=True):
            group["lr"] = 1e-2 * share * factor
        ids = torch.stack([data[4 * step + i]["input_ids"] for i in range(4)])
        logits = by_hand(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert rows[step]["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert rows[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert rows[step]["learning_rate"] == pytest.approx(1e-2 * share)
    torch.testing.assert_close(flat(by_trainer), flat(by_hand), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("preskip_llama", True), ("preskip_gpt_neox", False), ("preskip_gpt2", True), ("mixtral", False)],
)
def test_only_matrices_decay(model_type, tied):
    net = model(model_type, tie_word_embeddings=tied)
    groups = parameter_groups(net, learning_rate=1.0, weight_decay=0.1, branch_rate_factor=0.25)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(net.parameters())) == sum(len(group["params"]) for group in groups)
    for name, parameter in net.named_parameters():
        is_vector = parameter.ndim == 1  # norms and biases
        is_embedding = any(part in name for part in ("embed", "wte", "wpe")) and "embed_out" not in name
        assert of[id(parameter)]["weight_decay"] == (0.0 if is_vector or is_embedding else 0.1), name
        assert of[id(parameter)]["lr"] == (0.25 if ".preskip." in name else 1.0), name


@pytest.mark.parametrize("kind", ["preskip_llama", "mixtral"])
def test_interrupted_training_ends_as_if_it_had_not_been(tmp_path, kind):
    """Of a mixture of experts, too, whose weights transformers stores under other names than the module's."""
    whole, stopped, resumed = model(kind), model(kind), model(kind)
    rows = train(whole, tmp_path / "whole", evaluation=BLOCKS[:4], eval_steps=2)

    class Stop(Exception):
        pass

    def stop(step, note):
        if step == 5:
            raise Stop

    options = {"arm": "a", "checkpoints": tmp_path / "c", "log": tmp_path / "train.jsonl", "evaluation": BLOCKS[:4]}
    with pytest.raises(Stop):
        train_scratch(stopped, BLOCKS, settings(eval_steps=2), advance=stop, **options)
    again = train_scratch(resumed, BLOCKS, settings(eval_steps=2), **options)
    assert torch.equal(flat(resumed), flat(whole))
    deterministic = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    assert [{k: row.get(k) for k in deterministic} for row in again] == [
        {k: row.get(k) for k in deterministic} for row in rows
    ]
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").open()] == again


def test_evaluation_while_training_is_the_mean_loss_of_those_blocks(tmp_path):
    net = model()
    rows = train(net, tmp_path, evaluation=BLOCKS[:5], eval_steps=3, micro_batch_size=2)
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    ids = torch.from_numpy(BLOCKS[:5].astype(np.int64))
    with torch.no_grad():
        logits = net.eval()(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # Trainer averages over batches; blocks are of one length, and the last batch may be smaller.
    assert rows[-1]["eval_loss"] == pytest.approx(loss.item(), rel=2e-3)


@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("kind", ["gpt2", "preskip_gpt2", "llama", "preskip_llama"])
def test_losses_are_means_over_the_tokens_that_are_predicted(tmp_path, kind, micro_batch):
    """A block's first token is none, whatever the model's class is called; step 1 has no learning rate yet."""
    net = model(kind, **({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if "gpt2" in kind else {}))
    data = BlockDataset(BLOCKS, 4, seed=1)
    seen = torch.stack([data[i]["input_ids"] for i in range(4)])
    held = torch.from_numpy(BLOCKS[:4].astype(np.int64))
    with torch.no_grad():
        trained, evaluated = (net(input_ids=ids, labels=ids).loss.item() for ids in (seen, held))
    (row,) = train(net, tmp_path, steps=1, micro_batch_size=micro_batch, evaluation=BLOCKS[:4], eval_steps=1)
    assert row["loss"] == pytest.approx(trained, abs=2e-5)
    assert row["eval_loss"] == pytest.approx(evaluated, abs=2e-5)


@pytest.fixture
def clock(monkeypatch):
    """A clock by which a forward pass takes a second and a checkpoint 100; the pass that `stop` counts to fails."""

    class Clock:
        now, passes, stop = 0.0, 0, None

        def perf_counter(self):
            return self.now

    watch, loss, save = Clock(), ScratchTrainer.compute_loss, ScratchTrainer._save_checkpoint

    def compute_loss(*arguments, **options):
        watch.now += 1
        watch.passes += 1
        if watch.passes == watch.stop:
            raise KeyboardInterrupt
        return loss(*arguments, **options)

    def save_checkpoint(*arguments):
        watch.now += 100
        save(*arguments)

    monkeypatch.setattr(ScratchTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(ScratchTrainer, "_save_checkpoint", save_checkpoint)
    for module in ("steps", "scratch"):
        monkeypatch.setattr(f"preskip.train.{module}.time", watch)
    return watch


@pytest.mark.parametrize("log_steps", [4, 10])
def test_the_last_step_is_logged_whatever_log_steps_is(tmp_path, log_steps):
    rows = train(model(), tmp_path, log_steps=log_steps, evaluation=BLOCKS[:4], eval_steps=log_steps)
    assert [row["step"] for row in rows] == ([4, 6] if log_steps == 4 else [6])
    assert [row["tokens"] for row in rows] == ([256, 128] if log_steps == 4 else [384])
    assert all("eval_loss" in row for row in rows)


def test_saving_and_evaluating_are_no_steps_seconds(tmp_path, clock):
    rows = train(model(), tmp_path, log_steps=4, save_steps=1, evaluation=BLOCKS[:4], eval_steps=4)
    assert [row["seconds"] for row in rows] == [4, 2]
    assert [row["tokens_per_second"] for row in rows] == [64, 64]


def test_a_row_that_a_resume_falls_into_counts_all_of_its_steps(tmp_path, clock):
    clock.stop = 4
    with pytest.raises(KeyboardInterrupt):
        train(model(), tmp_path, log_steps=4)
    rows = train(model(), tmp_path, log_steps=4)
    assert [row["step"] for row in rows] == [4, 6]
    assert [row["seconds"] for row in rows] == [4, 2]
    assert rows[0]["tokens_per_second"] == 64


def test_a_longer_training_begins_as_a_shorter_one():
    short, long = BlockDataset(BLOCKS, 10, seed=5), BlockDataset(BLOCKS, 60, seed=5)
    assert long.order[:10].tolist() == short.order.tolist()


def test_utilisation_is_speed_times_flops_over_the_peak(tmp_path):
    net = model()
    row = train(net, tmp_path, peak_flops=1e9)[-1]
    speed = row["tokens"] / row["seconds"]
    assert row["tokens"] == 64
    assert row["tokens_per_second"] == pytest.approx(speed, rel=0.05)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 3 * forward_flops_per_token(net, 16) / 1e9, rel=0.01)


def test_a_matrix_product_is_measured():
    assert 1e8 < measured_peak("cpu", torch.float32, sizes=(64, 128), seconds=0.02) < 1e14


def test_a_loss_that_is_not_finite_stops_at_once(tmp_path):
    net = model()
    with torch.no_grad():
        net.lm_head.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"the loss is nan .* at step 1: lower --lr"):
        train(net, tmp_path)


def test_a_batch_that_the_processes_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(PreskipError, match="3 processes cannot share a batch of 4"):
        train(model(), tmp_path)


def test_every_model_of_a_process_is_compiled(tmp_path, monkeypatch):
    """Dynamo counts the graphs of models that are gone, and runs what is beyond its limit eagerly, without an error."""
    monkeypatch.setattr("preskip.train.scratch.fit", partial(fit, torch_compile_backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for width in (32, 48, 64, 80):
            net = model(intermediate_size=width)
            assert len(train(net, tmp_path / str(width), compile=True, steps=2)) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiling_does_not_leave_tf32_on(tmp_path, monkeypatch, dtype):
    """Transformers switches it on for the whole process, where a GPU has it; what is scored afterwards is float32."""
    switched = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", switched.append)
    monkeypatch.setattr("preskip.train.scratch.ScratchTrainer", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model(), tmp_path, compile=True, dtype=dtype)
    assert switched[-1] is False
    switched.clear()
    with pytest.raises(ZeroDivisionError):
        train(model(), tmp_path, dtype=dtype)
    assert switched == []


def test_trackers(monkeypatch):
    monkeypatch.setattr("preskip.train.scratch.find_spec", lambda name: None)
    assert trackers(("auto",)) == trackers(("none",)) == ()
    with pytest.raises(PreskipError, match=r"--report-to wanbd is unknown to transformers: choose among .*wandb"):
        trackers(("wanbd",))
    missing = next(name for name in ("wandb", "comet_ml") if find_spec(name) is None)
    with pytest.raises(PreskipError, match=f"--report-to {missing}: .* requires"):
        trackers((missing,))
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, missing, TrainerCallback)
    assert trackers((missing, "none")) == (missing,)
    with pytest.raises(PreskipError, match="pip install tensorboard"):
        trackers(("tensorboard",))
    monkeypatch.setattr("preskip.train.scratch.find_spec", lambda name: object())
    assert trackers(("auto",)) == ("tensorboard",)


def test_every_training_has_a_run_of_its_own_at_w_and_b(tmp_path, monkeypatch):
    """Also the one after a training that ended by an error; a run that the caller has begun stays open."""
    wandb = SimpleNamespace(run=None, seen=[])

    def finish():
        wandb.run = None

    class Callback(TrainerCallback):
        """As transformers' own: it begins a run where there is none."""

        def on_train_begin(self, args, state, control, **kwargs):
            wandb.run = wandb.run or args.run_name

        def on_log(self, args, state, control, **kwargs):
            wandb.seen.append(wandb.run)

    wandb.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Callback)
    told = {"report_to": ("wandb",), "steps": 1}
    train(model(), tmp_path / "a", **told)
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(DivergedError):
        train(broken, tmp_path / "b", **told)
    assert wandb.run is None
    train(model(), tmp_path / "c", **told, seed=2)
    assert set(wandb.seen) == {"preskip seed 1", "preskip seed 2"}
    assert wandb.run is None
    wandb.run = "mine"
    train(model(), tmp_path / "d", **told)
    assert wandb.run == wandb.seen[-1] == "mine"


def test_tensorboard_files_lie_beside_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train(model(), tmp_path, report_to=("tensorboard",), peak_flops=1e9)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([row["loss"] for row in rows])
    assert {"train/tokens_per_second", "train/mfu"} <= set(events.Tags()["scalars"])


def test_bf16_computes_near_fp32_and_keeps_the_weights_fp32(tmp_path):
    exact, rounded = model(), model()
    one, two = train(exact, tmp_path / "a"), train(rounded, tmp_path / "b", dtype="bfloat16")
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)]
    assert 0 < max(differences) < 0.05

"""Training: fp32 weights that move, gradients through checkpointing and compilation, Trainer."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import zoo
from ddp_loop import adapted, branch_weights
from preskip import PreskipConfig
from preskip.adapter import PreskipLayer

SOME = ["llama", "gpt_neox", "gpt2", "bert", "gemma2"]


def loss_of(model, name: str, **kwargs) -> torch.Tensor:
    batch = zoo.inputs(name, **kwargs)
    return model(**batch, labels=batch["input_ids"]).loss


def gradients(model, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, name).backward()
    return {key: p.grad.clone() for key, p in branch_weights(model).items()}


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_stay_fp32_on_a_bf16_base(autocast: bool, tmp_path) -> None:
    base = zoo.build("llama", dtype=torch.bfloat16)
    untouched = zoo.logits(base, "llama")
    model = get_peft_model(base, PreskipConfig(), autocast_adapter_dtype=autocast)
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    zoo.randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        zoo.build("llama", dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast
    )
    through_transformers = zoo.build("llama", dtype=torch.bfloat16)
    through_transformers.load_adapter(tmp_path)
    for instance in (model, loaded, through_transformers):
        assert {p.dtype for p in branch_weights(instance).values()} == {torch.float32}
        assert {p.dtype for key, p in instance.named_parameters() if ".preskip." not in key} == {torch.bfloat16}
        assert zoo.logits(instance, "llama").dtype == torch.bfloat16
        assert torch.equal(zoo.logits(instance, "llama"), zoo.logits(model, "llama"))


def test_training_weights_that_were_cast_to_16_bits_warns() -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # as TRL does on a base in 4 or 8 bits
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"cast to 16 bits and would hardly move .* p\.data\.float\(\)"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        for parameter in trained:
            parameter.data = parameter.data.float()
        model.train()


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_after_twenty_steps_at_1e_5_the_weights_have_moved(init: str) -> None:
    """In bf16 they would stay: at |w| ≈ 0.01 half a unit in the last place is 3e-5, more than a step."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = get_peft_model(zoo.build("llama", dtype=torch.bfloat16), PreskipConfig(init_weights=init))
        for layer in model.modules():
            if isinstance(layer, PreskipLayer):
                layer.to(dtype)
        before = {key: p.detach().clone() for key, p in branch_weights(model).items()}
        optimizer = torch.optim.AdamW(branch_weights(model).values(), lr=1e-5)
        for step in range(20):
            optimizer.zero_grad()
            torch.manual_seed(step)
            ids = torch.randint(8, zoo.VOCABULARY, (4, 16))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        moved[dtype] = {}
        for part in ("up", "down", "skip"):
            changed = [p != before[key] for key, p in branch_weights(model).items() if f".{part}." in key]
            moved[dtype][part] = torch.stack(changed).float().mean().item()
    assert min(moved[torch.float32].values()) > 0.99
    assert moved[torch.bfloat16]["up"] < 0.5
    if init == "paper":
        assert moved[torch.bfloat16]["down"] < 0.5


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(name: str, use_reentrant: bool) -> None:
    model = adapted(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, name)
    assert all(torch.count_nonzero(gradient) > 0 for gradient in expected.values())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    for key, gradient in gradients(model, name).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", SOME)
def test_compiles_into_one_graph(name: str) -> None:
    model = adapted(name).eval()
    expected = zoo.logits(model, name)
    torch._dynamo.reset()
    # The backward of the others is eager, too: tracing it says no more of ours for another family.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if name == "llama" else "eager")
    assert zoo.difference(zoo.logits(compiled, name), expected) <= 1e-5
    batch = zoo.inputs(name)
    model(**batch).logits.pow(2).mean().backward()
    wanted = {key: p.grad.clone() for key, p in branch_weights(model).items()}
    model.zero_grad()
    compiled(**batch).logits.pow(2).mean().backward()
    for key, gradient in wanted.items():
        torch.testing.assert_close(branch_weights(model)[key].grad, gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    model = adapted().eval()
    expected = zoo.logits(model, "llama")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert zoo.difference(zoo.logits(compiled, "llama"), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_trains_the_branches_and_nothing_else(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(zoo.build("llama"), PreskipConfig(dropout=0.1))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(8, zoo.VOCABULARY, (16, 12))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, gradient_checkpointing=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".preskip." in key}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]

    # A checkpoint holds the adapter alone, and resuming from it ends where the whole run ended.
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    again = get_peft_model(zoo.build("llama"), PreskipConfig(dropout=0.1))
    resumed = Trainer(model=again, args=arguments, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for key, weight in branch_weights(again).items():
        torch.testing.assert_close(weight, after[key], rtol=1e-5, atol=1e-6, msg=key)

"""TRL's trainers with a Preskip adapter: what is trained, what the reference model is, what saving and merging do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import zoo
from preskip import PreskipConfig
from tiny_text import tiny_tokenizer

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
TEXTS = ["Ships had waited in the harbor.", "The harbor was cold.", "They had waited for weeks.", "Snow fell."]


def base() -> Any:
    return zoo.build("llama", vocab_size=400, bos_token_id=0, eos_token_id=1, max_position_embeddings=256)


def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.pad_token = made.pad_token or made.eos_token
    return made


def moved(model: PeftModel) -> set[str]:
    """Names of the weights that differ from a fresh base's and its fresh adapter's: W_down and W_skip start at 0."""
    fresh = base().state_dict()
    named = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    own = {name for name, weight in named.items() if name not in fresh and weight.abs().max() > 0}
    return own | {name for name, weight in named.items() if name in fresh and not torch.equal(weight, fresh[name])}


def check(trainer: Any, folder: Path) -> None:
    """Trained is the adapter alone; saved and loaded it gives the same logits."""
    assert isinstance(trainer.model, PeftModel)
    names = moved(trainer.model)
    assert len(names) == 6
    assert all(".preskip." in name for name in names)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in trainer.state.log_history if "loss" in row)
    trainer.save_model(str(folder))
    ids = torch.arange(8, 20)[None]
    loaded = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        assert zoo.difference(trainer.model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits) == 0.0
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        trainer.model.merge_adapter()


def test_sft(tmp_path) -> None:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=base(),
        args=SFTConfig(str(tmp_path / "out"), max_length=32, **SETTINGS),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
        peft_config=PreskipConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    check(trainer, tmp_path / "adapter")


def test_dpo_takes_the_base_itself_for_its_reference(tmp_path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": TEXTS, "chosen": TEXTS[::-1], "rejected": [*TEXTS[1:], TEXTS[0]]}
    trainer = DPOTrainer(
        model=base(),
        args=DPOConfig(str(tmp_path / "out"), max_length=32, beta=0.1, **SETTINGS),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=PreskipConfig(task_type="CAUSAL_LM"),
    )
    assert trainer.ref_model is None
    trainer.train()
    check(trainer, tmp_path / "adapter")
    first = next(row for row in trainer.state.log_history if "loss" in row)
    # Model and reference are equal at the start, so the loss is -log σ(0).
    assert first["loss"] == pytest.approx(-F.logsigmoid(torch.tensor(0.0)).item(), abs=1e-5)
    ids = torch.arange(8, 20)[None]
    with torch.no_grad(), trainer.model.eval().disable_adapter():
        assert zoo.difference(trainer.model(input_ids=ids).logits, base()(input_ids=ids).logits) <= 1e-6


def test_grpo_with_a_penalty_against_the_base(tmp_path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **kwargs):
        return [float(len(set(text))) for text in completions]

    trainer = GRPOTrainer(
        model=base(),
        reward_funcs=reward,
        args=GRPOConfig(
            str(tmp_path / "out"), num_generations=2, max_completion_length=6, beta=0.1, temperature=1.0, **SETTINGS
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer(),
        peft_config=PreskipConfig(task_type="CAUSAL_LM"),
    )
    assert trainer.ref_model is None
    trainer.train()
    check(trainer, tmp_path / "adapter")
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)

"""Every option of a pretraining run, beside those that every experiment has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.arms import SCRATCH_ARMS, resolve_arms
from preskip.branch_settings import ATTENTION_LAYERS, BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.options import DTYPES, EVALUATION, TRAINING, WHAT, ExperimentConfig
from preskip.experiment.parse import parse_by_arm, parse_names, parse_overrides, parse_tokens
from preskip.fields import option

MODEL = "Model"
# From scratch nothing is there that an identity would have to keep.
PAPER = BranchSettings(init_weights="paper")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The fields of an architecture's config that have flags of their own."""

    num_layers: int | None = option(None, "Number of layers.", MODEL, key="num_hidden_layers")
    hidden_size: int | None = option(None, "Width of the model.", MODEL)
    heads: int | None = option(None, "Attention heads.", MODEL, key="num_attention_heads")
    kv_heads: int | None = option(None, "Key-value heads.", MODEL, key="num_key_value_heads")
    mlp_width: int | None = option(None, "Inner width of the MLP.", MODEL, key="intermediate_size")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ExperimentConfig):
    """What a pretraining run does. The defaults train a small Llama on the embedded corpus, in minutes on two cores.

    `tokens` are rounded to whole steps (base-flops: as many FLOPs instead).

    Raises:
        PreskipError: a value is out of range.
    """

    command = "pretrain"
    rates = ("learning_rate", "learning_rates")

    arch: str = option("llama-1m", "pythia-70m, llama-1m, ...: a shape by name, or a config.json.", MODEL, path=True)
    overrides: dict[str, Any] = option(
        {},
        "Any field of the config: tie_word_embeddings=true; repeatable.",
        MODEL,
        flag="set",
        read=parse_overrides,
        many=True,
        parts=ModelSizes,
    )
    tokenizer: str | None = option(
        None, "A model's, a folder or a tokenizer.json. Default: one trained on the text.", WHAT, path=True
    )
    vocab_size: int = option(2048, "Tokens of the tokenizer that is trained.", WHAT, least=258)
    arms: tuple[str, ...] = option(("base", "base-wide", "base-flops", "preskip"), f"{', '.join(SCRATCH_ARMS)}.")
    layers: tuple[int | str, ...] | None = option(
        None, "Layers that get a branch, e.g. 0-5,10. Default: all. The depth is --num-layers."
    )
    settings: BranchSettings = PAPER
    seeds: tuple[int, ...] = (1,)
    tokens: int = option(1_000_000, "Training tokens per arm, e.g. 5M.", TRAINING, least=1, read=parse_tokens)
    repeat: bool = option(False, "Allow text to be read more than once.", TRAINING)
    batch_size: int = 32
    learning_rate: float = option(3e-3, above=0, below=10, flag="lr")
    learning_rates: dict[str, float] = option({}, "Peak learning rate: 3e-3, or preskip=2e-3; repeatable.")
    branch_rate_factor: float = option(
        1.0,
        "Learning rate of the branch's matrices over that of the rest.",
        TRAINING,
        above=0,
        below=1000,
        flag="branch_lr_factor",
    )
    warmup_steps: int | None = option(None, "Steps of the warm-up. Default: a tenth.", TRAINING, least=0)
    final_rate: float = option(
        0.1, "Last learning rate over the peak.", TRAINING, least=0, most=1, allowed="it is a share of the peak, 0 to 1"
    )
    weight_decay: float = option(0.1, "Of matrices only.", TRAINING, least=0, below=10)
    beta2: float = option(0.95, "AdamW's second decay.", TRAINING, above=0, below=1)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this.", TRAINING, above=0)
    dtype: str = option("auto", "Compute in auto, float32 or bfloat16; weights are float32.", choices=DTYPES[:3])
    compile: bool = option(False, "torch.compile the model.", TRAINING)
    log_steps: int = option(1, "Steps per line of train.jsonl.", TRAINING, least=1)
    save_steps: int = 500
    keep_checkpoints: int = option(2, "How many of the newest to keep, while an arm trains.", TRAINING, least=2)
    report_to: tuple[str, ...] = option(
        ("auto",), "tensorboard, wandb, ... or none. Default: TensorBoard if installed.", TRAINING, read=parse_names
    )
    peak_flops: float | None = option(
        None, "FLOP/s for the utilisation. Default: those of a matrix product, measured.", TRAINING, above=0
    )
    eval_steps: int = option(100, "Steps between evaluations on development documents.", EVALUATION, least=1)
    eval_blocks: int = option(64, "Sequences of such an evaluation.", EVALUATION, least=1)
    heldout_fraction: float = option(0.1, "Share of documents held out; not of corpora with published parts.")
    context_length: int | None = option(
        None, "Most tokens of context while scoring documents. Default: --seq-len.", EVALUATION, least=1
    )
    eval_words: int = 400

    def __post_init__(self) -> None:
        resolve_arms(self.arms, SCRATCH_ARMS)
        super().__post_init__()
        if self.layers == (ATTENTION_LAYERS,):
            raise PreskipError("--layers attention is for models with other layers, too: here each layer has attention")
        if self.eval_steps % self.log_steps:
            raise PreskipError(f"--eval-steps {self.eval_steps} must be a multiple of --log-steps {self.log_steps}")
        if self.tokens < self.tokens_per_step:
            raise PreskipError(
                f"--tokens {self.tokens:,} is less than one step of {self.batch_size} x {self.seq_len}: raise it"
            )

    @property
    def subject(self) -> str:
        """What the run directory is named after."""
        return Path(self.arch).stem

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step reads."""
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimiser steps of every arm but base-flops."""
        return round(self.tokens / self.tokens_per_step)

    @property
    def scoring_context(self) -> int:
        """Most tokens of context while scoring documents."""
        return self.seq_len if self.context_length is None else self.context_length

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up of a training of `steps`."""
        return max(1, steps // 10) if self.warmup_steps is None else self.warmup_steps

    def rate(self, arm: str) -> float:
        """Peak learning rate of an arm."""
        return self.learning_rates.get(arm, self.learning_rate)

    def _refuse_ignored(self) -> None:
        """See `ExperimentConfig._refuse_ignored`."""
        super()._refuse_ignored()
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise PreskipError(f"--warmup-steps {self.warmup_steps} is not below the {self.steps} steps: lower it")
        if self.steps < 2 and self.warmup_steps != 0:
            raise PreskipError(
                f"--tokens {self.tokens:,} is one step of {self.batch_size} x {self.seq_len}, at the warm-up's rate of "
                "0: raise it, or give --warmup-steps 0"
            )
        if self.tokenizer is not None and self.vocab_size != PretrainConfig.vocab_size:
            raise PreskipError(
                f"--vocab-size {self.vocab_size} is for a tokenizer that is trained: leave it or --tokenizer out"
            )

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "lr" in values:
            everyone, values["learning_rates"] = parse_by_arm(values.pop("lr"), example="3e-3 or --lr skip=1e-3")
            if everyone is not None:
                values["learning_rate"] = everyone
        return values

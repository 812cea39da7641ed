"""Every option of a pretraining run, validated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_by_arm, parse_extent

DTYPES = ("auto", "float32", "bfloat16")
ARM_NAMES = ("base", "base-wide", "base-deep", "base-flops", "skip", "preproj", "preskip", "parallel")
# The smallest value of each count; two documents are the fewest that give an interval.
LEAST = {
    "tokens": 1,
    "batch_size": 1,
    "micro_batch_size": 1,
    "seq_len": 2,
    "warmup_steps": 0,
    "log_steps": 1,
    "eval_steps": 1,
    "eval_blocks": 1,
    "save_steps": 1,
    "keep_checkpoints": 2,
    "context_length": 1,
    "eval_documents": 2,
    "eval_words": 1,
    "eval_batch_tokens": 1,
    "split_seed": 0,
    "vocab_size": 258,
}
# From scratch nothing is there that an identity would have to keep.
PAPER = BranchSettings(init_weights="paper")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What a pretraining run does. The defaults train a small Llama on the embedded corpus, in minutes on two cores.

    Args:
        arch: name of a shape (`preskip.architecture.shapes.SHAPES`), or path of a `config.json` of a plain model.
        overrides: fields of the architecture's config to change, e.g. {"num_hidden_layers": 5}.
        corpus: embedded name, `wikitext2` or `books` of the data directory, Hub id, text file, table or folder.
        text_column: column of a table or Hub data set; None finds it.
        corpus_split: split of a Hub data set or a folder of tables.
        data_dir: folder with local data (`preskip.data.local`); None for none.
        tokenizer: of a model, a folder or a `tokenizer.json`; None trains one of `vocab_size` on the training text.
        vocab_size: of the tokenizer that is trained.
        arms: names of the arms to compare (`preskip.pretrain.arms.ARMS`).
        settings: the branch of the arm preskip; the iso-parameter controls are matched to it.
        skip_position: see `PreskipConfig`.
        seeds: one training per arm and seed; a seed sets initialisation and data order, the same for all arms.
        tokens: training tokens per arm, rounded to whole steps (base-flops: as many FLOPs instead).
        repeat: allow text to be read more than once where there is less than `tokens`.
        batch_size: sequences per optimiser step.
        micro_batch_size: sequences per forward pass; None for batch_size.
        seq_len: tokens per training sequence.
        learning_rate: peak, of every arm without its own.
        learning_rates: peak by arm.
        branch_rate_factor: learning rate of the branch's matrices over that of the rest.
        warmup_steps: None for a tenth of the steps, at least one.
        final_rate: learning rate at the end over the peak.
        weight_decay: of matrices.
        beta2: AdamW's second decay.
        max_grad_norm: gradients are clipped to this norm.
        dtype: the forward pass computes in this; auto is bfloat16 where the processor does. Weights are float32.
        device: "auto", "cpu" or "cuda".
        attn_implementation: as in transformers; None for its default.
        compile: torch.compile the model.
        gradient_checkpointing: trade time for memory.
        log_steps: optimiser steps per line of train.jsonl.
        eval_steps: optimiser steps between evaluations while training, on development documents.
        eval_blocks: sequences of such an evaluation.
        save_steps: optimiser steps between checkpoints.
        keep_checkpoints: how many of the newest are kept; none once the arm is done.
        report_to: experiment trackers; ("auto",) is TensorBoard where it is installed.
        peak_flops: FLOPs per second that utilisation is held against; None measures a matrix product.
        heldout_fraction: share of documents held out for evaluation; not for corpora with published parts.
        split_seed: seed of that choice, and of the order of documents in the packed file.
        context_length: most tokens of context while scoring documents; None for seq_len.
        eval_documents: held-out documents to score.
        eval_words: words scored per document, from its beginning.
        eval_corpora: corpora that no arm trains on: NAME or NAME:DOCUMENTSxWORDS.
        eval_batch_tokens: padded tokens per forward pass while scoring.
        trust_remote_code: allow code of the tokenizer's repository to run.

    Raises:
        PreskipError: a value is out of range.
    """

    arch: str = "llama-1m"
    overrides: dict[str, Any] = field(default_factory=dict)
    corpus: str = "sotu"
    text_column: str | None = None
    corpus_split: str = "train"
    data_dir: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 2048
    arms: tuple[str, ...] = ("base", "base-wide", "base-flops", "preskip")
    settings: BranchSettings = PAPER
    skip_position: str = "attention"
    seeds: tuple[int, ...] = (1,)
    tokens: int = 1_000_000
    repeat: bool = False
    batch_size: int = 32
    micro_batch_size: int | None = None
    seq_len: int = 128
    learning_rate: float = 3e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    branch_rate_factor: float = 1.0
    warmup_steps: int | None = None
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    log_steps: int = 1
    eval_steps: int = 100
    eval_blocks: int = 64
    save_steps: int = 500
    keep_checkpoints: int = 2
    report_to: tuple[str, ...] = ("auto",)
    peak_flops: float | None = None
    heldout_fraction: float = 0.1
    split_seed: int = 0
    context_length: int | None = None
    eval_documents: int = 50
    eval_words: int = 400
    eval_corpora: tuple[str, ...] = ()
    eval_batch_tokens: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise PreskipError(f"{_flag(name)} {value} is not possible: it must be at least {least}")
        for name, low, high in (
            ("heldout_fraction", 0, 1),
            ("learning_rate", 0, 10),
            ("branch_rate_factor", 0, 1000),
            ("max_grad_norm", 0, float("inf")),
            ("beta2", 0, 1),
        ):
            if not low < getattr(self, name) < high:
                raise PreskipError(
                    f"{_flag(name)} {getattr(self, name)} is not possible: it must be > {low} and < {high}"
                )
        if not 0 <= self.final_rate <= 1:
            raise PreskipError(f"--final-rate {self.final_rate} is not possible: it is a share of the peak, 0 to 1")
        if not 0 <= self.weight_decay < 10:
            raise PreskipError(f"--weight-decay {self.weight_decay} is not possible: it must be >= 0 and < 10")
        unknown = next((arm for arm in (*self.arms, *self.learning_rates) if arm not in ARM_NAMES), None)
        if unknown is not None:
            raise PreskipError(f"unknown arm {unknown!r}: choose from {', '.join(ARM_NAMES)}")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise PreskipError("--arms needs one or more different arms")
        for arm, rate in self.learning_rates.items():
            if arm not in self.arms:
                raise PreskipError(f"--lr names {arm!r}, which is not compared: add it to --arms, or leave it out")
            if not 0 < rate < 10:
                raise PreskipError(f"--lr {arm}={rate} is not possible: it must be > 0 and < 10")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise PreskipError("--seeds needs one or more different numbers >= 0 and < 2^32, e.g. 1,2,3")
        if self.dtype not in DTYPES:
            raise PreskipError(f"--dtype {self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        if self.batch_size % self.micro_batch:
            raise PreskipError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}"
            )
        if self.eval_steps % self.log_steps:
            raise PreskipError(f"--eval-steps {self.eval_steps} must be a multiple of --log-steps {self.log_steps}")
        for text in self.eval_corpora:
            parse_extent(text, self.eval_documents, self.eval_words)
        if self.tokens < self.tokens_per_step:
            raise PreskipError(
                f"--tokens {self.tokens:,} is less than one step of {self.batch_size} x {self.seq_len}: raise it"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

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

    def to_json(self) -> dict[str, Any]:
        """Every option, as run.json stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> PretrainConfig:
        """The inverse of `to_json`.

        Raises:
            PreskipError: a field is unknown or has a wrong value: the run is of another version, or of `preskip probe`.
        """
        values = dict(stored)
        try:
            values["settings"] = BranchSettings(**values["settings"])
            for name in ("arms", "seeds", "report_to", "eval_corpora"):
                values[name] = tuple(values[name])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise PreskipError(f"run.json holds no configuration of this `preskip pretrain`: {error}") from None


def parse_tokens(text: str) -> int:
    """Read `--tokens`: `5000000`, `5e6`, `5M` or `1.5B`.

    Raises:
        PreskipError: not a number of tokens.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    digits, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1.0)
    try:
        return int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise PreskipError(f"--tokens {text!r} is not a number of tokens, e.g. 5M or 5000000") from None


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--set` options, fields of the architecture's config: `rope_theta=10000` or `tie_word_embeddings=true`.

    Raises:
        PreskipError: not of this form.
    """
    import json

    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise PreskipError(f"--set {text!r} is not FIELD=VALUE, e.g. --set tie_word_embeddings=true")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def parse_rates(texts: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """Read `--lr` options: `3e-3` for every arm, `preskip=2e-3` for one.

    Raises:
        PreskipError: not a number.
    """
    return parse_by_arm(texts, float, "--lr", "3e-3 or --lr skip=1e-3")


def _flag(name: str) -> str:
    return "--" + {"branch_rate_factor": "branch-lr-factor", "learning_rate": "lr"}.get(name, name).replace("_", "-")

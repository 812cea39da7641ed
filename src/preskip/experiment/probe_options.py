"""Every option of a probe, validated once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from preskip.arms.arm import MATCHES
from preskip.arms.catalogue import ARMS, LORA_ARMS, resolve_arms
from preskip.attach import SKIP_POSITIONS
from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_by_arm, parse_extent

T = TypeVar("T")
PACKINGS = ("packed", "paragraphs")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The smallest value of each count; two documents are the fewest that give an interval.
LEAST = {
    "steps": 2,  # the first one warms up from a rate of 0
    "batch_size": 1,
    "micro_batch_size": 1,
    "seq_len": 2,
    "context_length": 1,
    "eval_documents": 2,
    "eval_words": 1,
    "last_word_items": 0,
    "eval_batch_tokens": 1,
    "save_steps": 1,
    "split_seed": 0,
    "task_limit": 1,
    "development_documents": 2,
    "development_words": 1,
    "ablation_documents": 0,
}
LR_MODES = ("default", "fixed", "tune")
NULLS = ("noise", "shuffled")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What a probe does. The defaults run the embedded model in a few minutes on two cores.

    Args:
        model: embedded name, Hub id, local folder or GGUF file.
        corpus: embedded name, Hub id, text file, folder or JSONL file.
        text_column: column of a table or Hub data set; None finds it.
        corpus_split: split of a Hub data set or a folder of tables.
        preset: name of the preset that the options started from, for the record.
        data_dir: folder with local evaluation data (`preskip.data.local`); None for none.
        arms: names of the arms to compare; `none` is always among them.
        match: what the arms have in common with the reference: "params", "flops" or "none" (`ArmContext`).
        lora_ranks: rank of each LoRA arm by name for `match="none"`; a number below 1 is a share of the width.
        lora_scale: factor on LoRA's update, alpha over rank, of every LoRA arm but `rslora`.
        seeds: one training per arm and seed; a seed sets initialisation, data order and dropout.
        steps: optimiser steps.
        batch_size: sequences per optimiser step.
        micro_batch_size: sequences per forward pass; None for batch_size.
        seq_len: tokens per training sequence.
        learning_rates: peak learning rate by arm; an absent arm takes its own default, or is tuned.
        lr_mode: "default" or "fixed" take the above; "tune" searches every arm that has no rate of its own
            (`preskip.probe.search`).
        tune_seed: seed of the trainings that choose the rate, none of `seeds`.
        development_documents: documents to choose the rate on, of the corpus and of every out-of-domain corpus.
        development_words: words of each.
        layers: layer indices to adapt; None for all.
        target_modules: regular expression of the attention modules to adapt; None for all of the text decoder.
        exclude_modules: regular expression of modules to leave out.
        dtype: of the base's weights; auto is bfloat16 where the processor computes in it, else float32. The inserted
            weights are float32 always.
        device: "auto", "cpu" or "cuda".
        attn_implementation: as in transformers; None for its default.
        gradient_checkpointing: trade time for memory.
        settings: the branch that the arm preskip inserts, and that sets the budget.
        skip_position: see `PreskipConfig`.
        heldout_fraction: share of documents held out for evaluation.
        split_seed: seed of that choice, the same for all seeds.
        context_length: most tokens of context while scoring documents.
        eval_documents: held-out documents to score.
        eval_words: words scored per document, from its beginning.
        last_word_items: last-word items to score; 0 for none.
        tasks: lm-eval tasks to score every arm on, such as lambada_openai.
        task_limit: items of each task, a fixed random sample; None for all.
        eval_corpora: corpora that no arm trains on: NAME or NAME:DOCUMENTSxWORDS. The training corpus may be among
            them: its extent is then that of the in-domain set, which lets one list serve several trainings.
        nulls: controls of the depth picture to train: "noise", "shuffled".
        equal_step: train preskip once more with equalised steps per layer.
        dtype_audit: score the untouched base in fp32, with bf16 weights and under bf16 autocast, too.
        ablation_documents: held-out documents on which each layer's parts are switched off; 0 for none.
        paper_scoring: score by the paper's own protocol, too.
        packing: training sequences: "packed" blocks of running text, or "paragraphs", padded or cut (the paper's).
        eval_batch_tokens: padded tokens per forward pass while scoring; None for 512 on a CPU, else 4,096.
        save_steps: optimiser steps between checkpoints.
        trust_remote_code: allow code of the model's repository to run.

    Raises:
        PreskipError: a value is out of range.
    """

    model: str = "smollm2"
    corpus: str = "sotu"
    preset: str = "quick"
    data_dir: str | None = None
    text_column: str | None = None
    corpus_split: str = "train"
    match: str = "params"
    lora_ranks: dict[str, float] = field(default_factory=dict)
    lora_scale: float = 1.0
    arms: tuple[str, ...] = ("none", "preskip", "lora")
    seeds: tuple[int, ...] = (42,)
    steps: int = 16
    batch_size: int = 8
    micro_batch_size: int | None = None
    seq_len: int = 128
    learning_rates: dict[str, float] = field(default_factory=dict)
    lr_mode: str = "default"
    tune_seed: int = 0
    development_documents: int = 24
    development_words: int = 100
    layers: tuple[int, ...] | None = None
    target_modules: str | None = None
    exclude_modules: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    settings: BranchSettings = field(default_factory=BranchSettings)
    skip_position: str = "attention"
    heldout_fraction: float = 0.2
    split_seed: int = 0
    context_length: int = 256
    eval_documents: int = 50
    eval_words: int = 140
    last_word_items: int = 80
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    eval_corpora: tuple[str, ...] = ()
    nulls: tuple[str, ...] = ()
    equal_step: bool = False
    dtype_audit: bool = False
    ablation_documents: int = 0
    paper_scoring: bool = False
    packing: str = "packed"
    eval_batch_tokens: int | None = None
    save_steps: int = 50
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        resolve_arms(self.arms)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise PreskipError(f"{_flag(name)} {value} is not possible: it must be at least {least}")
        if not 0 < self.heldout_fraction < 1:
            raise PreskipError(f"--heldout-fraction {self.heldout_fraction} is not possible: it must be > 0 and < 1")
        if self.batch_size % self.micro_batch:
            raise PreskipError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise PreskipError("--seeds needs one or more different numbers, e.g. 1,2,3")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise PreskipError(f"--seeds {seed} is not possible: a seed must be >= 0 and < 2^32")
        if self.dtype not in DTYPES:
            raise PreskipError(f"--dtype {self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        if self.match not in MATCHES:
            raise PreskipError(f"--match {self.match!r} is unknown: choose one of {', '.join(MATCHES)}")
        if self.lr_mode not in LR_MODES:
            raise PreskipError(f"learning-rate mode {self.lr_mode!r} is unknown: choose one of {', '.join(LR_MODES)}")
        if self.lr_mode == "tune" and self.tune_seed in self.seeds:
            raise PreskipError(f"seed {self.tune_seed} chooses the learning rates: give another --tune-seed or --seeds")
        if self.packing not in PACKINGS:
            raise PreskipError(f"--packing {self.packing!r} is unknown: choose one of {', '.join(PACKINGS)}")
        for arm, rank in self.lora_ranks.items():
            if arm not in LORA_ARMS or not (0 < rank < 1 or (1 <= rank < math.inf and rank % 1 == 0)):
                raise PreskipError(
                    f"--lora-rank {arm}={rank:g}: give a whole rank, or a share of the width below 1, to "
                    f"{', '.join(LORA_ARMS)}"
                )
        if not 0 < self.lora_scale < math.inf:
            raise PreskipError(f"--lora-scale {self.lora_scale} is not possible: it must be a number above 0")
        for null in self.nulls:
            if null not in NULLS:
                raise PreskipError(f"--nulls {null!r} is unknown: choose among {', '.join(NULLS)}")
        if self.ablation_documents == 1:
            raise PreskipError("--ablation-documents 1 is not possible: an interval needs 2 or more, 0 leaves it out")
        for text in self.eval_corpora:
            parse_extent(text, self.eval_documents, self.eval_words)
        if self.skip_position not in SKIP_POSITIONS:
            raise PreskipError(f"--skip-position {self.skip_position!r}: choose {' or '.join(SKIP_POSITIONS)}")
        for arm, rate in self.learning_rates.items():
            if arm not in ARMS or not ARMS[arm].trains:
                trained = ", ".join(name for name in ARMS if ARMS[name].trains)
                raise PreskipError(f"--lr names {arm!r}: choose one of {trained}")
            if arm not in self.arms:
                raise PreskipError(f"--lr names {arm!r}, which is not compared: add it to --arms, or leave it out")
            if not 0 < rate < 10:
                raise PreskipError(f"--lr {arm}={rate} is not possible: it must be > 0 and < 10")
        for name in ("target_modules", "exclude_modules"):
            _check_pattern(_flag(name), getattr(self, name))
        if self.target_modules is not None and self.layers is not None:
            raise PreskipError("--layers cannot be combined with --target-modules: name the layers in the expression")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise PreskipError("--layers needs one or more different layer indices")

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    def learning_rate(self, arm: str) -> float | None:
        """Peak learning rate of an arm as given, or its default (tuned: the grid's centre); None for `none`."""
        return self.learning_rates.get(arm, ARMS[arm].learning_rate)

    def is_tuned(self, arm: str) -> bool:
        """Whether the arm's learning rate is searched for."""
        return self.lr_mode == "tune" and ARMS[arm].trains and arm not in self.learning_rates

    def to_json(self) -> dict[str, Any]:
        """Every option, as run.json stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ProbeConfig:
        """The inverse of `to_json`.

        Raises:
            PreskipError: a field is unknown or has a wrong value: the run is of another version.
        """
        values = dict(stored)
        try:
            values["settings"] = BranchSettings(**values["settings"])
            for name in ("arms", "seeds", "layers", "tasks", "eval_corpora", "nulls"):
                values[name] = tuple(values[name]) if values[name] is not None else None
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise PreskipError(f"run.json holds a configuration of another version: {error}") from None


def parse_learning_rates(texts: Sequence[str], arms: Sequence[str]) -> dict[str, float]:
    """Read `--lr` options: `1e-3` for every trained arm, or `arm=1e-3` for one.

    Raises:
        PreskipError: not a number.
    """
    trained = [name for name in arms if name in ARMS and ARMS[name].trains]
    everyone, by_arm = parse_by_arm(texts, float, "--lr", "3e-4 or --lr lora=1e-3")
    return by_arm if everyone is None else dict.fromkeys(trained, everyone) | by_arm


def parse_lora_ranks(texts: Sequence[str]) -> dict[str, float]:
    """Read `--lora-rank` options: `480` or `0.625` (of the width) for every LoRA arm, or `preproj+lora=64` for one.

    Raises:
        PreskipError: not a number.
    """
    everyone, by_arm = parse_by_arm(texts, float, "--lora-rank", "64, 0.625 (of the width) or preproj+lora=64")
    return by_arm if everyone is None else dict.fromkeys(LORA_ARMS, everyone) | by_arm


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Read `--layers`: `0-5,10` gives 0, 1, 2, 3, 4, 5, 10; None gives None.

    Raises:
        PreskipError: not a list of numbers and ranges.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            layers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise PreskipError(f"--layers {text!r} is not a list of layers, e.g. 0-5,10") from None
    return tuple(layers)


def _check_pattern(flag: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise PreskipError(f"{flag} {pattern!r} is not a regular expression: {error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

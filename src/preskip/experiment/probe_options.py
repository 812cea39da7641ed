"""Every option of a probe, beside those that every experiment has."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from preskip.arms import ARMS
from preskip.arms.arm import MATCHES
from preskip.arms.catalogue import LORA_ARMS, resolve_arms
from preskip.errors import PreskipError
from preskip.evaluate.task_settings import TaskSettings
from preskip.experiment.options import EVALUATION, TRAINING, WHAT, ExperimentConfig
from preskip.experiment.parse import by_arm_texts, parse_by_arm, parse_names
from preskip.fields import option

LR_MODES = ("default", "fixed", "tune")
LR_RULES = ("in-domain", "frontier")
NULLS = ("noise", "shuffled")
# What some options serve, as `preskip.fields.option` takes it.
TUNE = ("--lr tune", "lr_mode", "tune")
TASKS = ("--tasks", "tasks")


def parse_lora_ranks(given: Any) -> dict[str, float]:
    """Read `--lora-rank` options: `480` or `0.625` (of the width) for every LoRA arm, or `preproj+lora=64` for one.

    Raises:
        PreskipError: not a number.
    """
    everyone, by_arm = parse_by_arm(given, "--lora-rank", "64, 0.625 (of the width) or preproj+lora=64")
    return by_arm if everyone is None else dict.fromkeys(LORA_ARMS, everyone) | by_arm


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(ExperimentConfig):
    """What a probe does. The defaults run the embedded model in a few minutes on two cores.

    Raises:
        PreskipError: a value is out of range.
    """

    command = "probe"
    rates = ("learning_rates", "lr_mode")

    model: str = option("smollm2", "smollm2 (embedded), a Hub id, a folder, a GGUF file.", positional=True, path=True)
    preset: str = option("quick", "quick, standard, confirmatory or paper: where the other options start from.", WHAT)
    arms: tuple[str, ...] = option(("none", "preskip", "lora"), f"{', '.join(ARMS)}.")
    seeds: tuple[int, ...] = (42,)
    match: str = option(
        "params",
        "What arms have in common: params, flops, or none (with --lora-rank).",
        WHAT,
        choices=MATCHES,
    )
    lora_ranks: dict[str, float] = option(
        {},
        "For --match none: 480, 0.625 of the width, preproj+lora=64; repeatable.",
        WHAT,
        flag="lora_rank",
        read=parse_lora_ranks,
        many=True,
        serves=("--match none", "match", "none"),
    )
    lora_scale: float = option(
        1.0, "LoRA's alpha over its rank; not of rslora.", WHAT, above=0, allowed="it must be a number above 0"
    )
    target_modules: str | None = option(None, "Regular expression of the attentions to adapt.", WHAT)
    exclude_modules: str | None = option(None, "Regular expression of the attentions to leave out.", WHAT)
    # The first step warms up from a rate of 0.
    steps: int = option(16, "Optimiser steps.", TRAINING, least=2)
    learning_rates: dict[str, float] = option({}, "Peak learning rate: 3e-4, preskip=1e-3, or tune; repeatable.")
    lr_mode: str = option("default", choices=LR_MODES)
    tune_seed: int = option(
        0, "Seed of the trainings of --lr tune, beside that of --seeds.", TRAINING, least=0, serves=TUNE
    )
    tune_share: float = option(
        0.5,
        "Share of --steps after which --lr tune compares rates; 1: --lr-harm holds for what is compared.",
        TRAINING,
        above=0,
        most=1,
        serves=TUNE,
    )
    lr_rule: str = option(
        "in-domain",
        "--lr tune takes the best in-domain, or frontier: of those within --lr-harm.",
        TRAINING,
        choices=LR_RULES,
        serves=TUNE,
    )
    lr_harm: float = option(
        0.01,
        "Most bits per byte that --lr-rule frontier may lose on an out-of-domain text.",
        TRAINING,
        least=0,
        serves=("--lr-rule frontier", "lr_rule", "frontier"),
    )
    development_documents: int = option(
        24, "Documents per corpus that --lr tune chooses on.", TRAINING, least=2, serves=TUNE
    )
    development_words: int = option(100, "Words of each of these.", TRAINING, least=1, serves=TUNE)
    reuse_prefix: bool = option(True, "Compute layers before an arm's first trained one once per batch.", TRAINING)
    keep_weight: float = option(
        0.0,
        "Weight of KL(base, arm) on training text of --eval-corpora; 0: none.",
        TRAINING,
        least=0,
        allowed="it must be a number of 0 or more",
    )
    packing: str = option(
        "packed",
        "packed blocks of running text, or paragraphs, padded or cut (the paper's).",
        TRAINING,
        choices=("packed", "paragraphs"),
    )
    context_length: int = option(256, "Most tokens of context while scoring documents.", EVALUATION, least=1)
    last_word_items: int = option(80, "Last-word items; 0: none.", EVALUATION, least=0)
    tasks: tuple[str, ...] = option(
        (), "lm-eval tasks, separated by commas, e.g. lambada_openai,arc_easy.", EVALUATION, read=parse_names
    )
    task_limit: int | None = option(
        None,
        "Items per task, a fixed random sample. Default: all.",
        EVALUATION,
        least=2,
        allowed="an interval takes at least 2 items",
        serves=TASKS,
    )
    task_settings: TaskSettings = option(TaskSettings(), parts=TaskSettings, serves=TASKS)
    nulls: tuple[str, ...] = option((), "Depth controls: noise,shuffled (of one arm).", EVALUATION, read=parse_names)
    equal_step: bool = option(False, "Train preskip once more with equal steps per layer.", EVALUATION)
    dtype_audit: bool = option(False, "Score the untouched base in fp32 and bf16, too.", EVALUATION)
    ablation_documents: int = option(
        0, "Documents on which each layer's parts are switched off; 0: none.", EVALUATION, least=0
    )
    paper_scoring: bool = option(False, "Score by the paper's own protocol, too.", EVALUATION)

    def __post_init__(self) -> None:
        resolve_arms(self.arms)
        trained = [name for name in ARMS if ARMS[name].trains]
        if unknown := next((arm for arm in self.learning_rates if arm not in trained), None):
            raise PreskipError(f"--lr names {unknown!r}: choose one of {', '.join(trained)}")
        super().__post_init__()
        for arm, rank in self.lora_ranks.items():
            if arm not in LORA_ARMS or not (0 < rank < 1 or (1 <= rank < math.inf and rank % 1 == 0)):
                raise PreskipError(
                    f"--lora-rank {arm}={rank:g}: give a whole rank, or a share of the width below 1, to "
                    f"{', '.join(LORA_ARMS)}"
                )
        if unknown := next((null for null in self.nulls if null not in NULLS), None):
            raise PreskipError(f"--nulls {unknown!r} is unknown: choose among {', '.join(NULLS)}")
        if self.ablation_documents == 1:
            raise PreskipError("--ablation-documents 1 is not possible: an interval needs 2 or more, 0 leaves it out")
        self.task_settings.check_special_tokens(self.split_special_tokens)
        for flag, pattern in (("--target-modules", self.target_modules), ("--exclude-modules", self.exclude_modules)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise PreskipError(f"{flag} {pattern!r} is not a regular expression: {error}") from None
        if self.target_modules is not None and self.layers is not None:
            raise PreskipError("--layers cannot be combined with --target-modules: name the layers in the expression")

    @property
    def subject(self) -> str:
        """What the run directory is named after."""
        return self.model

    def learning_rate(self, arm: str) -> float | None:
        """Peak learning rate of an arm as given, or its default (tuned: the grid's centre); None for `none`."""
        return self.learning_rates.get(arm, ARMS[arm].learning_rate)

    def is_tuned(self, arm: str) -> bool:
        """Whether the arm's learning rate is searched for."""
        return self.lr_mode == "tune" and ARMS[arm].trains and arm not in self.learning_rates

    @property
    def tuned_arms(self) -> list[str]:
        """The arms whose learning rate is searched for."""
        return [arm for arm in self.arms if self.is_tuned(arm)]

    def _refuse_ignored(self) -> None:
        """See `ExperimentConfig._refuse_ignored`."""
        if self.lr_mode == "tune" and self.learning_rates and not self.tuned_arms:
            raise PreskipError("--lr tune has nothing to tune, every arm has a rate: leave out tune, or those rates")
        super()._refuse_ignored()

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The base is always compared; a rate for all is one for every arm that trains."""
        arms = values.get("arms", cls.arms)
        if arms and "none" not in arms:
            values["arms"] = ("none", *arms)
        if "lr" in values:
            texts = by_arm_texts(values.pop("lr"))
            rates = [text for text in texts if text != "tune"]
            everyone, by_arm = parse_by_arm(rates)
            values["lr_mode"] = "tune" if len(rates) < len(texts) else "fixed" if rates else "default"
            trained = [arm for arm in arms if arm in ARMS and ARMS[arm].trains] if everyone is not None else []
            values["learning_rates"] = dict.fromkeys(trained, everyone) | by_arm
        return values

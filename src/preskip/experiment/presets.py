"""Where the options of a probe start from: `quick`, `standard`, `confirmatory` and the paper's own protocol.

docs/paper-index.md describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preskip.errors import PreskipError
from preskip.fields import flags


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Named values of options; explicit options override them.

    Attributes:
        description: one sentence.
        options: values by option name, as the command line takes them ("lr" as a list of `--lr`).
    """

    description: str
    options: dict[str, Any]


PRESETS = {
    "quick": Preset(
        description="The embedded model against LoRA of the same size, in minutes on two cores; one seed.",
        options={"steps": 10, "batch_size": 4, "eval_documents": 32, "eval_words": 80, "last_word_items": 24},
    ),
    "standard": Preset(
        description="Tuned learning rates, three seeds, the decisive controls, two out-of-domain texts; some hours.",
        options={
            "corpus": "wikitext2",
            "arms": "none,preskip,preproj,skip,content,parallel,lora,layernorm",
            "seeds": "1,2,3",
            "lr": ["tune"],
            "steps": 24,
            "save_steps": 8,
            "last_word_items": 0,
            "tasks": "lambada_openai",
            "task_limit": 1500,
            "eval_corpora": "wikitext2:62x850,books:40x250",
            "nulls": "noise,shuffled",
            "equal_step": True,
            "ablation_documents": 8,
        },
    ),
    "confirmatory": Preset(
        description="One question declared first: is `content` better in-domain than LoRA on all layers? Many hours.",
        options={
            "corpus": "wikitext2",
            "arms": "none,preskip,content,content-gated,parallel,skip,lora,lora-attention,full",
            "primary": "content:lora",
            "seeds": "1,2,3,4,5",
            "lr": ["tune"],
            "lr_rule": "frontier",
            "tune_share": 1.0,
            "development_documents": 48,
            "steps": 48,
            "batch_size": 4,
            "last_word_items": 0,
            "eval_corpora": "wikitext2:62x250,books24:94x150",
        },
    ),
    "paper": Preset(
        description="The paper's training (except that new weights are float32) and its own scoring beside ours.",
        options={
            "corpus": "wikitext2",
            "arms": "none,preproj,lora-attention,preproj+lora,preskip",
            "seeds": "42",
            "match": "none",
            "lora_rank": ["0.625", "preproj+lora=64"],  # 480 at 160M, 640 at 410M
            "lora_scale": 2.0,
            "lr": ["1e-5"],
            "steps": 500,
            "batch_size": 16,
            "micro_batch_size": 4,
            "seq_len": 512,
            "packing": "paragraphs",
            "dtype": "bfloat16",
            "gradient_checkpointing": True,
            "init_weights": "paper",
            "context_length": 512,
            "last_word_items": 0,
            "tasks": "lambada_openai,hellaswag,arc_easy",
            "paper_scoring": True,
            "nulls": "noise",
        },
    ),
}


def preset_options(kind: type, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of the preset that the last of the layers names that names one; none where there are no presets.

    Args:
        kind: the class of the options.
        layers: options by name, from a file and from the command line.

    Raises:
        PreskipError: there is no preset of that name.
    """
    if "preset" not in flags(kind):
        return {}
    name = next((layer["preset"] for layer in reversed(layers) if "preset" in layer), flags(kind)["preset"].default)
    if not isinstance(name, str) or name not in PRESETS:
        raise PreskipError(f"--preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name].options

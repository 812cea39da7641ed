"""The model card of an adapter or a baked checkpoint, from the run it comes from, in the Hub's metadata format."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from preskip.report.load import load_json
from preskip.version import __version__

_NAMES = {"bits_per_byte": "bits per byte", "word_perplexity": "word perplexity", "acc": "accuracy"}


def model_card(run: Path, arm: str, seed: int, *, baked: bool, name: str) -> str:
    """README.md of one trained arm and seed: what it is, how it was trained, what was measured, with intervals.

    Args:
        run: a finished run directory of `preskip probe`.
        arm: the arm.
        seed: the training seed whose weights the card goes with; the figures are of all seeds together.
        baked: whether it goes with a self-contained checkpoint, in place of an adapter.
        name: of the model, for the metadata.

    Raises:
        PreskipError: run.json or results.json is missing, damaged or of another version.
    """
    manifest, results = load_json(run / "run.json"), load_json(run / "results.json")
    base, config = manifest["model"], manifest["config"]
    found = results["arms"][arm]
    sets = results["sets"]
    hub_id = base["name"] if base["name"].count("/") == 1 and not base["name"].startswith((".", "/")) else None
    data = ModelCardData(
        base_model=hub_id,
        library_name="transformers" if baked else "peft",
        pipeline_tag="text-generation",
        tags=["preskip", *([] if baked else ["adapter"])],
        model_name=name,
        eval_results=list(_eval_results(found["metrics"], sets)) or None,
    )
    seeds = found["seeds"]
    return f"""---
{data.to_yaml()}
---

# {name}

{base["name"]} ({base["source"]}) with {manifest["arms"][arm]["description"]}
({found["trainable_parameters"]:,} trained weights; arXiv 2604.10791),
{"baked into one checkpoint" if baked else "as a PEFT adapter"} with preskip {__version__}.

```python
import preskip{"  # registers the architecture; or pass trust_remote_code=True" if baked else ""}
{_usage(baked, base["name"])}
```

## Training

* Text: {manifest["corpus"]["name"]} ({manifest["corpus"]["source"]}), {manifest["corpus"]["training_tokens"]:,} tokens
* {config["steps"]} steps of {config["batch_size"]} × {config["seq_len"]} tokens, seed {seed}
* Learning rate {found["learning_rate"]:g}
* Base weights {found["base_dtype"]} and frozen, trained weights {found["adapter_dtype"]}
* Command: `{shlex.join(manifest["command"])}`

## Measured

Over {len(seeds)} training {"seeds" if len(seeds) > 1 else "seed: intervals cover items only"}; 95 % intervals.

| text or task | measure | value |
|---|---|---|
{_table(_value_rows(found["metrics"], sets))}

Paired differences on the same items; the verdict takes the whole family of comparisons into account.

| against | text or task | measure | difference | verdict |
|---|---|---|---|---|
{_table(_difference_rows(results["comparisons"], arm))}

Licence: the base's licence covers its weights and may bind these; the branch adds none of its own.
"""


def _usage(baked: bool, base: str) -> str:
    if baked:
        return (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")'
        )
    return (
        "from peft import PeftModel\n"
        "from preskip.assets import load_model\n"
        "import torch\n\n"
        f'model = PeftModel.from_pretrained(load_model("{base}", dtype=torch.float32), "PATH_OR_ID")'
    )


def _eval_results(metrics: Mapping[str, Any], sets: Mapping[str, Any]) -> Any:
    for name, values in metrics.items():
        for metric, value in values.items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=sets.get(name, {}).get("title", name),
                metric_type=metric,
                metric_name=_NAMES.get(metric, metric),
                metric_value=round(value["value"], 5),
            )


def _value_rows(metrics: Mapping[str, Any], sets: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (sets.get(name, {}).get("title", name), _NAMES.get(metric, metric), _interval(value["value"], value))
        for name, values in metrics.items()
        for metric, value in values.items()
    ]


def _difference_rows(comparisons: list[dict[str, Any]], arm: str) -> list[tuple[str, ...]]:
    return [
        (
            row["reference"],
            row["set"],
            _NAMES.get(row["metric"], row["metric"]),
            _interval(row["difference"], row, "+"),
            row["verdict"],
        )
        for row in comparisons
        if row["arm"] == arm
    ]


def _interval(value: float, bounds: Mapping[str, Any], sign: str = "") -> str:
    low, high = bounds.get("low"), bounds.get("high")
    shown = f"{value:{sign}.4f}"
    return shown if low is None or high is None else f"{shown} [{low:{sign}.4f}, {high:{sign}.4f}]"


def _table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)

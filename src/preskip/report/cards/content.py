"""What a model card says: metadata, how to load it, how it was trained, what was measured with intervals, by layer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData

from preskip.metrics import metric_named
from preskip.model_card import LICENCE, bullets, card_text, code_block, escape, table
from preskip.model_types import PREFIX
from preskip.report.cards.depth import depth_layers, depth_picture, depth_words
from preskip.report.lookup import is_pretraining, trained_arms
from preskip.report.table import NONE
from preskip.report.words.facts import family_text, limits
from preskip.report.words.verdicts import difference_text, interval_text, set_title
from preskip.runs.files import clear_disk_errors, write_bytes
from preskip.runs.schema import ArmResults, Manifest, Metrics, MetricValue, ModelFacts, Results, SetFacts
from preskip.stats.verdicts import flipped

FIGURE = "depth.png"
Kind = Literal["adapter", "baked", "scratch"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """README.md, and the PNG that it shows as depth.png, or None."""

    text: str
    figure: bytes | None = None

    def write(self, folder: Path) -> Path:
        """Write it into a folder, over an older one, each file in one step; returns README.md's path."""
        if self.figure is not None:
            write_bytes(folder / FIGURE, self.figure, mode=0o644)  # a card is there to be passed on
        write_bytes(folder / "README.md", self.text.encode(), mode=0o644)
        if self.figure is None:
            with clear_disk_errors(folder):
                (folder / FIGURE).unlink(missing_ok=True)
        return folder / "README.md"


def make_card(record: Manifest, results: Results, arm: str, seed: int, *, kind: Kind, name: str, usage: str) -> Card:
    """The card of a model, so named, of one arm and seed: how it is loaded and was trained, what was measured with
    intervals, what it cannot show. The figure is of this seed, the measured values are of all seeds together.
    """
    found, sets = results["arms"][arm], results["sets"]
    name = " ".join(name.split())
    data = ModelCardData(
        base_model=None if kind == "scratch" else hub_id(record["model"]),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["preskip", *(["adapter"] if kind == "adapter" else []), arm])),
        model_name=name,
        eval_results=list(_eval_results(found["metrics"], sets)) or None,
    )
    layers = depth_layers(results, arm, seed)
    figure = depth_picture(layers)
    seeds = len(found["seeds"])
    most = max(len(results["arms"][other]["seeds"]) for other in trained_arms(results))
    sections = [
        f"# {escape(name)}",
        _what(record, found, arm, kind, has_branch=bool(layers)),
        code_block(usage, "python"),
        "## Training",
        bullets(_training(record, results, arm, seed)),
        "Command:",
        code_block(shlex.join(record["command"]), "console"),
        "## Measured",
        f"Over {seeds} training {'seeds' if seeds > 1 else 'seed: intervals cover items only'}; 95 % intervals.",
        table(("text or task", "measure", "value"), _value_rows(found["metrics"], sets)),
    ]
    if differences := _difference_rows(results, arm):
        sections += [
            f"Paired differences on the same items, this minus the other. {escape(family_text(results))}",
            table(("against", "text or task", "measure", "difference", "declared", "verdict"), differences),
        ]
    if figure is not None:
        noise = ", a grey one is what training on noise gives" if any(layer["null"] for layer in layers) else ""
        words = escape(depth_words(layers, (results.get("trend") or {}).get(arm) or ()))
        sections += [
            "## By layer",
            f"![{words}]({FIGURE})",
            f"Seed {seed}; bands are 95 % over documents{noise}.",
        ]
    sections += ["## Limits", bullets([escape(line) for line in limits(record, results, most)])]
    if kind != "scratch":
        sections.append(LICENCE)
    return Card(text=card_text(data, *sections), figure=figure)


def _what(record: Manifest, found: ArmResults, arm: str, kind: Kind, *, has_branch: bool) -> str:
    model, description = record["model"], escape(record["arms"][arm]["description"])
    weights = f"{found['trainable_parameters']:,} trained weights{'; arXiv 2604.10791' if has_branch else ''}"
    version, name = escape(str(record["preskip_version"])), escape(model["name"])
    if kind == "scratch":
        trained = f"{name} ({escape(model['type'])}) trained from scratch, arm {escape(arm)}: {description}"
        return f"{trained} ({weights}), with preskip {version}."
    form = "baked into one checkpoint" if kind == "baked" else "as a PEFT adapter"
    return f"{name} ({escape(model['source'])}) with {description} ({weights}), {form} with preskip {version}."


def _training(record: Manifest, results: Results, arm: str, seed: int) -> list[str]:
    found, config, corpus = results["arms"][arm], record["config"], record["corpus"]
    steps = found["steps"] if "steps" in found else config["steps"]
    searched = ", found on development documents" if arm in (results.get("search") or {}) else ""
    lines = [
        f"Text: {escape(corpus['name'])} ({escape(corpus['source'])}), {corpus['training_tokens']:,} tokens",
        f"{steps:,} steps of {config['batch_size']} × {config['seq_len']} tokens, seed {seed}",
        f"Learning rate {found.get('learning_rates', {}).get(str(seed), found['learning_rate']):g}{searched}",
    ]
    if is_pretraining(results):
        return [*lines, f"Weights float32, computed in {found['compute_dtype']}"]
    return [*lines, f"Base weights {found['base_dtype']} and frozen, trained weights {found['adapter_dtype']}"]


def _eval_results(metrics: Metrics, sets: Mapping[str, SetFacts]) -> Iterator[EvalResult]:
    for name, values in metrics.items():
        for metric, value in values.items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=set_title(sets, name),
                metric_type=metric,
                metric_name=metric_named(metric).phrase,
                metric_value=value["value"],
            )


def _value_rows(metrics: Metrics, sets: Mapping[str, SetFacts]) -> list[tuple[str, ...]]:
    return [
        (set_title(sets, name), _measure(metric, sets.get(name)), _value(metric, value))
        for name, values in metrics.items()
        for metric, value in values.items()
    ]


def _difference_rows(results: Results, arm: str) -> list[tuple[str, ...]]:
    sets, rows = results["sets"], list[tuple[str, ...]]()
    for entry in results["comparisons"]:
        if arm in (entry["arm"], entry["reference"]):
            row = entry if entry["arm"] == arm else flipped(entry)
            what = (set_title(sets, row["set"]), _measure(row["metric"], sets.get(row["set"])))
            shown = difference_text(row)
            difference = f"{shown['value']}{shown['unit']} {shown['interval']}"
            rows.append((row["reference"], *what, difference, "yes" if row.get("declared") else "no", row["verdict"]))
    return rows


def _measure(key: str, described: SetFacts | None) -> str:
    metric = metric_named(key, described)
    return f"{metric.phrase} ({metric.direction})"


def _value(metric: str, value: MetricValue) -> str:
    shown = interval_text(metric, value)
    return " ".join(filter(None, shown.values())) if shown else NONE


def hub_id(model: ModelFacts) -> str | None:
    """The Hub id of a run's base, or None for one from elsewhere."""
    name = model["name"]
    return name if model.get("source") == f"Hugging Face Hub {name}" else None


def adapter_usage(model: ModelFacts, dtype: str, types: Mapping[str | None, str], trust_remote_code: bool) -> str:
    """Code that loads a base and puts an adapter on it.

    Args:
        model: what run.json says of the base.
        dtype: of its weights; of a quantised base with what its matrices are, which its own folder says, too.
        types: PEFT's type of each stacked adapter by its sub-folder; of a single one under None.
        trust_remote_code: whether the base needs code of its own.
    """
    identity = hub_id(model)
    more = ", trust_remote_code=True" if trust_remote_code else ""
    if identity and model.get("revision"):
        more += f", revision={json.dumps(model['revision'])}"
    loader = "AutoModelForCausalLM.from_pretrained" if identity else "load_model"
    name = json.dumps(model["name"], ensure_ascii=False)
    own = "adapter" if "PRESKIP" in types.values() else "model" if model["type"].startswith(PREFIX) else None
    lines = [
        *([f"import preskip  # registers the {own} type"] if own else []),
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM" if identity else "from preskip.assets import load_model",
        "",
        f"base = {loader}({name}, dtype=torch.{dtype.split(',')[0]}{more})",
    ]
    if None in types:
        return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "PATH_OR_ID")'])
    for folder in types:
        # PEFT keeps one table of names per base.
        options = f'subfolder="{folder}", adapter_name="part-{folder}"'
        lines.append(f'model = PeftModel.from_pretrained(base, "PATH_OR_ID", {options})')
    return "\n".join(lines)

"""Model cards of what a run has trained, from its stored results alone, in the Hub's metadata format.

An adapter gets one, a baked checkpoint, and a model trained from scratch: README.md, and depth.png where there is a
branch to show.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from preskip.errors import PreskipError
from preskip.report.card_figure import depth_layers, depth_picture, depth_words
from preskip.report.card_text import adapter_usage, code_block, escape, hub_id, model_usage, table
from preskip.report.facts import family_text, limits
from preskip.report.load import load_json, short
from preskip.report.lookup import flipped, is_pretraining, trained_arms
from preskip.report.verdicts import metric_named, set_title
from preskip.rundir import RunDirectory, clear_disk_errors, read_json, write_bytes

FIGURE = "depth.png"
LICENCE = "Licence: the base's licence covers its weights and may bind these; the branch adds none of its own."
Kind = Literal["adapter", "baked", "scratch"]
Stored = Mapping[str, Any]


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


def write_cards(run: Path) -> list[Path]:
    """Write the card of every trained adapter or model of a run beside its weights, over PEFT's empty one.

    Arms that train the base's own weights leave no adapter and get none.

    Args:
        run: a run directory with run.json and results.json.

    Returns:
        The cards' paths; of stacked adapters that of the whole.

    Raises:
        PreskipError: a file is missing, damaged or of another version, or a card cannot be written.
    """
    record, results = load_json(run / "run.json"), load_json(run / "results.json")
    write = _write_scratch_card if is_pretraining(results) else _write_adapter_card
    with _clear_errors(run):
        cells = [(arm, seed) for arm, found in results["arms"].items() for seed in found["seeds"]]
        cards = [write(run, record, results, arm, seed) for arm, seed in cells]
    return [card for card in cards if card is not None]


def baked_card(run: Path, arm: str, seed: int, name: str) -> Card | None:
    """The card of a checkpoint baked from an adapter of a run; None where the run has no results of it yet.

    Args:
        run: the run directory.
        arm: the adapter's arm.
        seed: its training seed.
        name: of the checkpoint.

    Raises:
        PreskipError: run.json or results.json is damaged or of another version.
    """
    if not (run / "results.json").is_file():
        return None
    record, results = load_json(run / "run.json"), load_json(run / "results.json")
    with _clear_errors(run):
        if arm not in results["arms"] or seed not in results["arms"][arm]["seeds"]:
            return None
        usage = model_usage("registers the architecture; or pass trust_remote_code=True")
        return _card(record, results, arm, seed, kind="baked", name=name, usage=usage)


@contextmanager
def _clear_errors(run: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise PreskipError(
            f"{run}: run.json or results.json lacks what a model card needs ({type(error).__name__}: {short(error)})"
        ) from error


def _write_adapter_card(run: Path, record: Stored, results: Stored, arm: str, seed: int) -> Path | None:
    folder = RunDirectory(run).cell(arm, seed).adapter
    name = _name(record, arm, seed)
    file = "adapter_config.json"
    parts: dict[str | None, Path] = {path.parent.name: path.parent for path in folder.glob(f"*/{file}")}
    if (folder / file).is_file():
        parts = {None: folder}
    if not parts:
        return None
    types = {part: read_json(parts[part] / file)["peft_type"] for part in sorted(parts, key=str)}
    trusts = bool(record["config"].get("trust_remote_code"))
    usage = adapter_usage(record["model"], results["arms"][arm]["base_dtype"], types, trusts)
    for part in types if None not in types else ():
        Card(text=_part_card(record, name, str(part), len(types))).write(parts[part])
    return _card(record, results, arm, seed, kind="adapter", name=name, usage=usage).write(folder)


def _write_scratch_card(run: Path, record: Stored, results: Stored, arm: str, seed: int) -> Path | None:
    folder = RunDirectory(run).cell(arm, seed).folder / "model"
    if not (folder / "config.json").is_file():
        return None
    has_branch = read_json(folder / "config.json")["model_type"].startswith("preskip_")
    usage = model_usage("registers the architecture" if has_branch else None)
    name = _name(record, arm, seed)
    return _card(record, results, arm, seed, kind="scratch", name=name, usage=usage).write(folder)


def _name(record: Stored, arm: str, seed: int) -> str:
    return f"{Path(record['model']['name']).name}-{arm}-seed-{seed}"


def _part_card(record: Stored, name: str, part: str, count: int) -> str:
    data = ModelCardData(base_model=hub_id(record["model"]), library_name="peft", tags=["preskip", "adapter"])
    return f"""---
{data.to_yaml()}
---

# {escape(name)}, part {part} of {count}

The {count} adapters are stacked on one base: [the card of the whole](../README.md) says how, and what was measured.
"""


def _card(record: Stored, results: Stored, arm: str, seed: int, *, kind: Kind, name: str, usage: str) -> Card:
    """One card; its figures are of all seeds together, its depth figure is of the seed whose weights it goes with."""
    found, sets = results["arms"][arm], results["sets"]
    name = " ".join(name.split())
    data = ModelCardData(
        base_model=None if kind == "scratch" else hub_id(record["model"]),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["preskip", *(["adapter"] if kind == "adapter" else []), arm],
        model_name=name,
        eval_results=list(_eval_results(found["metrics"], sets)) or None,
    )
    layers = depth_layers(results, arm, seed)
    figure = depth_picture(layers)
    seeds = len(found["seeds"])
    most = max(len(results["arms"][other]["seeds"]) for other in trained_arms(results))
    comparisons = [
        row if row["arm"] == arm else flipped(row)
        for row in results["comparisons"]
        if arm in (row["arm"], row["reference"])
    ]
    sections = [
        f"# {escape(name)}",
        _what(record, found, arm, kind, has_branch=bool(layers)),
        code_block(usage, "python"),
        "## Training",
        "\n".join(f"* {line}" for line in _training(record, results, arm, seed)),
        "Command:",
        code_block(shlex.join(record["command"]), "console"),
        "## Measured",
        f"Over {seeds} training {'seeds' if seeds > 1 else 'seed: intervals cover items only'}; 95 % intervals.",
        table(("text or task", "measure", "value"), _value_rows(found["metrics"], sets)),
    ]
    if comparisons:
        sections += [
            f"Paired differences on the same items, this minus the other. {escape(family_text(results))}",
            table(
                ("against", "text or task", "measure", "difference", "declared", "verdict"),
                _difference_rows(comparisons, sets),
            ),
        ]
    if figure is not None:
        words = escape(depth_words(layers, (results.get("trend") or {}).get(arm) or ()))
        sections += [
            "## By layer",
            f"![{words}]({FIGURE})",
            f"Seed {seed}; bands are 95 % over documents, a grey one is what training on noise gives.",
        ]
    sections += ["## Limits", "\n".join(f"* {escape(line)}" for line in limits(record, results, most))]
    if kind != "scratch":
        sections.append(LICENCE)
    return Card(text=f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n", figure=figure)


def _what(record: Stored, found: Stored, arm: str, kind: Kind, *, has_branch: bool) -> str:
    model, description = record["model"], escape(record["arms"][arm]["description"])
    paper = "; arXiv 2604.10791" if has_branch else ""
    weights = f"{found['trainable_parameters']:,} trained weights{paper}"
    version = escape(str(record["preskip_version"]))
    if kind == "scratch":
        return (
            f"{escape(model['name'])} ({escape(model['type'])}) trained from scratch, arm {escape(arm)}: {description} "
            f"({weights}), with preskip {version}."
        )
    form = "baked into one checkpoint" if kind == "baked" else "as a PEFT adapter"
    base = f"{escape(model['name'])} ({escape(model['source'])})"
    return f"{base} with {description} ({weights}), {form} with preskip {version}."


def _training(record: Stored, results: Stored, arm: str, seed: int) -> list[str]:
    found, config, corpus = results["arms"][arm], record["config"], record["corpus"]
    text = f"Text: {escape(corpus['name'])} ({escape(corpus['source'])}), {corpus['training_tokens']:,} tokens"
    steps = found["steps"] if "steps" in found else config["steps"]
    searched = ", found on development documents" if arm in (results.get("search") or {}) else ""
    lines = [
        text,
        f"{steps:,} steps of {config['batch_size']} × {config['seq_len']} tokens, seed {seed}",
        f"Learning rate {found['learning_rate']:g}{searched}",
    ]
    if is_pretraining(results):
        return [*lines, f"Weights float32, computed in {found['compute_dtype']}"]
    return [*lines, f"Base weights {found['base_dtype']} and frozen, trained weights {found['adapter_dtype']}"]


def _eval_results(metrics: Stored, sets: Stored) -> Iterator[EvalResult]:
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


def _value_rows(metrics: Stored, sets: Stored) -> list[tuple[str, ...]]:
    return [
        (set_title(sets, name), _measure(metric), _interval(value["value"], value))
        for name, values in metrics.items()
        for metric, value in values.items()
    ]


def _difference_rows(comparisons: list[dict[str, Any]], sets: Stored) -> list[tuple[str, ...]]:
    return [
        (
            row["reference"],
            set_title(sets, row["set"]),
            _measure(row["metric"]),
            _interval(row["difference"], row, "+"),
            "yes" if row.get("declared") else "no",
            row["verdict"],
        )
        for row in comparisons
    ]


def _measure(key: str) -> str:
    metric = metric_named(key)
    return f"{metric.phrase} ({'lower' if metric.lower_is_better else 'higher'} is better)"


def _interval(value: float, bounds: Stored, sign: str = "") -> str:
    low, high = bounds.get("low"), bounds.get("high")
    shown = f"{value:{sign}.4f}"
    return shown if low is None or high is None else f"{shown} [{low:{sign}.4f}, {high:{sign}.4f}]"

"""Model cards of what a run has trained, from its stored results alone, in the Hub's metadata format.

An adapter gets one, a baked checkpoint, and a model trained from scratch: README.md, and depth.png where there is a
branch to show.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from preskip.model_card import REGISTERS, card_text, escape, loading
from preskip.model_types import PREFIX
from preskip.report.cards.content import Card, adapter_usage, hub_id, make_card
from preskip.report.load import clear_errors, load_run
from preskip.report.lookup import is_pretraining
from preskip.runs.directory import RunDirectory
from preskip.runs.files import read_json
from preskip.runs.schema import Manifest, Results
from preskip.runs.weights import ADAPTER_CONFIG, adapter_folders

WHAT = "a model card needs"


def write_cards(run: Path) -> list[Path]:
    """Write the card of every trained adapter or model of a run beside its weights, over PEFT's empty one.

    Arms that train the base's own weights leave no adapter and get none.

    Returns:
        The cards' paths; of stacked adapters that of the whole.

    Raises:
        PreskipError: a file is missing, damaged or of another version, or a card cannot be written.
    """
    record, results = load_run(run)
    write = _write_scratch_card if is_pretraining(results) else _write_adapter_card
    with clear_errors(run, WHAT):
        cells = [(arm, seed) for arm, found in results["arms"].items() for seed in found["seeds"]]
        cards = [write(run, record, results, arm, seed) for arm, seed in cells]
    return [card for card in cards if card is not None]


def baked_card(run: Path, arm: str, seed: int, name: str) -> Card | None:
    """The card of a checkpoint baked from an adapter of a run; None where the run has no results of it yet.

    Raises:
        PreskipError: run.json or results.json is damaged or of another version.
    """
    if not (run / "results.json").is_file():
        return None
    record, results = load_run(run)
    with clear_errors(run, WHAT):
        if arm not in results["arms"] or seed not in results["arms"][arm]["seeds"]:
            return None
        return make_card(record, results, arm, seed, kind="baked", name=name, usage=loading(REGISTERS))


def _write_adapter_card(run: Path, record: Manifest, results: Results, arm: str, seed: int) -> Path | None:
    folder, name = RunDirectory(run).cell(arm, seed).adapter, _name(record, arm, seed)
    parts = adapter_folders(folder)
    if not parts:
        return None
    types = {None if part == folder else part.name: read_json(part / ADAPTER_CONFIG)["peft_type"] for part in parts}
    trusts = bool(record["config"].get("trust_remote_code"))
    usage = adapter_usage(record["model"], results["arms"][arm]["base_dtype"], types, trusts)
    for part in parts if parts != [folder] else ():
        text = card_text(
            ModelCardData(base_model=hub_id(record["model"]), library_name="peft", tags=["preskip", "adapter"]),
            f"# {escape(name)}, part {part.name} of {len(parts)}",
            f"The {len(parts)} adapters are stacked on one base: [the card of the whole](../README.md) says how, and "
            "what was measured.",
        )
        Card(text=text).write(part)
    return make_card(record, results, arm, seed, kind="adapter", name=name, usage=usage).write(folder)


def _write_scratch_card(run: Path, record: Manifest, results: Results, arm: str, seed: int) -> Path | None:
    folder, name = RunDirectory(run).cell(arm, seed).folder / "model", _name(record, arm, seed)
    if not (folder / "config.json").is_file():
        return None
    has_branch = read_json(folder / "config.json")["model_type"].startswith(PREFIX)
    usage = loading("registers the architecture" if has_branch else None)
    return make_card(record, results, arm, seed, kind="scratch", name=name, usage=usage).write(folder)


def _name(record: Manifest, arm: str, seed: int) -> str:
    return f"{Path(record['model']['name']).name or 'model'}-{arm}-seed-{seed}"

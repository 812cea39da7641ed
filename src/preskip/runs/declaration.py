"""What a run declares before training, by hash and time, and what was changed after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from preskip.runs.schema import Declaration, Extension, Facts, Family, Manifest


def declare(config: Mapping[str, Any], facts: Facts, search_rule: int | None = None) -> Declaration:
    """Options, family, looks and rules of a run, and what it is made of, before anything is trained.

    Of a probe also the start token that every block to train on begins with, None for none (`opening`).

    Args:
        config: every option, as run.json stores it.
        facts: what was prepared.
        search_rule: how learning rates are searched for (`preskip.experiment.search.RULE`); None where none is.
    """
    content: dict[str, Any] = {
        "config": dict(config),
        "family": facts["family"],
        "model": identity(facts["model"]),
        "corpus": identity(facts["corpus"]),
        "sets": {name: described["sha256"] for name, described in facts["sets"].items()},
    }
    tokenizer: Mapping[str, Any] = facts.get("tokenizer", {})
    if "opening" in tokenizer:
        content["opening"] = tokenizer["opening"]
    if search_rule is not None:
        content["search_rule"] = search_rule
    content = json.loads(json.dumps(content))  # as it will be read
    return {"sha256": digest(content), "time": now(), "content": content}


def identity(facts: Mapping[str, Any]) -> str | None:
    """Which weights or text they are: the SHA-256, of a model on the Hub the revision; None where nothing says it."""
    return facts["sha256"] or facts.get("revision")


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a declaration's content, as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def extension(family: Family, before: Sequence[int], seeds: Sequence[int]) -> Extension:
    """The record of seeds that are added to a run."""
    planned = len(before) + len(seeds) in family.get("looks", ())
    return {"time": now(), "before": list(before), "seeds": list(seeds), "planned": planned}


def changes(manifest: Manifest) -> list[str]:
    """What differs from what was declared, and seeds added without a declared look, a sentence each.

    A run of an earlier preskip has no declaration: of it only added seeds are known.

    Args:
        manifest: run.json.
    """
    return _edits(manifest) + _unplanned(manifest)


def _edits(manifest: Manifest) -> list[str]:
    declaration = manifest.get("declaration")
    if declaration is None:
        return []
    found = []
    content, config = declaration["content"], manifest["config"]
    if digest(content) != declaration["sha256"]:
        found.append("the declaration was edited after it was made: it does not have its own SHA-256")
    added = [seed for extension in manifest.get("extensions", ()) for seed in extension["seeds"]]
    expected = {**content["config"], "seeds": content["config"]["seeds"] + added}
    for name in sorted(expected.keys() | config.keys()):
        if expected.get(name) != config.get(name):
            found.append(f"the option {name} is {config.get(name)}, declared was {expected.get(name)}")
    family = manifest["family"]
    found += margin_changes(content["family"], family["margins"])
    for name in ("declared", "alpha", "looks", "procedure"):
        if content["family"].get(name) != family.get(name):
            found.append(f"the family's {name} was changed after it was declared")
    return found


def _unplanned(manifest: Manifest) -> list[str]:
    unplanned = [entry for entry in manifest.get("extensions", ()) if not entry["planned"]]
    if not unplanned:
        return []
    effect = "p-values are not adjusted for looking"
    if manifest["family"].get("looks"):
        effect = "declared comparisons keep the p-values of the last declared look"
    return [
        f"seed{'s' * (len(entry['seeds']) > 1)} {', '.join(map(str, entry['seeds']))} added after the results of "
        f"{len(entry['before'])} had been seen, without a declared look: {effect}"
        for entry in unplanned
    ]


def margin_changes(family: Family, margins: Mapping[str, float]) -> list[str]:
    """The margins that are not those that a family declared, a sentence each."""
    found = []
    for name, value in margins.items():
        declared = _declared_margin(family.get("margins", {}), name)
        if declared != value:
            was = "none was declared" if declared is None else f"declared was {declared:g}"
            found.append(f"the margin of {name} is {value:g}, {was}: equivalence within it was not declared")
    return found


def _declared_margin(declared: Mapping[str, float], name: str) -> float | None:
    """The margin declared for "metric" or "set.metric", whose metric's own counts where the set has none."""
    return declared.get(name, declared.get(name.partition(".")[2]))


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")

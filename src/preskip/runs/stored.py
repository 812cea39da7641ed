"""Stored per-item results of one run, or of several that may be compared, by arm and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.runs.declaration import changes
from preskip.runs.directory import RunDirectory
from preskip.runs.schema import Family, SetFacts

Items = Sequence[Mapping[str, Any]]

UNTRAINED = "none"  # the arm that is not trained
# What is compared as it is: the untouched model, and the plain architecture trained from scratch.
PLAIN = (UNTRAINED, "base")
# What must be the same for scores of one set to be comparable.
_SCORING = ("context_length", "stride", "reopened")
# And of lm-eval's task, where it is one.
_PROMPTS = ("version", "num_fewshot", "prompt_sha256")


@dataclass(frozen=True, kw_only=True)
class StoredArms:
    """Arms with their items by seed, and what the runs say about them.

    With several runs an arm is named `run:arm`, `run` being its folder's name, or its path where names are the same,
    and there are no seeds of all.
    """

    items: dict[str, dict[int, Items]]
    sets: dict[str, SetFacts]
    family: Family
    notes: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def pairs(self, arms: Sequence[str] | None, reference: str | None) -> list[tuple[str, str]]:
        """(arm, reference) of each comparison to make.

        With `reference` every arm against it. Otherwise every pair, later minus earlier or as the family declares; but
        between several runs, unless `arms` chooses, only trained arms of the same name, where there are any.

        Args:
            arms: names to take, each qualified or, for that arm of every run, bare. Default: all.
            reference: one name.

        Raises:
            PreskipError: an unknown name, or a bare reference that several runs hold, or nothing to compare.
        """
        chosen = list(dict.fromkeys(name for arm in arms for name in self._named(arm))) if arms else list(self.items)
        if reference is not None:
            named = self._named(reference)
            if len(named) > 1:
                raise PreskipError(f"--reference {reference} is in several runs: choose one of {', '.join(named)}")
            found = [(arm, named[0]) for arm in chosen if arm != named[0]]
        else:
            declared = {(entry["arm"], entry["reference"]) for entry in self.family.get("declared", ())}
            every = [pair if pair in declared else pair[::-1] for pair in combinations(chosen, 2)]
            alike = [] if arms else [pair for pair in every if _same_trained_arm(*pair)]
            found = alike or every
        if not found:
            raise PreskipError(f"nothing to compare: only {', '.join(chosen)} was chosen; name two arms")
        return found

    def _named(self, name: str) -> list[str]:
        names = [known for known in self.items if known == name or known.rpartition(":")[2] == name]
        if not names:
            raise PreskipError(f"unknown arm {name!r}: the finished arms are {', '.join(self.items)}")
        return names


def load_runs(paths: Sequence[Path], *, allow_different_dtype: bool = False) -> StoredArms:
    """Read the finished cells of runs, after checking that they may be compared.

    Args:
        paths: run directories.
        allow_different_dtype: let arms of different base or compute dtype be compared. Default: refuse.

    Raises:
        PreskipError: not a run of this schema version, the same run twice, no finished cell, different base models,
            different dtypes, or a shared evaluation set scored with different context.
    """
    runs = [RunDirectory.open(path) for path in paths]
    manifests = [run.manifest for run in runs]
    labels = run_labels(paths)
    for label, manifest in zip(labels[1:], manifests[1:], strict=True):
        _check_same_model(labels[0], manifests[0], label, manifest)
    items: dict[str, dict[int, Items]] = {}
    dtypes: dict[str, tuple[str, ...]] = {}
    sets: dict[str, SetFacts] = {}
    notes: list[str] = []
    for label, run, manifest in zip(labels, runs, manifests, strict=True):
        notes += [f"{label}: {line}" if len(runs) > 1 else line for line in changes(manifest)]
        status = manifest.get("status", "finished")
        if status != "finished":
            notes.append(f"{label}: the run is {status}; it is compared as far as it is")
        for arm, facts in manifest.get("arms", {}).items():
            cells = _finished(run, arm, manifest.get("seeds", []), notes)
            if cells:
                name = f"{label}:{arm}" if len(runs) > 1 else arm
                items[name] = cells
                dtypes[name] = tuple(str(facts.get(key)) for key in ("base_dtype", "compute_dtype"))
        for name, described in manifest.get("sets", {}).items():
            _check_same_scoring(name, sets.setdefault(name, described), described)
    if not items:
        mends = dict.fromkeys(f"preskip {manifest.get('kind') or 'probe'} --resume" for manifest in manifests)
        raise PreskipError(
            f"{', '.join(map(str, paths))}: no arm has a finished cell; finish with {' or '.join(mends)}"
        )
    if len(set(dtypes.values())) > 1:
        if not allow_different_dtype:
            _refuse_different_dtypes(dtypes)
        notes.append("the arms differ in dtype: part of a difference may be rounding")
    none: Any = {}  # several runs have declared nothing between them
    family: Family = manifests[0].get("family", none) if len(runs) == 1 else none
    seeds = manifests[0].get("seeds", []) if len(runs) == 1 else []
    return StoredArms(items=items, sets=sets, family=family, notes=notes, seeds=seeds)


def _finished(run: RunDirectory, arm: str, order: Sequence[int], notes: list[str]) -> dict[int, Items]:
    """The items of an arm by seed, in the order in which the run has its seeds."""
    folders = sorted((run.path / "arms" / arm).glob("seed-*"))
    there = sorted(int(folder.name[5:]) for folder in folders if folder.name[5:].lstrip("-").isdigit())
    seeds = sorted(there, key=lambda seed: order.index(seed) if seed in order else len(order))
    done: dict[int, Items] = {seed: run.cell(arm, seed).load()[1] for seed in seeds if run.cell(arm, seed).is_done}
    for seed, items in done.items():
        notes += [f"{run.path.name}: {arm} seed {seed}: {line}" for line in failed_notes(items)]
    expected = order[:1] if arm == UNTRAINED else order  # what is not trained is scored once
    missing = [seed for seed in dict.fromkeys((*expected, *seeds)) if seed not in done]
    if missing:
        notes.append(f"{run.path.name}: {arm} is not finished for seed {', '.join(map(str, missing))}; left out")
    return done


def failed_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What could not be scored, by name, and why: one line per set."""
    failed: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if "failed" in record:
            failed.setdefault(record["set"], []).append(record)
    return [
        f"{name}: {first['id']!r}{f' and {len(more)} more' if more else ''} left out: {first['failed']}"
        for name, (first, *more) in failed.items()
    ]


def run_labels(paths: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: their folders' names, or their paths where names are the same.

    Raises:
        PreskipError: the same run is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise PreskipError("the same run is given twice: give each run once")
    names = [path.name for path in resolved]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _check_same_model(label: str, manifest: Mapping[str, Any], other_label: str, other: Mapping[str, Any]) -> None:
    key = "sha256" if all((m.get("model") or {}).get("sha256") for m in (manifest, other)) else "name"
    one, two = ((m.get("model") or {}).get(key) for m in (manifest, other))
    if one != two:
        names, tokenizers = (
            [(m.get(part) or {}).get(key) for m in (manifest, other)]
            for part, key in (("model", "name"), ("tokenizer", "sha256"))
        )
        if names[0] == names[1] and all(tokenizers) and tokenizers[0] != tokenizers[1]:
            raise PreskipError(
                f"{label} and {other_label} have other tokenizers; one is trained on what a run reads (--tokens, "
                "arms, --split-seed): give both the same --tokenizer"
            )
        raise PreskipError(
            f"{label} and {other_label} have different base models ({key} {str(one)[:12]} and {str(two)[:12]}): "
            "compare runs of one model"
        )


def _check_same_scoring(name: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key in _SCORING:
        if first.get(key) != other.get(key):
            raise PreskipError(
                f"{name} was scored with {key.replace('_', ' ')} {first.get(key)} in one run and {other.get(key)} in "
                "another: evaluate both with the same settings"
            )
    # Item ids of a task may be mere positions, so other data would pair what does not belong together.
    data = [described.get("sha256") for described in (first, other)]
    if first.get("kind") == "item" and all(data) and data[0] != data[1]:
        raise PreskipError(f"{name} has other data in one run than in another: evaluate both on the same file")
    for key in _PROMPTS:
        one, two = ((described.get("lm_eval") or {}).get(key) for described in (first, other))
        if one != two:
            raise PreskipError(
                f"{name} has another {key.replace('_', ' ')} in one run ({str(one)[:12]}) than in another "
                f"({str(two)[:12]}): evaluate both with one version of lm-eval"
            )
    samples = [_drawn_sample(described) for described in (first, other)]
    if samples[0] != samples[1]:
        raise PreskipError(
            f"{name} has other few-shot examples in one run than in another: they are drawn one item after another, "
            "so that other items change them; evaluate both with the same --limit"
        )


def _drawn_sample(described: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Which items of a task were scored, where the few-shot examples of each depend on it."""
    task = described.get("lm_eval") or {}
    if not task.get("examples_drawn", task.get("num_fewshot")):
        return None
    return described.get("items", described.get("documents")), task.get("sample_seed")


def _refuse_different_dtypes(dtypes: Mapping[str, tuple[str, ...]]) -> None:
    first, *others = dtypes
    other = next(name for name in others if dtypes[name] != dtypes[first])
    raise PreskipError(
        f"{first} has base and compute dtype {' and '.join(dtypes[first])}, {other} {' and '.join(dtypes[other])}: "
        "part of a difference would be rounding; compare equal dtypes, or give --allow-different-dtype"
    )


def _same_trained_arm(arm: str, other: str) -> bool:
    run, _, name = arm.rpartition(":")
    other_run, _, other_name = other.rpartition(":")
    return run != other_run and name == other_name != UNTRAINED

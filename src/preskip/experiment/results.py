"""results.json: the figures of every arm and the paired comparisons, from the stored cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import harmonic_mean
from typing import Any

import numpy as np

from preskip.analysis.depth_results import by_seed
from preskip.arms.experts import experts_note
from preskip.evaluate.paper import COLUMNS, paper_columns
from preskip.evaluate.published import paper_table
from preskip.evaluate.training_text import reading_notes
from preskip.runs.directory import SCHEMA_VERSION, RunDirectory
from preskip.runs.files import read_json, read_jsonl
from preskip.runs.schema import ArmFacts, ArmResults, CellSummary, CurvePoint, Record, Results, RunKind, Search, StepRow
from preskip.stats import compare_arms, looks_without_seeds, measured_power, summarise

# What an arm's results repeat from run.json, and average over the seeds, as far as the arm has it.
FACTS = (
    *("budget", "matched", "deviation", "parameters", "non_embedding", "forward_flops_per_token", "training_flops"),
    *("steps", "tokens", "base_dtype", "adapter_dtype", "compute_dtype", "attn_implementation"),
)
MEANS = ("final_training_loss", "final_eval_loss", "seconds_per_step")
RATES = ("tokens_per_second", "mfu")  # as of one training after the other: harmonic means, which go with the seconds


def summarise_run(run: RunDirectory) -> Results:
    """Compute results.json from the cells that are done.

    Args:
        run: with the sets, the arms, the seeds and the declared family in its run.json.

    Returns:
        The evaluation sets, metrics by arm and set, paired comparisons of all arms with verdicts, what they could
        resolve, the depth profiles by arm and seed, and what only one kind of training has: the search for learning
        rates; or the loss on development documents while training.
    """
    manifest = run.manifest
    facts, family = manifest["arms"], manifest["family"]
    summaries, items = finished_cells(run, list(facts), manifest["seeds"])
    notes = [
        f"{arm} seed {cell['seed']}: {note}"
        for arm, cells in summaries.items()
        for cell in cells
        for note in cell.get("notes", ())
    ]
    notes += reading_notes(manifest.get("tokenizer", {}))
    notes += filter(None, [experts_note(manifest["model"].get("stacked_experts", 0.0), list(facts))])
    comparisons = compare_arms(items, family, manifest["sets"], notes=notes) if len(items) > 1 else []
    notes += looks_without_seeds(items, family, manifest["seeds"])
    kind: RunKind = {"kind": manifest["kind"]} if "kind" in manifest else {}
    results: Results = {
        "schema_version": SCHEMA_VERSION,
        **kind,
        "sets": manifest["sets"],
        "arms": {arm: arm_results(found, items[arm], facts[arm], notes) for arm, found in summaries.items()},
        "family": family,
        "comparisons": comparisons,
        "power": measured_power(comparisons, family),
        "depth": by_seed(summaries, "depth"),
    }
    if ablation := by_seed(summaries, "ablation"):
        results["ablation"] = ablation
    caches = {arm: found[0].get("kv_cache_bytes_per_token") for arm, found in summaries.items()}
    base, own = caches.get("none"), caches.get("preskip")
    if base is not None and own is not None:
        results["kv_cache"] = {"base_bytes": base, "arm_bytes": own, "per": "token"}
    if any(name in COLUMNS for name in manifest["sets"]):
        results["paper"] = {
            "columns": {arm: paper_columns(row for rows in own.values() for row in rows) for arm, own in items.items()},
            "model": manifest["published"],
            "published": paper_table(manifest["published"]),
        }
    searches = {arm: stored_search(run, arm, manifest["seeds"]) for arm in items}
    if found := {arm: search for arm, search in searches.items() if search is not None}:
        results["search"] = found
        notes += search_notes(run, list(found), manifest["seeds"])
    if manifest.get("kind") == "pretrain":
        results["curves"] = {
            arm: {str(seed): _curve(read_jsonl(run.cell(arm, seed).train_log)) for seed in seeds}
            for arm, seeds in items.items()
        }
    if notes:
        results["notes"] = notes
    return results


def stored_search(run: RunDirectory, arm: str, seeds: Sequence[int]) -> Search | None:
    """An arm's search over all its seeds, as results.json has it; None where its rate was not searched for."""
    shared = run.search_file(arm, None)
    if shared.is_file():
        return read_json(shared)
    found = _searches(run, arm, seeds)
    if not found:
        return None
    every = list(found.values())
    whole: Search = {
        "default": every[0]["default"],
        "chosen": every[0]["chosen"],
        "extended": any(search["extended"] for search in every),
        "by_seed": {str(seed): search["chosen"] for seed, search in found.items()},
        "trace": [trial for search in every for trial in search["trace"]],
    }
    if "within_harm" in every[0]:
        whole["within_harm"] = all(search["within_harm"] for search in every)
    return whole


def search_notes(run: RunDirectory, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A sentence where the rates of some seeds were searched for by a preskip that searches in another way."""
    by_rule: dict[int, set[int]] = {}
    for arm in arms:
        for seed, search in _searches(run, arm, seeds).items():
            by_rule.setdefault(search.get("rule", 0), set()).add(seed)
    declared = run.manifest.get("declaration", {}).get("content", {}).get("search_rule")
    if len(by_rule) == 1 and declared is not None and declared not in by_rule:
        return ["the learning rates were searched for by another version of preskip than the one that declared the run"]
    if len(by_rule) < 2:
        return []
    parts = [f"of seed {', '.join(map(str, sorted(own)))}" for _, own in sorted(by_rule.items())]
    return [
        f"the learning rates {' and '.join(parts)} were searched for by different versions of preskip, which may "
        "choose differently: the seeds are not quite alike"
    ]


def rule_ahead(run: RunDirectory, arms: Sequence[str], seeds: Sequence[int], rule: int) -> str | None:
    """A sentence where rates of some seeds were searched for in another way than those still to be searched would be.

    Args:
        run: the run.
        arms: those whose rates are searched.
        seeds: those that it is to have.
        rule: that of a search now (`preskip.experiment.search.RULE`).
    """
    found = {arm: _searches(run, arm, seeds) for arm in arms}
    others = {seed for by_seed in found.values() for seed, search in by_seed.items() if search.get("rule", 0) != rule}
    missing = {seed for by_seed in found.values() for seed in seeds if seed not in by_seed}
    if not others or not missing:
        return None
    old, new = (", ".join(map(str, sorted(which))) for which in (others, missing))
    return (
        f"learning rates of seed {old} were searched for by another version of preskip, those of seed {new} would be "
        "by this one, which may choose differently: go on with that version, or the seeds are not quite alike"
    )


def _searches(run: RunDirectory, arm: str, seeds: Sequence[int]) -> dict[int, Search]:
    paths = {seed: run.search_file(arm, seed) for seed in seeds}
    return {seed: read_json(path) for seed, path in paths.items() if path.is_file()}


def finished_cells(
    run: RunDirectory, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, list[CellSummary]], dict[str, dict[int, list[Record]]]]:
    """The content of cell.json by arm, and of items.jsonl by arm and seed, of the cells that are done.

    Raises:
        PreskipError: a file of one is damaged.
    """
    loaded = {arm: {seed: run.cell(arm, seed).load() for seed in seeds if run.cell(arm, seed).is_done} for arm in arms}
    loaded = {arm: by_seed for arm, by_seed in loaded.items() if by_seed}
    summaries = {arm: [summary for summary, _ in by_seed.values()] for arm, by_seed in loaded.items()}
    return summaries, {arm: {seed: rows for seed, (_, rows) in by_seed.items()} for arm, by_seed in loaded.items()}


def arm_results(
    summaries: Sequence[CellSummary],
    items: Mapping[int, list[Record]],
    facts: ArmFacts,
    notes: list[str] | None = None,
) -> ArmResults:
    """One arm's entry of results.json.

    Args:
        summaries: content of cell.json of each seed.
        items: records by seed.
        facts: the arm's entry of run.json.
        notes: where to note a metric that cannot be computed; None raises its error.
    """
    cells: Sequence[Mapping[str, Any]] = summaries
    known: Mapping[str, Any] = facts
    averaged = {
        key: [cell[key] for cell in cells if cell[key] is not None] for key in (*MEANS, *RATES) if key in cells[0]
    }
    rates = {str(cell["seed"]): cell["learning_rate"] for cell in cells}
    results: Any = {
        "trainable_parameters": cells[0]["trainable_parameters"],
        **{key: known[key] for key in FACTS if key in known},
        "learning_rate": cells[0]["learning_rate"],
        **({"learning_rates": rates} if len(set(rates.values())) > 1 else {}),
        "seeds": [cell["seed"] for cell in cells],
        "metrics": summarise(items, notes=notes),
        **{
            key: float(harmonic_mean(values) if key in RATES else np.mean(values)) if values else None
            for key, values in averaged.items()
        },
        "peak_memory_bytes": max(cell["peak_memory_bytes"] for cell in cells),
    }
    return results


def _curve(rows: Sequence[StepRow]) -> list[CurvePoint]:
    """The evaluations while training: step, tokens read by then, nats per token."""
    read = np.cumsum([row["tokens"] for row in rows])
    return [
        {"step": row["step"], "tokens": int(tokens), "eval_loss": row["eval_loss"]}
        for row, tokens in zip(rows, read, strict=True)
        if "eval_loss" in row
    ]

"""results.json: the figures of every arm and the paired comparisons, from the stored cells alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preskip.analysis.depth_results import by_seed
from preskip.arms import resolve_arms
from preskip.evaluate.arm_results import arm_results, finished_cells
from preskip.evaluate.paper import COLUMNS, paper_columns
from preskip.evaluate.published import paper_table
from preskip.experiment.probe_options import ProbeConfig
from preskip.runs.directory import SCHEMA_VERSION, RunDirectory
from preskip.runs.files import read_json
from preskip.stats import compare_arms, measured_power

ARM_FACTS = (
    "budget",
    "forward_flops_per_token",
    "base_dtype",
    "adapter_dtype",
    "compute_dtype",
    "attn_implementation",
)
MEANS = ("final_training_loss", "seconds_per_step")


def summarise_run(run: RunDirectory, config: ProbeConfig, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Compute results.json from the cells that are done.

    Args:
        run: the run directory.
        config: its configuration.
        manifest: its run.json, for the sets, the arms and the declared family.

    Returns:
        The evaluation sets, metrics by arm and set, paired comparisons of all arms with verdicts, what they could
        resolve, the search for learning rates, and the depth profiles by arm and seed.
    """
    arms = [arm.name for arm in resolve_arms(config.arms)]
    summaries, items = finished_cells(run, arms, config.seeds)
    arms = list(summaries)
    family = manifest["family"]
    comparisons = compare_arms(items, family, manifest["sets"])
    results = {
        "schema_version": SCHEMA_VERSION,
        "sets": manifest["sets"],
        "arms": {
            arm: arm_results(summaries[arm], items[arm], manifest["arms"][arm], facts_kept=ARM_FACTS, means=MEANS)
            for arm in arms
        },
        "family": family,
        "comparisons": comparisons,
        "power": measured_power(comparisons, family),
        "depth": by_seed(summaries, "depth"),
    }
    if ablation := by_seed(summaries, "ablation"):
        results["ablation"] = ablation
    caches = {arm: summaries[arm][0].get("kv_cache_bytes_per_token") for arm in arms}
    if caches.get("none") is not None and caches.get("preskip") is not None:
        results["kv_cache"] = {"base_bytes": caches["none"], "arm_bytes": caches["preskip"], "per": "token"}
    if any(name in COLUMNS for name in manifest["sets"]):
        results["paper"] = {
            "columns": {arm: paper_columns(row for rows in items[arm].values() for row in rows) for arm in arms},
            "model": manifest["published"],
            "published": paper_table(manifest["published"]),
        }
    searches = {arm: run.search / arm / "search.json" for arm in arms}
    found = {arm: read_json(path) for arm, path in searches.items() if path.is_file()}
    return results | ({"search": found} if found else {})

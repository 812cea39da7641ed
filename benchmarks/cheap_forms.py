"""What cheaper forms of the branch lose: bits per byte of a probe's arms, and of its preskip adapters in int8.

    preskip probe smollm2 --arms none,preskip,lora,preskip-lowrank-narrow,preskip-bottleneck,preskip-third-narrow,\
preskip-late-narrow,skip --seeds 1,2,3 --steps 16 --batch-size 4 --dtype bfloat16 \
--eval-documents 40 --eval-words 120 --last-word-items 0 --out RUN
    python benchmarks/cheap_forms.py RUN results/cheap-forms/quality.json

Of an unfinished run it takes the seeds of which all arms are done. Every arm is compared with the untouched model and
with preskip. The adapters of preskip are scored once more as they are and baked with int8 weights, in this process, on
the run's own held-out documents. benchmarks/cost_figure.py draws the result.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from preskip.baking import bake
from preskip.evaluate.adapters import load_adapter
from preskip.experiment.cell import opened
from preskip.experiment.prepared import Prepared
from preskip.runs.files import write_json
from preskip.stats import compare

ARM, INT8 = "preskip", "preskip-int8"
# The target for int8 weights, in bits per byte.
MARGIN = 0.002
KEPT = ("set", "metric", "arm", "reference", "difference", "low", "high", "seeds", "units", "covers", "p_value")


def int8_and_unquantised(prepared: Prepared, seed: int) -> tuple[list[Any], list[Any]]:
    """Records of one adapter baked with int8 weights, and of the adapter as it is, after one another."""
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"batch_tokens": prepared.config.eval_batch_tokens, "quiet": True}
    live = load_adapter(prepared.base, prepared.run.cell(ARM, seed).adapter)
    try:
        plain = prepared.heldout.score(live, prepared.tokenizer, ARM, **how)
        with tempfile.TemporaryDirectory() as folder:
            out = bake(live, Path(folder) / "int8", quantize="int8")
            baked: Any = AutoModelForCausalLM.from_pretrained(out, dtype=prepared.base.dtype)
            return prepared.heldout.score(baked.eval(), prepared.tokenizer, INT8, **how), plain
    finally:
        live.unload()


def measure(path: Path) -> dict[str, Any]:
    """The comparisons, with what they were made on."""
    prepared = opened(path.resolve())
    run, arms = prepared.run, list(prepared.config.arms)
    trained = [arm for arm in arms if arm != "none"]
    first = prepared.config.seeds[0]
    seeds = [s for s in prepared.config.seeds if all(run.cell(arm, s).is_done for arm in trained)]
    if ARM not in trained or not seeds or not run.cell("none", first).is_done:
        raise SystemExit(f"{path} has no seed of which all arms are done, or no arm {ARM}")
    items = {arm: {seed: run.cell(arm, seed).load()[1] for seed in seeds} for arm in trained}
    none = {first: run.cell("none", first).load()[1]}
    items[INT8], plain = {}, {}
    for seed in seeds:
        items[INT8][seed], plain[seed] = int8_and_unquantised(prepared, seed)
        print(f"int8, seed {seed}: scored", flush=True)
    entries = [_entry(items[arm], none, arm, "none") for arm in items]
    entries += [_entry(items[arm], items[ARM], arm, ARM) for arm in items if arm not in (ARM, INT8)]
    entries.append(_entry(items[INT8], plain, INT8, ARM, margins={"bits_per_byte": MARGIN}))
    facts = run.manifest["arms"]
    weights = {arm: facts[arm]["trainable_parameters"] for arm in trained}
    config = prepared.config
    return {
        "model": config.model,
        "corpus": config.corpus,
        "dtype": config.dtype,
        "design": {
            name: getattr(config, name) for name in ("steps", "batch_size", "seq_len", "eval_documents", "eval_words")
        },
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "learning_rates": {arm: facts[arm]["learning_rate"] for arm in trained},
        "weights": {**weights, INT8: weights[ARM]},
        "comparisons": entries,
    }


def _entry(ours: dict[int, Any], theirs: dict[int, Any], arm: str, reference: str, **how: Any) -> dict[str, Any]:
    """The paired difference in bits per byte on the in-domain documents, which come first."""
    found = compare(ours, theirs, arm=arm, reference=reference, **how)
    entry = next(entry for entry in found if entry["metric"] == "bits_per_byte")
    return {key: entry[key] for key in (*KEPT, *(("margin", "p_equivalence") if how else ()))}


def main() -> None:
    """Score, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    found = measure(given.run)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, found)
    print(json.dumps(next(entry for entry in found["comparisons"] if "margin" in entry)))


if __name__ == "__main__":
    main()

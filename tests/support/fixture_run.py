"""Synthetic run directories of schema 2: a rich one with everything a run can hold, and the smallest one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

LAYERS = 30
# Trainable weights, budget, learning rate; the true benefit: bits per byte at home and in books, LAMBADA.
ARMS: dict[str, tuple[int, str, float | None, float, float, float]] = {
    "none": (0, "none", None, 0.0, 0.0, 0.0),
    "preskip": (34_836_480, "matched", 1e-3, 0.171, -0.041, -0.021),
    "preproj": (34_836_480, "matched", 1e-3, 0.149, -0.048, -0.036),
    "skip": (9_953_280, "smaller", 1e-3, 0.152, -0.002, 0.019),
    "content": (34_836_480, "matched", 1e-3, 0.168, 0.012, 0.024),
    "parallel": (34_836_480, "matched", 3e-3, 0.173, 0.014, 0.031),
    "lora": (34_790_400, "matched", 3e-4, 0.166, -0.019, 0.009),
    "dora": (34_790_400, "matched", 3e-4, 0.165, -0.021, 0.004),
    "layernorm": (35_136, "floor", 3e-3, 0.102, 0.009, 0.022),
}
BASE = {"wikitext2": 0.952, "books": 1.104, "lambada_openai": 0.313, "heldout": 1.0276, "last_word": 0.4875}
MARGINS = {"bits_per_byte": 0.005, "acc": 0.01, "nll": 0.02}


def rich_run(run: Path, *, seeds: tuple[int, ...] = (1, 2, 3), steps: int = 60) -> Path:
    """Nine arms, three sets, search, nulls, equal-step control, ablation, trend and power."""
    names = list(ARMS)
    sets: dict[str, dict[str, Any]] = {
        "wikitext2": _documents("WikiText-2 test", "in", 62, 61_240, 280_512),
        "lambada_openai": _items("LAMBADA (OpenAI)", "out", 1_500),
        "books": _documents("books", "out", 24, 48_112, 224_031),
    }
    pairs = [(arm, "none") for arm in names[1:]] + [("preskip", arm) for arm in names[2:]]
    declared = [
        {"arm": arm, "reference": reference, "set": name, "metric": entry["primary"]}
        for arm, reference in pairs
        for name, entry in sets.items()
    ]
    results = _results(names, seeds, sets, declared)
    generator = np.random.default_rng(5)
    results["search"] = {arm: _search(arm, generator) for arm in names[1:]}
    results["depth"] = {
        arm: {str(seed): _depth(arm, seed) for seed in seeds} for arm in ("preskip", "preproj", "skip", "content")
    }
    results["nulls"] = {
        "noise": {arm: [{"seed": seed, "layers": _null(0.13, seed)} for seed in (1, 2)] for arm in ("preskip", "skip")},
        "shuffled": {"preskip": [{"seed": seed, "layers": _null(0.24, seed)} for seed in (1, 2)]},
    }
    results["equal_step"] = {"preskip": {"1": _depth("preskip", 9)}}
    results["ablation"] = {"preskip": {str(seed): _ablation(seed) for seed in seeds}, "skip": {"1": _ablation(4)[::2]}}
    results["trend"] = {
        "preskip": [
            _trend("skip_norm", 0.91, "later more", (-0.35, 0.36)),
            _trend("skip_to_attention", 0.22, "undecided", (-0.36, 0.35)),
            _trend("ablation_skip", -0.44, "later less", None),
        ],
        "skip": [_trend("skip_norm", 0.88, "later more", None)],
    }
    results["power"] = [
        {
            "set": entry["set"],
            "metric": entry["metric"],
            "arm": entry["arm"],
            "reference": entry["reference"],
            "units": entry["units"],
            "seeds": len(seeds),
            "resolvable": 0.72 * (entry["high"] - entry["low"]),
            "basis": "measured",
        }
        for entry in results["comparisons"]
        if entry["declared"]
    ]
    return _write(run, "wikitext2", names, seeds, steps, sets, results)


def minimal_run(run: Path, *, corpus: str = "sotu") -> Path:
    """Three arms, one seed, held-out documents and last-word items; nothing else was done."""
    names = ["none", "preskip", "lora"]
    sets = {
        "heldout": _documents("SOTU, held out", "in", 50, 8_436, 42_111),
        "last_word": _items("last word (SOTU)", "in", 80),
    }
    results = _results(names, (42,), sets, [])
    results["depth"] = {"preskip": {"42": _depth("preskip", 42)}}
    return _write(run, corpus, names, (42,), 16, sets, results)


def _documents(title: str, domain: str, documents: int, tokens: int, size: int) -> dict[str, Any]:
    return {
        "kind": "document",
        "domain": domain,
        "title": title,
        "source": f"the source of {title}",
        "sha256": "a7" * 32,
        "context_length": 256,
        "stride": 256,
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        "words": size // 6,
        "primary": "bits_per_byte",
    }


def _items(title: str, domain: str, items: int) -> dict[str, Any]:
    return {
        "kind": "item",
        "domain": domain,
        "title": title,
        "source": f"the source of {title}",
        "sha256": None,
        "context_length": None,
        "stride": None,
        "items": items,
        "primary": "acc",
    }


def _benefit(arm: str, name: str, metric: str) -> float:
    home, books, points = ARMS[arm][3:]
    if metric == "bits_per_byte":
        return {"books": books}.get(name, home)
    return points if metric == "acc" else 4 * points


def _results(
    names: list[str], seeds: tuple[int, ...], sets: dict[str, Any], declared: list[dict[str, str]]
) -> dict[str, Any]:
    measures = [
        (name, metric)
        for name, entry in sets.items()
        for metric in (["bits_per_byte"] if entry["kind"] == "document" else ["acc", "nll"])
    ]
    generator = np.random.default_rng(3)
    comparisons = []
    for name, metric in measures:
        for index, reference in enumerate(names):
            for arm in names[index + 1 :]:
                # `preskip` is compared with the others in its own direction, as declared.
                pair = (reference, arm) if reference == "preskip" else (arm, reference)
                comparisons.append(_comparison(pair, name, metric, sets[name], len(seeds), declared, generator))
    _holm(comparisons)
    for entry in comparisons:
        entry["verdict"] = _verdict(entry)
    arms = {}
    for name in names:
        weights, budget, rate = ARMS[name][:3]
        metrics: dict[str, Any] = {}
        for set_name, metric in measures:
            sign = 1 if metric == "acc" else -1
            start = BASE[set_name] if metric != "nll" else 3.78
            value, half = start + sign * _benefit(name, set_name, metric), 0.0312 if metric != "nll" else 0.2
            metrics.setdefault(set_name, {})[metric] = _interval(value, half)
            if metric == "bits_per_byte":
                metrics[set_name]["word_perplexity"] = _interval(math.exp(4 * value), 3.9)
        arms[name] = {
            "trainable_parameters": weights,
            "forward_flops_per_token": 2 * weights,
            "budget": budget,
            "learning_rate": rate,
            "seeds": list(seeds),
            "base_dtype": "float32",
            "adapter_dtype": "float32" if weights else None,
            "compute_dtype": "float32",
            "attn_implementation": "sdpa",
            "metrics": metrics,
            "final_training_loss": 2.71 if weights else None,
            "seconds_per_step": 4.61 if weights else None,
            "peak_memory_bytes": 2_500_000_000,
        }
    return {
        "schema_version": 2,
        "sets": sets,
        "arms": arms,
        "family": {"declared": declared, "alpha": 0.05, "margins": MARGINS},
        "comparisons": comparisons,
        "depth": {},
    }


def _interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "confidence": 0.95}


def _comparison(
    pair: tuple[str, str],
    name: str,
    metric: str,
    about: dict[str, Any],
    seeds: int,
    declared: list[dict[str, str]],
    generator: np.random.Generator,
) -> dict[str, Any]:
    arm, reference = pair
    sign = 1 if metric == "acc" else -1
    units = about.get("documents") or about["items"]
    error = {"bits_per_byte": 0.0018, "acc": 0.42 / math.sqrt(units), "nll": 1.1 / math.sqrt(units)}[metric]
    difference = sign * (_benefit(arm, name, metric) - _benefit(reference, name, metric))
    difference += float(error * 0.5 * generator.standard_normal())
    if metric == "acc":
        difference = round(difference * units) / units
    margin = MARGINS[metric]
    lost = round(0.08 * units)
    p_lower, p_upper = (stats.norm.cdf((s * difference - margin) / error) for s in (1, -1))
    return {
        "set": name,
        "metric": metric,
        "arm": arm,
        "reference": reference,
        "difference": difference,
        "low": difference - 1.96 * error,
        "high": difference + 1.9 * error,
        "confidence": 0.95,
        "seeds": seeds,
        "units": units,
        "unit": about["kind"],
        "clusters": 25 if name == "last_word" else None,
        "covers": "seeds and units" if seeds > 1 else "units only",
        "gained": lost + round(difference * units) if metric == "acc" else None,
        "lost": lost if metric == "acc" else None,
        "p_value": float(2 * stats.norm.sf(abs(difference) / error)),
        "declared": any(
            (d["arm"], d["reference"], d["set"], d["metric"]) == (arm, reference, name, metric) for d in declared
        ),
        "p_holm": None,
        "margin": margin,
        "p_equivalence": float(max(p_lower, p_upper)),
    }


def _holm(comparisons: list[dict[str, Any]]) -> None:
    family = sorted((entry for entry in comparisons if entry["declared"]), key=lambda entry: entry["p_value"])
    largest = 0.0
    for rank, entry in enumerate(family):
        largest = max(largest, min(1.0, (len(family) - rank) * entry["p_value"]))
        entry["p_holm"] = largest


def _verdict(entry: dict[str, Any]) -> str:
    p = entry["p_value"] if entry["p_holm"] is None else entry["p_holm"]
    if not entry["low"] <= 0 <= entry["high"] and p <= 0.05:
        return "better" if (entry["difference"] > 0) == (entry["metric"] == "acc") else "worse"
    return "equivalent" if entry["p_equivalence"] <= 0.05 else "undecided"


def _search(arm: str, generator: np.random.Generator) -> dict[str, Any]:
    chosen = ARMS[arm][2]
    assert chosen is not None
    grid = [chosen * factor for factor in (0.1, 0.3, 1, 3, 10)]
    home, books = ARMS[arm][3:5]
    trace = []
    for rung, (steps, kept) in enumerate(((24, 5), (48, 3), (96, 2))):
        for rate in sorted(grid, key=lambda rate: abs(math.log(rate / chosen)))[:kept]:
            away = math.log10(rate / chosen)
            diverged = arm == "preproj" and away > 0.9
            inside = -home * (0.45 + 0.2 * rung) * (1 - 0.5 * away**2) + 0.004 * generator.standard_normal()
            outside = -books * (0.4 + 0.25 * rung) * 10 ** (0.5 * away) + 0.004 * generator.standard_normal()
            trace.append(
                {
                    "rung": rung,
                    "steps": steps,
                    "learning_rate": float(f"{rate:.3g}"),
                    "seed": 1,
                    "dev": None
                    if diverged
                    else {"in": _interval(inside, 0.007), "out": {"books": _interval(outside, 0.006)}},
                    "kept": rung < 2 and abs(away) < 0.6,
                    "diverged": diverged,
                }
            )
    return {"default": 5e-4, "chosen": chosen, "extended": arm == "parallel", "trace": trace}


def _depth(arm: str, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    for layer, x in enumerate(np.linspace(0, 1, LAYERS)):
        noise = generator.random(3)
        rows.append(
            {
                "layer": layer,
                "up_norm": 3.1,
                "down_norm": 0.8 + 0.2 * float(noise[0]) if arm != "skip" else 0.0,
                "skip_norm": 0.0 if arm == "preproj" else float(0.35 + 0.5 * x**3 + 0.02 * noise[1]),
                "skip_to_attention": None if arm == "preproj" else float(0.1 + 0.4 * x**2 + 0.03 * noise[2]),
                "enrichment": None if arm == "skip" else float(0.3 * (1 - x) + 0.05),
            }
        )
    return rows


def _null(norm: float, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [
        {"layer": layer, "up_norm": 3.0, "down_norm": 0.5, "skip_norm": norm + 0.02 * float(generator.random())}
        for layer in range(LAYERS)
    ]


def _ablation(seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    for layer in range(LAYERS):
        for part in ("skip", "enrichment"):
            value = 0.004 * float(generator.random()) - 0.0008
            half = 0.0012
            row = {"layer": layer, "part": part, "difference": value, "low": value - half, "high": value + half}
            rows.append(row)
    return rows


def _trend(measure: str, rho: float, verdict: str, null: tuple[float, float] | None) -> dict[str, Any]:
    low, high = null or (None, None)
    return {
        "measure": measure,
        "rho": rho,
        "low": rho - 0.15,
        "high": min(1.0, rho + 0.12),
        "null_low": low,
        "null_high": high,
        "verdict": verdict,
        "seeds": 3,
    }


def _write(
    run: Path,
    corpus: str,
    names: list[str],
    seeds: tuple[int, ...],
    steps: int,
    sets: dict[str, Any],
    results: dict[str, Any],
) -> Path:
    record = {
        "schema_version": 2,
        "preskip_version": "0.2.0",
        "status": "finished",
        "created": "2026-11-24T09:12:31+00:00",
        "finished": "2026-11-24T09:18:02+00:00",
        "command": ["preskip", "probe", "--seeds", ",".join(map(str, seeds)), "--out", "runs/my run"],
        "config": {"steps": steps, "batch_size": 8, "seq_len": 128},
        "model": {
            "name": "smollm2",
            "type": "llama",
            "parameters": 134_515_008,
            "layers": LAYERS,
            "hidden_size": 576,
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "source": "SmolLM2-135M-Instruct, Apache-2.0",
            "sha256": "b1" * 32,
        },
        "corpus": {
            "name": corpus,
            "training_documents": 220,
            "training_tokens": 98_304,
            "heldout_documents": 62,
            "source": "where the corpus is from",
            "sha256": "f7" * 32,
        },
        "environment": {
            "python": "3.11.7",
            "platform": "Linux-6.1",
            "processor": "x86_64",
            "cores": 2,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "device": "cpu",
            "memory_bytes": 24 * 2**30,
        },
        "sets": sets,
        "family": results["family"],
        "arms": {
            name: {
                "description": f"what {name} does",
                "learning_rate": ARMS[name][2],
                "settings": {"expansion": 1.25} if name == "preskip" else {},
                "budget": ARMS[name][1],
            }
            for name in names
        },
        "seeds": list(seeds),
        "timings": {"load": 1.2, "train": 272.4, "evaluate": 41.7, "total": 331.0},
        "peak_memory_bytes": 2_812_000_000,
    }
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record))
    (run / "results.json").write_text(json.dumps(results))
    for place, name in enumerate(names[1:]):
        for seed in seeds:
            generator = np.random.default_rng([seed, place])
            folder = run / "arms" / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            losses = [
                2.65 + 0.03 * place + 0.7 * math.exp(-step / 15) + 0.06 * generator.standard_normal()
                for step in range(1, steps + 1)
            ]
            lines = [
                {"step": step, "loss": float(loss), "learning_rate": 1e-3, "seconds": 4.6}
                for step, loss in enumerate(losses, start=1)
            ]
            (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run

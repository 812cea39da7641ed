"""The paper's claims one by one (C. Shinde, arXiv 2604.10791), each with what this run says about it.

Pure functions over stored results. A claim has parts; a part is one stored comparison (or trend) and reads supported
(better), contradicted (worse: the opposite is shown), not shown (equivalent, no trend, undecided, or too few units to
judge by), or not measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from preskip.report.lookup import DOMAINS, PAPER, find, is_declared, is_pretraining, metric_on, resolvable, sets_of
from preskip.report.words.verdicts import MINUS, amount, nulls_text, number, sentence, set_label
from preskip.runs.schema import Manifest, Results, Trend
from preskip.stats.detail import t_interval

ARM = "preskip"
# What the verdict of a comparison, or of a trend over depth, says of the claim.
READING = {
    "better": "supported",
    "worse": "contradicted",
    "equivalent": "not shown",
    "later more": "supported",
    "later less": "contradicted",
    "no trend": "not shown",
    "undecided": "not shown",
    "too few units": "not shown",
}
CONTROLS = {
    "skip": "a linear skip alone",
    "parallel": "a parallel adapter beside attention",
    "content": "the same skip with attention left as it was",
}
# What training from scratch is held against, in the order in which the questions come up.
FROM_SCRATCH = {
    "base": "the same architecture without it, trained on the same tokens",
    "base-wide": "a plain model with as many weights, its MLP widened",
    "base-deep": "a plain model with about as many weights, of more layers",
    "base-flops": "a plain model trained with as many FLOPs, on more tokens",
    "preproj": "the pre-projection alone, of as many weights",
    "skip": "a linear skip alone",
    "parallel": "a parallel adapter beside attention, of as many weights",
}
MEASURES = {
    "skip_norm": "Norm of the skip",
    "skip_to_attention": "Functional size ‖skip output‖ / ‖attention output‖",
    "equal_step_skip_to_attention": "Functional size after equal steps in all layers",
    "ablation_skip": "Loss when one layer's skip is off",
}
Claim = dict[str, Any]
Part = dict[str, Any]


def assess(record: Manifest, results: Results) -> list[Claim]:
    """Hold the paper's claims, and the controls that decide how to read them, against one run.

    Returns:
        One dictionary per claim: id, kind ("claim" or "control"), claim (in words), verdict ("supported",
        "contradicted", "mixed", "not shown" or "not measured"), evidence (one or more sentences), parts, exploratory
        (whether a comparison in it was not declared before training, or it is about a trend, which never is),
        one_training (whether a comparison in it is of one seed: then it is about this training, not about the method),
        and of the part that the verdict rests on set, metric, arm, reference, difference, low, high and resolvable (the
        smallest true difference the run finds with 80 % power), or None.
    """
    bench = _Bench(record, results)
    sets = list(results["sets"])
    if is_pretraining(results):  # the paper never did: what its module would have to show, against each control
        return [
            _claim(f"scratch-{arm}", f"From scratch it beats {words} ({arm})", bench.against(arm, sets), arm != "base")
            for arm, words in FROM_SCRATCH.items()
        ]
    # The standard scoring (lambada_openai) before the paper's own (paper:lambada).
    lambada = [name for name in sets_of(results, kind="item") if "lambada" in name]
    lambada = sorted(lambada, key=lambda name: not name.startswith("lambada"))[:1]
    # On all layers; where only the paper's own, on attention alone, was trained, that one.
    rival = "lora-attention" if "lora" not in results["arms"] and "lora-attention" in results["arms"] else "lora"
    both = bench.against("none", lambada) + bench.against(rival, lambada, equal_budget=True)
    texts = bench.against("none", sets_of(results, kind="document"))
    sets = [name for name in sets if not name.startswith(PAPER)]
    lora, preproj = (bench.against(arm, sets, equal_budget=True) for arm in (rival, "preproj"))
    controls = {arm: bench.against(arm, sets, equal_budget=arm != "skip") for arm in CONTROLS}
    return [
        _claim("lambada", "LAMBADA accuracy rises, also at equal budget", both or [_missing("the set lambada_openai")]),
        _claim("perplexity", "Perplexity falls", texts or [_missing("a set of documents")]),
        _claim("better-than-lora", "It is better than LoRA at equal budget", lora),
        _claim("skip-adds", "The content skip adds to the pre-projection", preproj),
        _claim("together", "Comprehension and perplexity improve together", bench.together(), together=True),
        _claim("depth", "Later layers bypass attention more", bench.trends()),
        _claim("cache", "The K/V cache does not grow", [bench.cache()]),
        *(_claim(f"control-{arm}", f"It beats {CONTROLS[arm]} ({arm})", own, True) for arm, own in controls.items()),
    ]


class _Bench:
    """One run's stored results, read part by part."""

    def __init__(self, record: Manifest, results: Results) -> None:
        self.record, self.results = record, results

    def against(self, reference: str, sets: Sequence[str], *, equal_budget: bool = False) -> list[Part]:
        """The parts "preskip − reference" on each set's primary metric."""
        return [self._compare(reference, name, equal_budget=equal_budget) for name in sets]

    def _compare(self, reference: str, set_name: str, *, equal_budget: bool) -> Part:
        missing = [name for name in (ARM, reference) if name not in self.results["arms"]]
        sets = self.results["sets"]
        where = f"{set_label(sets, set_name)} ({DOMAINS[sets[set_name]['domain']]})"
        title = f"{ARM} {MINUS} {reference}, {metric_on(self.results, set_name).phrase} on {where}"
        if missing:
            return _missing(*(f"arm {name}" for name in missing), title=title)
        if equal_budget and not self.same_budget(reference):
            counts = " and ".join(f"{self.weights(name):,} ({name})" for name in (ARM, reference))
            return _missing(f"equal budgets (they train {counts} weights; --match params)", title=title)
        entry = find(self.results, ARM, reference, set_name)
        if entry is None:
            return _missing(f"this comparison among its pairs ({title})", title=title)
        smallest, basis = resolvable(self.results, entry)
        text = sentence(entry, sets)
        if not is_declared(entry):
            text += " (not declared before training: exploratory, not corrected)"
        if reference != "none" and not self.same_budget(reference):
            text += f"; {reference} trains {self.weights(reference) / self.weights(ARM):.0%} of {ARM}'s weights"
        return _part(title, READING[entry["verdict"]], text, entry=entry, resolvable=smallest, basis=basis)

    def together(self) -> list[Part]:
        """The claim's two halves: bits per byte in-domain, and every accuracy that was scored."""
        in_domain = sets_of(self.results, domain="in", kind="document")[:1]
        items = [
            name for name in sets_of(self.results, kind="item") if not metric_on(self.results, name).lower_is_better
        ]
        parts = self.against("none", in_domain) or [_missing("an in-domain set of documents")]
        return parts + (self.against("none", items) or [_missing("a set of items")])

    def trends(self) -> list[Part]:
        """Every stored trend of the skip over depth; a norm counts only against a null band."""
        rows = (self.results.get("trend") or {}).get(ARM) or []
        if ARM not in self.results["arms"]:
            return [_missing(f"arm {ARM}")]
        if not rows:
            return [_missing("the trend over depth (its analysis was left out)")]
        parts = [_trend_part(row, self.later_worth()) for row in rows]
        if not any(row["measure"] == "ablation_skip" for row in rows):
            parts.append(_missing("the loss with one layer's skip off (--ablation-documents)"))
        return parts

    def later_worth(self) -> tuple[float, float] | None:
        """Bits per byte that switching off one layer's skip costs, mean over the later half of the layers and seeds,
        and its lower limit: of the 95 % t interval over seeds, or with one seed the layers' own over
        documents, as if they erred together.
        """
        seeds = (self.results.get("ablation") or {}).get(ARM) or {}
        costs = [[row for row in rows if row["part"] == "skip"] for rows in seeds.values()]
        layers = sorted({row["layer"] for rows in costs for row in rows})
        kept = layers[len(layers) // 2 :]
        later = [[row for row in rows if row["layer"] in kept] for rows in costs]
        means = [fmean(row["difference"] for row in rows) for rows in later if rows]
        if not means:
            return None
        if len(means) == 1:
            lows = [row["low"] for rows in later for row in rows if "low" in row]
            return means[0], fmean(lows) if lows else -math.inf
        return fmean(means), t_interval(means)[0]

    def cache(self) -> Part:
        """The bytes of the K/V cache with and without the branch."""
        stored = self.results.get("kv_cache")
        if not stored:
            return _missing(
                "the bytes of the K/V cache after the same prompt with and without the adapter: the sum over the "
                "tensors of past_key_values"
            )
        base, arm = round(stored["base_bytes"]), round(stored["arm_bytes"])
        per = f" per {stored['per']}" if stored.get("per") else ""
        text = f"The cache holds {arm:,} bytes{per} with the branch and {base:,} without"
        return _part("bytes of the K/V cache", "supported" if arm <= base else "contradicted", text)

    def same_budget(self, reference: str) -> bool:
        """Whether both arms train (or compute) the same, as the run matched them."""
        stored: Any = self.record.get("arms") or {}
        found = [
            self.results["arms"][arm].get("budget") or stored.get(arm, {}).get("budget") for arm in (ARM, reference)
        ]
        return found == ["matched", "matched"]

    def weights(self, arm: str) -> int:
        """Trainable weights of an arm."""
        return int(self.results["arms"][arm]["trainable_parameters"])


def trend_text(row: Trend) -> str:
    """One trend over depth in words, with its interval, size and null band."""
    text = f"{MEASURES.get(row['measure'], row['measure'])}, rank correlation with depth {row['rho']:+.2f}"
    if row.get("low") is not None:
        text += f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    if row.get("size") is not None:
        size, low, high = row["size"], row["size_low"], row["size_high"]
        text += f", later third {size:.2f} times the rest" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
    if row.get("null_low") is not None:
        text += f", null band [{row['null_low']:+.2f}, {row['null_high']:+.2f}]"
    if own := nulls_text(row):
        text += f" ({own})"
    return text.replace("-", MINUS) + f": {row['verdict']}"


def _trend_part(row: Trend, later_worth: tuple[float, float] | None) -> Part:
    verdict, text = READING[row["verdict"]], trend_text(row)
    if row["measure"] == "ablation_skip" and verdict == "supported" and later_worth is not None and later_worth[1] <= 0:
        # From harmful to harmless is a rise, too, but no use of the skip.
        verdict = "not shown"
        cost, low = (number(value, 4, sign=True) if math.isfinite(value) else "–" for value in later_worth)
        text += (
            f", but in the later half of the layers the loss is not shown to rise without it (mean {cost} bits per "
            f"byte, at least {low})"
        )
    if row["measure"] == "skip_norm" and row.get("null_low") is None:
        verdict, text = "not shown", text + ", but without a null band a norm shows little"
    limits = {"difference": row["rho"], "low": row.get("low"), "high": row.get("high")}
    return _part(MEASURES.get(row["measure"], row["measure"]), verdict, text, **limits)


def _part(title: str, verdict: str, evidence: str, **more: Any) -> Part:
    return {"title": title, "verdict": verdict, "evidence": evidence, "needs": [], **more}


def _missing(*needs: str, title: str = "") -> Part:
    text = "Not measured in this run: needs " + " and ".join(needs)
    return _part(title, "not measured", text, needs=list(needs))


def _claim(name: str, words: str, parts: Sequence[Part], control: bool = False, *, together: bool = False) -> Claim:
    verdict = combine([part["verdict"] for part in parts], together=together)
    measured = [part for part in parts if part["verdict"] != "not measured"]
    # What the verdict rests on: a part that reads as the whole does, else the first one measured.
    weight = next((part for part in measured if part["verdict"] == verdict), measured[0] if measured else {})
    entry = weight.get("entry") or weight
    return {
        "id": name,
        "kind": "control" if control else "claim",
        "claim": words,
        "verdict": verdict,
        # An arm that is missing is named once, not once per set.
        "evidence": ". ".join(dict.fromkeys(part["evidence"] for part in parts)),
        "parts": list(parts),
        "needs": list(dict.fromkeys(need for part in parts for need in part["needs"])),
        "one_training": any(part["entry"]["seeds"] == 1 for part in measured if "entry" in part),
        "exploratory": any(_is_exploratory(part) for part in measured),
        **{key: entry.get(key) for key in ("set", "metric", "arm", "reference", "difference", "low", "high")},
        "resolvable": weight.get("resolvable"),
    }


def _is_exploratory(part: Part) -> bool:
    """Whether a part's figure was not declared: a comparison may be, a trend never is, and a count has no figure."""
    return not is_declared(part["entry"]) if "entry" in part else "difference" in part


def combine(verdicts: Sequence[str], *, together: bool = False) -> str:
    """One verdict for a claim of several parts; none outvotes another.

    What all parts read; mixed if some are supported and others contradicted; not shown otherwise, also while a part is
    not measured; not measured if nothing was. That parts go `together` is contradicted as soon as one of them is.
    """
    found = set(verdicts) or {"not measured"}
    if together and "contradicted" in found:
        return "contradicted"
    if {"supported", "contradicted"} <= found:
        return "mixed"
    return found.pop() if len(found) == 1 else "not shown"


def parts_text(claim: Claim) -> str:
    """How many of a claim's parts say what, declared and exploratory ones apart."""
    groups: dict[str, list[str]] = {}
    for part in claim["parts"]:
        entry = part.get("entry")
        kind = "" if entry is None else "declared" if is_declared(entry) else "exploratory"
        groups.setdefault(kind, []).append(part["verdict"])
    texts = []
    for kind, verdicts in groups.items():
        counted = ", ".join(f"{count} {word}" for word, count in Counter(verdicts).items())
        texts.append(f"{kind}: {counted}" if kind else counted)
    return "; ".join(texts)


def power_text(part: Mapping[str, Any]) -> str:
    """What the run resolves for a part, in words; empty for parts without a comparison."""
    smallest = part.get("resolvable")
    return "" if smallest is None else f"resolves {amount(part['entry']['metric'], smallest)}"

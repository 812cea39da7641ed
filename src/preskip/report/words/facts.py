"""What was run on what, and what it cannot show: the page's last two sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from preskip.metrics import metric_named
from preskip.report.lookup import is_declared, primary, sets_of, trained_arms
from preskip.report.words.verdicts import MINUS, margin_text, sentence, set_label, set_title
from preskip.runs.declaration import changes
from preskip.runs.schema import Manifest, Results

Groups = list[tuple[str, list[tuple[str, str]]]]
FACT_VERSIONS = ("python", "torch", "transformers", "peft")


def facts(record: Manifest) -> Groups:
    """Groups of (label, value): model, corpus, machine and run; what run.json does not say is left out."""
    model, corpus, environment = (cast(Any, record)[key] for key in ("model", "corpus", "environment"))
    training = (_join(corpus.get(f"training_{unit}"), unit) for unit in ("documents", "tokens"))
    shape = (_join(model.get("layers"), "layers"), _join(model.get("hidden_size"), "", "width "))
    groups: dict[str, dict[str, Any]] = {
        "Model": {
            "Name": model["name"],
            "Type": model.get("type"),
            "Parameters": _join(model.get("parameters")),
            "Shape": ", ".join(filter(None, shape)),
            "Data type": model.get("dtype"),
            "Attention": model.get("attn_implementation"),
            "Source": model.get("source"),
            "SHA-256": model.get("sha256"),
        },
        "Training corpus": {
            "Name": corpus["name"],
            "Training": ", ".join(filter(None, training)),
            "Held out": _join(corpus.get("heldout_documents"), "documents"),
            "Source": corpus.get("source"),
            "SHA-256": corpus.get("sha256"),
        },
        "Machine": {
            "Device": environment.get("device"),
            "Processor": environment.get("processor"),
            "Cores": _join(environment.get("cores")),
            "Memory": bytes_text(environment.get("memory_bytes")),
            "Platform": environment.get("platform"),
            "Versions": ", ".join(f"{key} {environment[key]}" for key in FACT_VERSIONS if environment.get(key)),
            "Commit": environment.get("commit"),
            "Parts computed on": _earlier(record),
            "Peak memory": bytes_text(record.get("peak_memory_bytes")),
        },
        "Run": {
            "Seeds": ", ".join(str(seed) for seed in record["seeds"]),
            "Started": record["created"],
            "Finished": record.get("finished"),
            "Learning rates": _rate_rule(record),
            **{k.replace("_", " ").capitalize(): _seconds(v) for k, v in (record.get("timings") or {}).items()},
        },
        "Declaration": {
            "Declared": record.get("declaration", {}).get("time"),
            "SHA-256": record.get("declaration", {}).get("sha256"),
            "Looks": ", ".join(f"{look} seeds" for look in record["family"].get("looks", ())),
            "Changed since": "; ".join(changes(record)),
        },
    }
    return fact_groups(groups)


def _rate_rule(record: Manifest) -> str:
    """How `--lr tune` chose; empty where it did not."""
    config = record["config"]
    if config.get("lr_mode") != "tune":
        return ""
    each = "anew for each seed" if "declaration" in record else "once for all seeds"
    if config.get("lr_rule") != "frontier":
        return f"tuned {each}, the best in-domain"
    share = config.get("tune_share", 0.5)
    part = "half" if share == 0.5 else f"{share:.0%}"
    when = "all steps" if share == 1 else f"{part} of the steps: after all of them it may be more"
    return (
        f"tuned {each}, the best in-domain that loses at most {config['lr_harm']:g} bits per byte out-of-domain, on "
        f"development texts after {when}"
    )


def fact_groups(groups: Mapping[str, Mapping[str, Any]], text: Callable[[Any], str] = str) -> Groups:
    """Groups of (label, value in words), without what is not known."""
    return [
        (name, [(label, text(value)) for label, value in entries.items() if value not in (None, "", "–")])
        for name, entries in groups.items()
    ]


def _earlier(record: Manifest) -> str:
    """The other machines, or versions, of the attempts before the last; empty where there were none."""
    last: Any = record["environment"]
    others: Any = record.get("earlier_environments") or ()
    keys = ("device", "processor", "platform", "commit", *FACT_VERSIONS)
    told = [
        ", ".join(str(other[key]) for key in keys if other.get(key) not in (None, last.get(key))) for other in others
    ]
    return "; ".join(dict.fromkeys(text for text in told if text))


def settings(record: Manifest) -> list[tuple[str, str]]:
    """(arm, its description and settings in words) of every arm that has any."""
    texts = []
    for name, arm in record["arms"].items():
        chosen = ", ".join(f"{key} = {value}" for key, value in (arm.get("settings") or {}).items())
        texts.append((name, "; ".join(filter(None, (arm.get("description"), chosen)))))
    return [(name, text) for name, text in texts if text]


def family_text(results: Results) -> str:
    """The family declared before training, its level and the margins of equivalence, in words."""
    family = results.get("family") or {}
    declared, alpha = len(family.get("declared") or ()), family.get("alpha", 0.05)
    if declared:
        text = (
            f"{declared} comparison{'s were' if declared > 1 else ' was'} declared before training; their p-values "
            f"are corrected for that family (Holm) and judged at {alpha:g}. "
        )
        if family.get("procedure") == "gatekeeping":
            first = next(entry for entry in family["declared"] if entry["level"] == 1)
            has_gain = family["declared"][0]["level"] == 0
            text = (
                f"{declared} comparison{'s were' if declared > 1 else ' was'} declared before training and judged at "
                f"{alpha:g}. The primary one is {first['arm']} {MINUS} {first['reference']} on "
                f"{set_label(results['sets'], first['set'])}. "
                + ("It is tested if a difference from the plain model there is shown. " if has_gain else "")
                + "The others are secondary: they count only if it is decided as a difference, and are corrected for "
                "their number (Holm). Equivalences are corrected by Holm over all. "
            )
        if looks := family.get("looks"):
            text += f"Looks were declared at {', '.join(map(str, looks))} seeds; corrected p-values allow for them. "
        text += "All other comparisons are exploratory: their p-values are not corrected."
    else:
        text = f"No family was declared before training: every p-value is uncorrected, judged at {alpha:g}."
    margins = "; ".join(
        f"{metric_named(key).phrase} {margin_text(key, value)}" for key, value in (family.get("margins") or {}).items()
    )
    return text + (f" Margins of equivalence: {margins}." if margins else "")


def declared_text(results: Results) -> str:
    """What the comparisons declared before training decided, after correction, in sentences; "" where none was."""
    declared = [entry for entry in results["comparisons"] if is_declared(entry)]
    if not declared:
        return ""
    unsaid = ("undecided", "too few units")
    decided = [sentence(entry, results["sets"]) for entry in declared if entry["verdict"] not in unsaid]
    few = sum(entry["verdict"] == "too few units" for entry in declared)
    undecided = len(declared) - len(decided) - few
    planned = len(results["family"]["declared"])
    unmeasured = planned - len(declared)
    counted = (
        f"Of {planned} comparisons declared before training, corrected for their number, {len(decided)} "
        f"{'is' if len(decided) == 1 else 'are'} decided"
        + (f" and {undecided} undecided" if undecided else "")
        + (f"; {few} {'is' if few == 1 else 'are'} of too few units to judge" if few else "")
        + (f"; {unmeasured} {'is' if unmeasured == 1 else 'are'} not measured" if unmeasured else "")
    )
    return ". ".join([counted, *decided]) + "."


def limits(record: Manifest, results: Results, seeds: int) -> list[str]:
    """What this run, with so many training seeds at most, cannot show: one sentence or two each."""
    found = []
    if seeds <= 1:
        found.append(
            "One training seed. The intervals say how the result varies over held-out documents and items; they say "
            "nothing about what another seed would give. Add seeds before relying on small differences."
        )
    elif seeds < 5:
        found.append(
            f"{seeds} training seeds. How much the result varies with the seed is estimated from {seeds} values only."
        )
    found += [f"Changed after the declaration: {line}." for line in changes(record)]
    found += [f"Note: {note}." for note in results.get("notes", ())]
    for name, described in results["sets"].items():
        found += [f"{set_label(results['sets'], name)}: {note}." for note in described.get("notes", ())]
    model, corpus = record["model"]["name"], record["corpus"]["name"]
    out_of_domain = ", ".join(set_label(results["sets"], name) for name in sets_of(results, domain="out"))
    found.append(
        f"One model ({model}) trained on one corpus ({corpus}). "
        + (
            f"What it does out-of-domain is measured on {out_of_domain} and may differ on other text."
            if out_of_domain
            else "What helps on the text it was trained on may hurt on other text; this page measures only the former."
        )
    )
    stated = (results["sets"][name].get("context_length") for name in sets_of(results, kind="document"))
    contexts = sorted({length for length in stated if length})
    if contexts:
        found.append(
            f"Word perplexity and bits per byte hold for a context of {' and '.join(f'{n:,}' for n in contexts)} "
            "tokens and cannot be set beside figures with another context length or another way of counting words."
        )
    found.append(_rate_limit(results))
    stored = {summary.get("base_dtype") for summary in results["arms"].values()} - {None}
    dtypes = {str(value) for value in stored or {record["model"].get("dtype")} - {None}}
    if dtypes - {"float32", "torch.float32"}:
        found.append(
            f"The base model ran in {' and '.join(sorted(dtypes))}: part of a gain may be repair of rounding damage. "
            "Repeat in float32 to tell the two apart."
        )
    if results.get("dtype_audit"):
        found.append(_dtype_cost(results))
    for name in results["sets"]:
        if name.startswith("last_word"):
            found.append(
                f"{set_title(results['sets'], name)} is made from this corpus. It is not LAMBADA and compares with no "
                f"published figure. Its items are resampled by document: those of one are not independent."
            )
    declared = bool((results.get("family") or {}).get("declared"))
    found.append(
        "The correction covers the declared comparisons only. With many exploratory ones some will look decided by "
        "chance."
        if declared
        else "P-values are per comparison, not corrected for how many comparisons are shown."
    )
    return found


def _dtype_cost(results: Results) -> str:
    """What rounding alone does to the untouched base, by set, in the sets' primary measure."""
    names = {"bfloat16": "bf16 weights", "autocast": "bf16 autocast"}
    costs = [
        f"{names[entry['arm']]} {entry['difference']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}] "
        f"{metric_named(entry['metric']).phrase} on {set_label(results['sets'], entry['set'])} ({entry['verdict']})"
        for entry in results["dtype_audit"]["comparisons"]
        if entry["set"] not in results["sets"] or entry["metric"] == primary(results, entry["set"])
    ]
    return f"What the dtype alone does to the untouched model, against float32: {'; '.join(costs)}."


def _rate_limit(results: Results) -> str:
    arms, searched = trained_arms(results), set(results.get("search") or ())
    fixed = [arm for arm in arms if arm not in searched]
    if not fixed and arms:
        searches = results["search"]
        per_seed = all("by_seed" in searches[arm] for arm in arms)
        counts = [len(searches[arm]["trace"]) for arm in arms]
        extended = [arm for arm in arms if searches[arm].get("extended")]
        runs = " to ".join(str(count) for count in dict.fromkeys((min(counts), max(counts))))
        return (
            f"Each arm's learning rate was tuned on development documents, in {runs} short trainings per arm from the "
            "same first grid"
            + (f" (it was extended for {', '.join(extended)}, whose best rate lay at its edge)" if extended else "")
            + (
                ". Each training seed has a search of its own, so intervals over seeds hold what the choice varies by"
                if per_seed
                else ". One search served all seeds: no interval holds what the choice of the rate varies by"
            )
            + ". Other settings (steps, batch, schedule) are shared, not tuned."
        )
    if searched:
        return f"Learning rates were tuned, but not of {', '.join(fixed)}: these may rank higher at their best rates."
    return "Learning rates were fixed, not tuned. Arms tuned to their best rates can rank differently."


def _join(value: int | None, noun: str = "", before: str = "") -> str:
    return "" if value is None else f"{before}{value:,} {noun}".strip()


def bytes_text(value: Any) -> str:
    """A number of bytes in MiB or GiB; "–" for None."""
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _seconds(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"

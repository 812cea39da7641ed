"""The figures of an arm, and the paired differences between arms, from their item records."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import numpy as np

from preskip.errors import PreskipError, noted
from preskip.metrics import DEFAULT_MARGINS
from preskip.progress import Advance, no_progress
from preskip.runs.schema import Comparison, Family, Metrics, MetricValue, PairedDifference, SetFacts
from preskip.runs.stored import UNTRAINED
from preskip.stats.bootstrap import RatioDistribution
from preskip.stats.detail import detail_of
from preskip.stats.discordant import NothingDiffers
from preskip.stats.families import Key, apply_family, key_of
from preskip.stats.inputs import Array
from preskip.stats.intervals import CONFIDENCE, Distribution
from preskip.stats.looks import fractions_of, nominal_levels, sequential_p, two_sided
from preskip.stats.records import Items, SeedItems, Table, by_seed, paired_seeds, tables
from preskip.stats.tests import paired_accuracy_difference
from preskip.stats.verdicts import ALPHA, margin_of


def summarise(items: SeedItems, *, notes: list[str] | None = None) -> Metrics:
    """The `metrics` of one arm in results.json, from its item records.

    Args:
        items: records (items.jsonl) by seed id, one list per seed, or one list for a single seed.
        notes: where to note a metric that cannot be computed and is left out; None raises its error. A set of which
            every item has failed: see `preskip.stats.records.tables`.

    Returns:
        {set: {metric: {"value", "low", "high", "confidence"}}}, nothing of a set that is left out; documents give
        bits_per_byte and word_perplexity, items one metric per score. Clusters are resampled whole. Texts without words
        have no word perplexity.

    Raises:
        PreskipError: no items, damaged records, or seeds that hold different items.
    """
    rows = list(by_seed(items, "the arm").values())
    usable = tables(rows, "the seeds of one arm", notes=notes)
    metrics: Metrics = {record["set"]: {} for record in rows[0]}
    for table in usable:
        own = metrics[table.name]
        for metric in ("bits_per_byte", "word_perplexity") if table.kind == "document" else table.scores:
            with noted(notes, f"{metric} of {table.name}"):
                if table.kind == "item":
                    own[metric] = _mean(table.column(metric), table)
                elif metric == "bits_per_byte":
                    own[metric] = _nats(table, "bytes", 1 / math.log(2))
                elif (table.shared_column("words") > 0).all():
                    own[metric] = _perplexity(_nats(table, "words", 1.0))
    return metrics


def _nats(table: Table, size: str, scale: float) -> MetricValue:
    """Nats over bytes or words, of all documents together."""
    sizes = table.shared_column(size)
    return RatioDistribution(table.column("nll"), sizes, table.clusters, scale=scale).interval().as_dict()


def compare(
    items_a: SeedItems,
    items_b: SeedItems,
    *,
    arm: str = "a",
    reference: str = "b",
    sets: Sequence[str] | None = None,
    margins: Mapping[str, float] = DEFAULT_MARGINS,
    confidence: float = CONFIDENCE,
    notes: list[str] | None = None,
) -> list[PairedDifference]:
    """The `comparisons` entries (arm - reference) of results.json, paired on seeds and item ids.

    Mappings {seed: items} pair on the seeds that both have; an untrained reference `none` with a single cell is paired
    with every seed. Lists pair in the order given. The order of items does not matter.

    `p_value` is never None. For bits per byte and other means it is the interval's own, so it is below 0.05 exactly
    when the 95 % interval excludes 0. For accuracies with one seed and independent items it is the exact McNemar p;
    with several seeds, or clusters, which McNemar's test cannot know, the larger of that (the sign test over items) and
    the interval's. `p_equivalence` and `margin` are None where no margin is stated for the metric. `deviations` are
    `Distribution.components`, from which `measured_power` computes. `detail` is `detail_of`'s. `apply_family` adds the
    rest. Items that are all of one cluster are no sample of clusters: the interval is over them alone, and `clusters`
    is 1, on which no verdict is given.

    Args:
        items_a: records (items.jsonl) of the arm, by seed id, one list per seed, or one list for a single seed.
        items_b: the same for the reference.
        arm: name of the arm in the entries.
        reference: name of the reference in the entries.
        sets: evaluation sets to compare. Default: all that both hold.
        margins: equivalence margins by "metric" or "set.metric", in the metric's unit.
        confidence: level, default 0.95.
        notes: see `summarise`.

    Raises:
        PreskipError: no common seed or set, different items in a set, or different bytes for the same document.
    """
    rows_a, rows_b = paired_seeds(items_a, items_b, arm, reference)
    entries: list[PairedDifference] = []
    for table in tables([*rows_a, *rows_b], f"{arm} and {reference}", sets, notes):
        clusters = table.clusters
        for metric in ["bits_per_byte"] if table.kind == "document" else table.scores:
            with noted(notes, f"{metric} of {table.name}, {arm} and {reference}"):
                column = table.column("nll" if table.kind == "document" else metric)
                a, b = column[: len(rows_a)], column[len(rows_a) :]
                gained = lost = None
                sizes = table.shared_column("bytes") if table.kind == "document" else np.ones(len(table.ids))
                scale = 1 / math.log(2) if table.kind == "document" else 1.0
                distribution: Distribution
                if table.kind == "item" and _is_right_or_wrong(column):
                    found = paired_accuracy_difference(a, b, clusters)
                    distribution, gained, lost, p_value = found.distribution, found.gained, found.lost, found.p_value
                    if distribution.seeds > 1 or clusters is not None:
                        p_value = max(p_value, distribution.p_value())
                else:
                    distribution = RatioDistribution(a - b, sizes, clusters, scale=scale)
                    p_value = distribution.p_value()
                interval = distribution.interval(confidence)
                detail = detail_of(
                    a,
                    b,
                    sizes,
                    clusters,
                    unit_freedom=distribution.unit_freedom,
                    scale=scale,
                    confidence=confidence,
                )
                if isinstance(distribution, NothingDiffers):
                    detail["new_seed"] = None
                margin = margin_of(margins, table.name, metric)
                entries.append(
                    {
                        "set": table.name,
                        "metric": metric,
                        "arm": arm,
                        "reference": reference,
                        "difference": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                        "confidence": confidence,
                        "seeds": interval.seeds,
                        "units": len(table.ids),
                        "unit": table.kind,
                        "clusters": 1 if table.is_one_cluster else None if clusters is None else interval.units,
                        "covers": _covers(table, interval.seeds),
                        "gained": gained,
                        "lost": lost,
                        "p_value": p_value,
                        "deviations": distribution.components,
                        "margin": margin,
                        "p_equivalence": None if margin is None else distribution.p_equivalence(margin),
                        "detail": detail,
                    }
                )
    return entries


def compare_arms(
    items: Mapping[str, SeedItems],
    family: Family,
    described: Mapping[str, SetFacts] | None = None,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    sets: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
    advance: Advance = no_progress,
    notes: list[str] | None = None,
) -> list[Comparison]:
    """Pairs of arms compared, with the family's correction and verdicts: `comparisons` of results.json.

    Corrected p-values are those of the whole family, whichever pairs and sets are chosen.

    Args:
        items: records by arm and seed id, arms in the order in which they are shown, the reference first.
        family: {"declared": [{"arm", "reference", "set", "metric"}], "alpha", "margins"}, as in run.json.
        described: see `apply_family`.
        pairs: (arm, reference) of each comparison. Default: each pair once, the arm that comes later minus the earlier
            one, or as the family declares it.
        sets: evaluation sets to compare. Default: all that a pair shares.
        confidence: level, default 0.95.
        advance: told how many pairs are done, and which was the last.
        notes: see `summarise`.
    """
    if pairs is None:
        declared = {(entry["arm"], entry["reference"]) for entry in family.get("declared", ())}
        pairs = [pair if pair in declared else pair[::-1] for pair in combinations(items, 2)]
    entries: list[PairedDifference] = []
    for number, (arm, reference) in enumerate(pairs, 1):
        with noted(notes, f"comparison of {arm} and {reference}"):
            entries += compare(
                items[arm],
                items[reference],
                arm=arm,
                reference=reference,
                sets=sets,
                margins=family.get("margins", DEFAULT_MARGINS),
                confidence=confidence,
                notes=notes,
            )
        advance(number, f"{arm} - {reference}")
    shown = set(map(key_of, entries))
    entries += _beside(shown, items, family, confidence)
    if family.get("looks"):
        add_looks(entries, items, family, notes)
    return [entry for entry in apply_family(entries, family, described) if key_of(entry) in shown]


def _beside(
    shown: Collection[Key], items: Mapping[str, SeedItems], family: Family, confidence: float
) -> list[PairedDifference]:
    """The declared comparisons that are measured and not shown: what is shown is corrected for them as they are."""
    found: list[PairedDifference] = []
    for wanted in family.get("declared", ()):
        arm, reference = wanted["arm"], wanted["reference"]
        if key_of(wanted) in shown or arm not in items or reference not in items:
            continue
        with noted([], "not measured"):
            own = compare(
                items[arm],
                items[reference],
                arm=arm,
                reference=reference,
                sets=[wanted["set"]],
                margins=family.get("margins", DEFAULT_MARGINS),
                confidence=confidence,
            )
            found += [entry for entry in own if key_of(entry) == key_of(wanted)]
    return found


def _covers(table: Table, seeds: int) -> str:
    """What an interval is over."""
    units = f"{table.kind}s of one cluster" if table.is_one_cluster else f"{table.kind}s"
    return f"seeds and {units}" if seeds > 1 else f"{units} only"


def add_looks(
    entries: Sequence[PairedDifference],
    items: Mapping[str, SeedItems],
    family: Family,
    notes: list[str] | None = None,
) -> None:
    """Give the declared comparisons what the looks so far say, each from the first seeds alone: `looked`.

    A verdict is about the difference of all seeds. A look that found one of the other sign is no evidence for it, nor
    is an early equivalence where it is beyond the margin.

    Args:
        entries: of all seeds.
        items: records by arm and seed id, seeds in the order in which they were added.
        family: with its looks.
        notes: see `summarise`.
    """
    looks = family["looks"]
    fractions = fractions_of(looks)
    levels = nominal_levels(family.get("alpha", ALPHA) / 2, fractions)
    declared = {key_of(entry) for entry in family.get("declared", ())}
    margins = family.get("margins", DEFAULT_MARGINS)
    for entry in [entry for entry in entries if key_of(entry) in declared]:
        found: list[PairedDifference] = []
        taken = [(look, level) for look, level in zip(looks, levels, strict=True) if look <= entry["seeds"]]
        for look, level in taken:
            rows = paired_seeds(items[entry["arm"]], items[entry["reference"]], entry["arm"], entry["reference"])
            first = [seeds[:look] for seeds in rows]
            with noted(notes, f"look at {look} seeds, {entry['arm']} and {entry['reference']}"):
                # Of a look that may spend next to nothing the level would round to 1; only the limits are of it.
                confidence = min(1 - 2 * level, 1 - np.finfo(float).eps)
                at = compare(*first, sets=[entry["set"]], margins=margins, confidence=float(confidence))
                found += [other for other in at if other["metric"] == entry["metric"]]
        if found and len(found) == len(taken):
            value, margin = entry["difference"], entry["margin"]
            differences = [other["p_value"] if other["difference"] * value > 0 else 1.0 for other in found]
            is_beyond = margin is None or abs(value) >= margin
            equivalences = [other["p_equivalence"] for other in found]
            entry["looked"] = {
                "seeds": taken[-1][0],
                "level": 2 * taken[-1][1],
                "low": found[-1]["low"],
                "high": found[-1]["high"],
                "p_value": float(two_sided(differences, fractions)),
                "p_equivalence": None
                if margin is None
                else float(sequential_p([1.0 if p is None or is_beyond else p for p in equivalences], fractions)),
            }


def looks_without_seeds(items: Mapping[str, Mapping[int, Items]], family: Family, seeds: Sequence[int]) -> list[str]:
    """What the looks so far lack, a line for each declared pair of which a seed is missing, as where it has diverged.

    Such a look is made of the first seeds that both arms have, which may be others than were seen then.

    Args:
        items: records by arm and seed.
        family: with its looks, if there are any.
        seeds: all of the run, in the order in which they were added.
    """
    notes = []
    for arm, reference in dict.fromkeys((entry["arm"], entry["reference"]) for entry in family.get("declared", ())):
        # What is not trained is scored once, and serves every seed.
        trained = [items.get(name, {}) for name in (arm, reference) if name != UNTRAINED]
        common = [seed for seed in seeds if all(seed in own for own in trained)]
        effects = []
        for look in family.get("looks", ()):
            if len(common) < look <= len(seeds):
                effects.append(f"the look at {look} seeds is not reached")
            elif look <= len(seeds) and common[:look] != list(seeds[:look]):
                effects.append(f"the look at {look} seeds is of {', '.join(map(str, common[:look]))}")
        if effects:
            missing = [str(seed) for seed in seeds if seed not in common]
            lacks = f"seed {missing[0]} is" if len(missing) == 1 else f"seeds {', '.join(missing)} are"
            notes.append(f"{arm} and {reference}: {lacks} missing, so {' and '.join(effects)}")
    return notes


def _mean(values: Array, table: Table) -> MetricValue:
    distribution = RatioDistribution(values, np.ones_like(values), table.clusters)
    interval = distribution.interval().as_dict()
    if _is_right_or_wrong(values):
        if interval["value"] in (0.0, 1.0):  # no spread to resample: the exact binomial bound
            bound = NothingDiffers(units=distribution.units, seeds=1).limit((1 - CONFIDENCE) / 2, +1)
            interval |= {"low": 0.0, "high": bound} if interval["value"] == 0.0 else {"low": 1 - bound, "high": 1.0}
        interval["low"], interval["high"] = max(interval["low"], 0.0), min(interval["high"], 1.0)
    return interval


def _perplexity(interval: MetricValue) -> MetricValue:
    """The interval of a mean of nats, as exp of it."""
    try:
        value, low, high = (math.exp(interval[key]) for key in ("value", "low", "high"))
    except OverflowError:
        raise PreskipError(
            f"word perplexity exp({interval['high']:.0f}) is beyond floating point: check dtype and training"
        ) from None
    return {"value": value, "low": low, "high": high, "confidence": interval["confidence"]}


def _is_right_or_wrong(values: Array) -> bool:
    """Whether every score is 0 or 1, whatever the metric's name: some tasks give a share as an item's accuracy."""
    return bool(np.isin(values, (0.0, 1.0)).all())

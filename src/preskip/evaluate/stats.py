"""Paired statistics over evaluated items: every figure as a ratio of sums, with an interval.

Everything reported is a ratio of sums over units, Σ numerator / Σ denominator: bits per byte (nats over bytes), the
difference of two arms on the same documents (difference of nats over bytes), accuracy (correct over items), and the
logarithm of word perplexity (nats over words). So one bootstrap serves all of them, and clusters are sums.

How the intervals are made:

* One seed: BCa bootstrap over units (Efron 1987), each of its two tail levels widened from the normal to Student's t
  with units - 1 degrees of freedom (Hesterberg 2015), since percentile intervals of a few dozen documents are too
  narrow. Randomness of training is *not* in it.
* Several seeds: seeds and units are crossed (every seed is scored on the same documents), so both are drawn anew in
  each replicate and one draw of units serves all seeds; drawing units per seed would count each document as new
  evidence. The interval is value ± t · (bootstrap standard error), the degrees of freedom after Satterthwaite from the
  two variance components. Percentiles of two or three seeds can never leave the range of those seeds; this can. It errs
  on the wide side, since resampling both ways counts what is particular to one seed on one document twice (simulated
  coverage of the 95 % interval: 93 to 99 %).

Both draw n - 1 of n, which makes the bootstrap variance of a mean unbiased (Rao and Wu 1988); with two seeds the usual
draw of n would halve the seeds' share.

The bootstrap is written out because `scipy.stats.bootstrap` has no crossed form, no widened levels, and calls the
statistic on materialised resamples; as a ratio of sums one matrix of counts does it. Tests hold it against SciPy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from preskip.errors import PreskipError

Array = NDArray[np.float64]
Items = Sequence[Mapping[str, Any]]

CONFIDENCE = 0.95
RESAMPLES = 9_999
_CELLS_PER_CHUNK = 4_000_000  # counts held at once: 32 MB


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval, and what the interval covers.

    `units` is the number of resampled units (documents, items or clusters), `seeds` the number of training seeds. With
    one seed the
    interval says how the value varies over units and nothing about training randomness: `covers` is then "units only".
    """

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE
    units: int
    seeds: int = 1

    @property
    def covers(self) -> str:
        """What was resampled: "units only", or "seeds and units"."""
        return "seeds and units" if self.seeds > 1 else "units only"

    @property
    def excludes_zero(self) -> bool:
        """True when 0 lies outside [low, high]."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float]:
        """The interval as the run directory stores it."""
        return {"value": self.value, "low": self.low, "high": self.high, "confidence": self.confidence}


@dataclass(frozen=True, kw_only=True)
class AccuracyDifference:
    """Accuracy of a minus accuracy of b on shared items.

    `gained` and `lost` count the items on which a is right more often than b over the seeds, or less often; each item
    counts once, so `p_value` (exact, two-sided) is McNemar's with one seed and the sign test over items with several.
    It takes items as independent and says nothing about training randomness; the interval is the one that knows
    clusters and seeds.
    """

    difference: Interval
    gained: int
    lost: int
    p_value: float
    items: int


def bits_per_byte(nll: ArrayLike, bytes: ArrayLike) -> float:
    """Bits per byte as a ratio of sums: Σ nll / (ln 2 · Σ bytes).

    Args:
        nll: summed negative log-likelihood per document in nats, [documents] or [seeds, documents].
        bytes: UTF-8 bytes of the scored text per document, [documents].
    """
    numerator, denominator = _ratio_inputs(nll, bytes, "nll", "bytes", minimum=1)
    return float(numerator.sum() / (math.log(2) * denominator.sum()))


def word_perplexity(nll: ArrayLike, words: ArrayLike) -> float:
    """Word perplexity exp(Σ nll / Σ words); state the context length beside it.

    Args:
        nll: summed negative log-likelihood per document in nats, [documents] or [seeds, documents].
        words: words of the scored text per document, [documents].
    """
    numerator, denominator = _ratio_inputs(nll, words, "nll", "words", minimum=1)
    return _exp(float(numerator.sum() / denominator.sum()))


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    scale: float = 1.0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of `scale` · Σ numerator / Σ denominator by resampling units, and seeds where there are several.

    The method is in the module's docstring. The order of units and of seeds does not change the result.

    Args:
        numerator: [units] or [seeds, units].
        denominator: positive, [units] or [seeds, units].
        scale: factor on value and limits, 1 / ln 2 for bits.
        confidence: level of the interval, between 0 and 1. Default 0.95.
        resamples: bootstrap replicates. Default 9,999.
        seed: of the bootstrap's own generator. Default 0.

    Raises:
        PreskipError: NaN, unequal lengths, a denominator that is not positive, fewer than 2 units.
    """
    above, below = _ratio_inputs(numerator, denominator, "numerator", "denominator")
    if not 0 < confidence < 1:
        raise PreskipError(f"confidence {confidence!r} must lie between 0 and 1, such as 0.95")
    if resamples < 100:
        raise PreskipError(f"resamples {resamples!r} is too few for an interval: use 100 or more (default {RESAMPLES})")
    value, low, high = _bootstrap(above, below, confidence, resamples, seed)
    limits = sorted((scale * low, scale * high))
    return Interval(
        value=scale * value,
        low=limits[0],
        high=limits[1],
        confidence=confidence,
        units=above.shape[1],
        seeds=len(above),
    )


def paired_ratio_difference(
    nll_a: ArrayLike,
    nll_b: ArrayLike,
    bytes: ArrayLike,
    *,
    scale: float = 1 / math.log(2),
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Difference of two arms' ratios (a - b) on the same documents, by default in bits per byte.

    Both arms are scored on the same bytes, so the difference is itself a ratio of sums, Σ(nll_a - nll_b) / (ln 2 · Σ
    bytes), and what makes a document hard for both cancels.

    Args:
        nll_a: nats per document, [documents] or [seeds, documents]; row s is paired with row s of `nll_b`.
        nll_b: the same for the reference. One row serves all seeds of the other arm (an untrained reference has no
            seeds).
        bytes: bytes per document, [documents].
        scale: factor on the ratio, default 1 / ln 2 (nats to bits).
        confidence: level, default 0.95.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.
    """
    a, b = _paired(nll_a, nll_b, "nll_a", "nll_b")
    return bootstrap_ratio(a - b, bytes, scale=scale, confidence=confidence, resamples=resamples, seed=seed)


def paired_accuracy_difference(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AccuracyDifference:
    """Difference of two accuracies (a - b) on the same items, with the exact McNemar p.

    When no item differs at all, the bootstrap would claim an interval of width 0; then the limits are ± the exact upper
    bound of the rate at which items could differ, 1 - ((1 - confidence) / 2)^(1 / units).

    Args:
        correct_a: 0/1 or booleans, [items] or [seeds, items].
        correct_b: the same for the reference; one row serves all seeds of the other arm.
        clusters: a label per item, such as its document; whole clusters are then resampled. None takes items as
            independent.
        confidence: level, default 0.95.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.
    """
    a, b = _paired(correct_a, correct_b, "correct_a", "correct_b")
    for name, array in (("correct_a", a), ("correct_b", b)):
        if not np.isin(array, (0.0, 1.0)).all():
            raise PreskipError(f"{name} holds values other than 0 and 1: give one right/wrong value per item")
    difference = a - b
    above, below = _cluster(difference, clusters)
    interval = bootstrap_ratio(above, below, confidence=confidence, resamples=resamples, seed=seed)
    if not difference.any():
        bound = _rate_bound(interval.units, confidence)
        interval = Interval(
            value=0.0, low=-bound, high=bound, confidence=confidence, units=interval.units, seeds=interval.seeds
        )
    per_item = difference.sum(axis=0)
    gained, lost = int((per_item > 0).sum()), int((per_item < 0).sum())
    return AccuracyDifference(
        difference=interval, gained=gained, lost=lost, p_value=mcnemar(gained, lost), items=difference.shape[1]
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p of `gained` against `lost` discordant items; 1.0 when there is none."""
    if gained < 0 or lost < 0:
        raise PreskipError(f"discordant counts {gained} and {lost} must not be negative")
    if gained + lost == 0:
        return 1.0
    return float(scipy_stats.binomtest(gained, gained + lost, 0.5).pvalue)


def summarise(
    items: Sequence[Items] | Items, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The `metrics` of one arm in results.json, from its item records.

    Args:
        items: one list of records (items.jsonl) per seed, or one list for a single seed.
        confidence: level, default 0.95.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.

    Returns:
        bits_per_byte and word_perplexity when there are documents, last_word_accuracy (resampled by document) when
        there are last-word items; each {"value", "low", "high", "confidence"}.
    """
    per_seed = _per_seed(items)
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    metrics: dict[str, dict[str, float]] = {}
    ids, rows = _aligned(per_seed, "document", "the seeds of one arm")
    if ids:
        nll = _column(rows, "nll")
        sizes = _shared_column(rows, "bytes", ids)
        words = _shared_column(rows, "words", ids)
        metrics["bits_per_byte"] = bootstrap_ratio(nll, sizes, scale=1 / math.log(2), **options).as_dict()
        log = bootstrap_ratio(nll, words, **options)
        metrics["word_perplexity"] = {
            "value": _exp(log.value),
            "low": _exp(log.low),
            "high": _exp(log.high),
            "confidence": confidence,
        }
    ids, rows = _aligned(per_seed, "last_word", "the seeds of one arm")
    if ids:
        correct = _column(rows, "correct")
        above, below = _cluster(correct, _documents(rows[0]))
        interval = bootstrap_ratio(above, below, **options).as_dict()
        rate, units = interval["value"], above.shape[1]
        if rate in (0.0, 1.0):  # no spread to resample: the exact binomial bound
            bound = _rate_bound(units, confidence)
            interval |= {"low": 0.0, "high": bound} if rate == 0.0 else {"low": 1 - bound, "high": 1.0}
        interval["low"], interval["high"] = max(interval["low"], 0.0), min(interval["high"], 1.0)
        metrics["last_word_accuracy"] = interval
    if not metrics:
        raise PreskipError("no document and no last-word item to summarise: evaluate the arm first")
    return metrics


def compare(
    items_a: Sequence[Items] | Items,
    items_b: Sequence[Items] | Items,
    *,
    arm: str = "a",
    reference: str = "b",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The `comparisons` entries (arm - reference) of results.json, paired on item ids.

    Seeds are paired in the order given; an arm with one seed (such as `none`) is paired with every seed of the other.
    The order of items does not matter. Each entry also holds "covers": "units only" with one seed, "seeds and units"
    with several; accuracy entries hold "clusters", the number of documents that were resampled.

    Args:
        items_a: one list of records (items.jsonl) per seed of the arm, or one list for a single seed.
        items_b: the same for the reference.
        arm: name of the arm in the entries.
        reference: name of the reference in the entries.
        confidence: level, default 0.95.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.

    Raises:
        PreskipError: the two hold different items, or different bytes for the same document, or unequal numbers of
            seeds.
    """
    a, b = _per_seed(items_a), _per_seed(items_b)
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise PreskipError(
            f"{arm} has {len(a)} seeds and {reference} has {len(b)}: give equal numbers, or a reference with one"
        )
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    name = f"{arm} and {reference}"
    entries: list[dict[str, Any]] = []

    ids, rows = _aligned([*a, *b], "document", name)
    if ids:
        sizes = _shared_column(rows, "bytes", ids)
        nll = _column(rows, "nll")
        interval = paired_ratio_difference(nll[: len(a)], nll[len(a) :], sizes, **options)
        entries.append(
            _entry("bits_per_byte", arm, reference, interval) | {"units": len(ids), "unit": "document", "p_value": None}
        )
    ids, rows = _aligned([*a, *b], "last_word", name)
    if ids:
        correct = _column(rows, "correct")
        documents = _documents(rows[0])
        result = paired_accuracy_difference(correct[: len(a)], correct[len(a) :], documents, **options)
        entries.append(
            _entry("last_word_accuracy", arm, reference, result.difference)
            | {
                "units": result.items,
                "unit": "item",
                "clusters": None if documents is None else result.difference.units,
                "gained": result.gained,
                "lost": result.lost,
                "p_value": result.p_value,
            }
        )
    if not entries:
        raise PreskipError(f"{name} hold no document and no last-word item: evaluate both arms first")
    return entries


def _entry(metric: str, arm: str, reference: str, interval: Interval) -> dict[str, Any]:
    return {
        "metric": metric,
        "arm": arm,
        "reference": reference,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "confidence": interval.confidence,
        "seeds": interval.seeds,
        "covers": interval.covers,
    }


def _bootstrap(
    above: Array, below: Array, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float]:  # above, below [seeds, units]
    # Sorted by content, so that the order in which units or seeds arrive cannot change which of them a draw picks.
    order = np.lexsort((below.sum(0), above.sum(0)))
    above, below = above[:, order], below[:, order]
    if len(above) > 1:
        order = np.lexsort((below.sum(1), above.sum(1)))
        above, below = above[order], below[order]

    seeds, units = above.shape
    value = float(above.sum() / below.sum())
    residual = (above - value * below) / below.sum()  # first-order influence of each cell on the ratio
    by_unit, by_seed = residual.sum(0), residual.sum(1)
    # Jackknife-like variance components of the ratio, exact for a mean.
    unit_variance = float((by_unit**2).sum() * units / (units - 1))
    seed_variance = float((by_seed**2).sum() * seeds / (seeds - 1)) if seeds > 1 else 0.0
    if unit_variance + seed_variance <= (1e-15 * max(1.0, abs(value))) ** 2:
        return value, value, value

    replicates = _replicates(above, below, resamples, np.random.default_rng(seed))
    if seeds > 1:
        error = float(replicates.std(ddof=1))
        freedom = (unit_variance + seed_variance) ** 2 / (
            unit_variance**2 / (units - 1) + seed_variance**2 / (seeds - 1)
        )
        margin = float(scipy_stats.t.ppf((1 + confidence) / 2, freedom)) * error
        return value, value - margin, value + margin

    below_value = float((replicates < value).mean() + 0.5 * (replicates == value).mean())
    bias = float(scipy_stats.norm.ppf(np.clip(below_value, 0.5 / resamples, 1 - 0.5 / resamples)))
    acceleration = float((by_unit**3).sum() / (6 * (by_unit**2).sum() ** 1.5))
    half_width = float(scipy_stats.t.ppf((1 + confidence) / 2, units - 1))
    levels = [float(_bca_level(z, bias, acceleration)) for z in (-half_width, half_width)]
    low, high = np.quantile(replicates, levels)
    return value, float(low), float(high)


def _bca_level(z: float, bias: float, acceleration: float) -> float:
    shifted = bias + z
    scale = 1 - acceleration * shifted
    # Beyond the pole of the correction the level is at its extreme.
    if scale <= 0:
        return 1.0 if shifted > 0 else 0.0
    return float(scipy_stats.norm.cdf(bias + shifted / scale))


def _replicates(above: Array, below: Array, resamples: int, generator: np.random.Generator) -> Array:
    seeds, units = above.shape
    chunk = max(1, _CELLS_PER_CHUNK // units)
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        unit_counts = _counts(generator, size, units)  # [resamples, units]
        if seeds > 1:
            seed_counts = _counts(generator, size, seeds)  # [resamples, seeds]
            top = ((seed_counts @ above) * unit_counts).sum(1)
            bottom = ((seed_counts @ below) * unit_counts).sum(1)
        else:
            top, bottom = unit_counts @ above[0], unit_counts @ below[0]
        parts.append(top / bottom)
    return np.concatenate(parts)


def _counts(generator: np.random.Generator, size: int, units: int) -> Array:
    """How often each of `units` is drawn when units - 1 are drawn with replacement, [size, units]."""
    drawn = generator.integers(units, size=(size, units - 1))
    offsets = np.arange(size)[:, None] * units
    return np.bincount((drawn + offsets).ravel(), minlength=size * units).reshape(size, units).astype(np.float64)


def _rate_bound(units: int, confidence: float) -> float:
    """Clopper-Pearson upper limit of a rate after 0 of `units`."""
    return float(1 - ((1 - confidence) / 2) ** (1 / units))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        raise PreskipError(
            f"word perplexity exp({value:.0f}) is beyond floating point: check dtype and training"
        ) from None


def _matrix(values: ArrayLike, name: str) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise PreskipError(
            f"{name} is not a table of numbers: give [units] or [seeds, units] of equal length"
        ) from None
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.size == 0:
        raise PreskipError(f"{name} has shape {array.shape}: give [units] or [seeds, units], not empty")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise PreskipError(
            f"{name} holds {bad} NaN or infinite value(s) of {array.size}: a failed evaluation cannot be compared"
        )
    return array


def _ratio_inputs(
    numerator: ArrayLike, denominator: ArrayLike, name: str, other: str, minimum: int = 2
) -> tuple[Array, Array]:
    above, below = _matrix(numerator, name), _matrix(denominator, other)
    if above.shape[1] != below.shape[1] or len(below) not in (1, len(above)):
        raise PreskipError(f"{name} has shape {above.shape} and {other} {below.shape}: both need one value per unit")
    if (below <= 0).any():
        raise PreskipError(f"{other} holds {below.min():g}: every unit needs a positive size; drop empty documents")
    if above.shape[1] < minimum:
        raise PreskipError(
            f"{above.shape[1]} unit is too few for an interval: evaluate at least {minimum} documents or items"
        )
    return above, np.ascontiguousarray(np.broadcast_to(below, above.shape))


def _paired(values_a: ArrayLike, values_b: ArrayLike, name_a: str, name_b: str) -> tuple[Array, Array]:
    a, b = _matrix(values_a, name_a), _matrix(values_b, name_b)
    if a.shape[1] != b.shape[1] or (len(a) != len(b) and 1 not in (len(a), len(b))):
        raise PreskipError(
            f"{name_a} has shape {a.shape} and {name_b} {b.shape}: a paired comparison needs the same units"
        )
    return a, b


def _cluster(values: Array, clusters: Sequence[Any] | NDArray[Any] | None) -> tuple[Array, Array]:
    """Sums and counts per cluster, [seeds, clusters] each; every item its own cluster when None."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != values.shape[1]:
        raise PreskipError(f"{len(clusters)} cluster labels for {values.shape[1]} items: give one label per item")
    names, index = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    sums = np.stack([np.bincount(index, weights=row, minlength=len(names)) for row in values]).astype(np.float64)
    counts = np.bincount(index, minlength=len(names)).astype(np.float64)
    return sums, np.broadcast_to(counts, sums.shape).copy()


def _per_seed(items: Sequence[Items] | Items) -> list[Items]:
    if not items:
        raise PreskipError("no items: evaluate the arm first")
    if isinstance(items[0], Mapping):
        return [items]  # type: ignore[list-item]
    return list(items)  # type: ignore[arg-type]


def _aligned(per_seed: Sequence[Items], kind: str, name: str) -> tuple[list[str], list[list[Mapping[str, Any]]]]:
    """The shared ids of one kind, sorted, and each list's records in that order; refuses lists that differ."""
    tables: list[dict[str, Mapping[str, Any]]] = []
    for records in per_seed:
        table: dict[str, Mapping[str, Any]] = {}
        for record in records:
            if record.get("kind") != kind:
                continue
            identity = record.get("id")
            if not isinstance(identity, str):
                raise PreskipError(
                    f"a {kind} item has no id: {dict(record)!r:.80}; items.jsonl is damaged, evaluate again"
                )
            if identity in table:
                raise PreskipError(
                    f"{kind} item {identity!r} occurs twice in one seed: ids must be unique; evaluate again"
                )
            table[identity] = record
        tables.append(table)
    first = tables[0]
    for table in tables[1:]:
        if table.keys() != first.keys():
            odd = sorted(table.keys() ^ first.keys())
            raise PreskipError(
                f"{name} do not share their {kind} items ({len(first)} and {len(table)}, {len(odd)} not shared, such "
                f"as {odd[0]!r}): evaluate both on the same corpus and settings"
            )
    ids = sorted(first)
    return ids, [[table[identity] for identity in ids] for table in tables]


def _column(rows: Sequence[Sequence[Mapping[str, Any]]], key: str) -> Array:
    try:
        return np.array([[float(record[key]) for record in row] for row in rows])
    except (KeyError, TypeError, ValueError):
        raise PreskipError(f"an item has no usable {key!r}: items.jsonl is damaged, evaluate again") from None


def _shared_column(rows: Sequence[Sequence[Mapping[str, Any]]], key: str, ids: Sequence[str]) -> Array:
    """A property of the items themselves, [items]; it must not differ between lists."""
    table = _column(rows, key)
    differing = np.flatnonzero((table != table[0]).any(axis=0))
    if differing.size:
        values = sorted({f"{value:g}" for value in table[:, differing[0]]})
        raise PreskipError(
            f"document {ids[differing[0]]!r} has different {key} ({', '.join(values)}): not the same texts or windows; "
            "evaluate both with the same settings"
        )
    return table[0]


def _documents(row: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The document of each item, or None when that leaves fewer than two clusters to resample."""
    documents = [str(record.get("document", record["id"])) for record in row]
    return documents if len(set(documents)) > 1 else None

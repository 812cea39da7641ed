"""Does the skip grow with depth: a rank correlation over layers, its interval, the band that chance gives, and a size.

The trend is Spearman's ρ between the layer and a measure, the measure averaged over seeds. Its interval is made on
Fisher's scale, arctanh ρ:

* seeds or documents: both are drawn anew, as far as there are several, n - 1 of n; value ± t · (standard deviation
  of the replicates), the degrees of freedom after Satterthwaite from the two variance components, as in
  `preskip.stats`.
* one seed and no documents: layers are taken as a sample, with the standard error of Bonett and Wright (2000),
  √((1 + ρ²/2) / (n - 3)).

Chance: neighbouring layers resemble each other, so that a profile without a trend wanders. The band is the central 95 %
of ρ over profiles of such layers, AR(1) with the autocorrelation of the ranks about their line, corrected for its bias
(Marriott and Pope 1954), plus one standard error of it. A norm is held against its nulls as well, the noise and the
shuffled targets: the band is widened to hold their ρ, and the interval must leave them out.

Size: the mean over the later third of the layers over the mean of the rest, its interval made on the logarithm in the
same way. "No trend" needs both: ρ's interval within the band of random orders, which autocorrelation does not widen,
and the size's within 0.8 to 1.25. A rank correlation alone does not see a profile that is loud in its last layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats

from preskip.runs.schema import Trend
from preskip.stats.inputs import Array
from preskip.stats.intervals import CONFIDENCE

Rows = Sequence[Mapping[str, Any]]

NORM_MEASURES = ("skip_norm",)
FEWEST_LAYERS = 5
# Logarithm of the largest ratio that is a float.
LARGEST = 709.0
RESAMPLES = 1_999
HIGHEST = 0.9  # autocorrelation that so few layers can tell
# Sizes of the later third over the rest that count as none.
LEVEL = (0.8, 1.25)


def arm_trends(
    depth: Mapping[str, Rows],
    ablation: Mapping[str, Rows] | None = None,
    nulls: Mapping[str, Rows] | None = None,
    equal_step: Mapping[str, Rows] | None = None,
) -> list[Trend]:
    """The `trend` of one arm in results.json.

    Args:
        depth: depth rows by training seed (`preskip.analysis.depth`); with their "documents" the interval covers them.
        ablation: ablation rows by training seed (`preskip.analysis.ablation`), or None.
        nulls: {"noise": [{"seed", "layers"}], "shuffled": [...]}; without noise no verdict is given on the norm.
        equal_step: depth rows of the equal-step control by training seed, or None.

    Returns:
        A row for each measure that the arm has in all its layers and seeds; measures that are the same in all layers
        are left out.
    """
    skip = {name: [row for row in rows if row["part"] == "skip"] for name, rows in (ablation or {}).items()}
    measured = (
        ("skip_norm", depth, "skip_norm"),
        ("skip_to_attention", depth, "skip_to_attention"),
        ("equal_step_skip_to_attention", equal_step or {}, "skip_to_attention"),
        ("ablation_skip", skip, "difference"),
    )
    trends = (trend(measure, rows, key, nulls) for measure, rows, key in measured)
    return [row for row in trends if row is not None]


def trend(measure: str, rows: Mapping[str, Rows], key: str, nulls: Mapping[str, Rows] | None = None) -> Trend | None:
    """The trend of one measure; see `arm_trends`.

    Args:
        measure: its name.
        rows: rows by training seed.
        key: where a row holds the measure.
        nulls: see `arm_trends`; used for a measure that they hold.

    Returns:
        The row, or None where the measure is missing in some layer, the same in all, or there are fewer than 2 layers.
    """
    profiles = [sorted(seed_rows, key=lambda row: row["layer"]) for seed_rows in rows.values() if seed_rows]
    layers = [row["layer"] for row in profiles[0]] if profiles else []
    if len(layers) < 2 or any([row["layer"] for row in profile] != layers for profile in profiles):
        return None
    if any(row.get(key) is None for profile in profiles for row in profile):
        return None
    above, below = _by_document(profiles, key)  # [seeds, layers, documents]
    mean = (above.sum(-1) / below.sum(-1)).mean(0)
    if np.ptp(mean) == 0:
        return None
    rho = float(_rho(mean[None])[0])
    low, high, covers = _interval(rho, above, below)
    size = _size(mean, above, below)
    correlation = autocorrelation(mean)
    # One standard error more: too low a guess makes the band too narrow, and trends out of wandering.
    careful = min(HIGHEST, round(correlation + math.sqrt((1 - correlation**2) / len(layers)), 2))
    chance = chance_band(len(layers), careful)
    of_nulls = _nulls(measure, layers, nulls or {})
    has_band = measure not in NORM_MEASURES or "noise" in of_nulls
    is_decided = has_band and len(layers) >= FEWEST_LAYERS
    others = [value for values in of_nulls.values() for value in values]
    return {
        "measure": measure,
        "rho": rho,
        "low": low,
        "high": high,
        "null_low": min([chance[0], *others]) if has_band else None,
        "null_high": max([chance[1], *others]) if has_band else None,
        "nulls": of_nulls,
        "autocorrelation": correlation,
        "size": size["size"],
        "size_low": size["size_low"],
        "size_high": size["size_high"],
        "verdict": _verdict(rho, low, high, chance, others, size, len(layers)) if is_decided else "undecided",
        "seeds": len(profiles),
        "layers": len(layers),
        "covers": covers,
    }


def null_band(nulls: Rows, measure: str = "skip_norm", *, pooled: bool = True) -> list[dict[str, float]]:
    """The 95 % band that a null gives to a norm, by layer.

    Args:
        nulls: {"seed", "layers"} per seed of the null.
        measure: up_norm, down_norm or skip_norm.
        pooled: take all layers and seeds as draws from one distribution, and their central 95 %. This is right for the
            noise null of layers of one shape, which noise cannot tell apart. False, for shuffled targets: each layer on
            its own, with Student's prediction interval over seeds; one seed is a line, low = high.

    Returns:
        Rows {"layer", "low", "high"}; none without nulls.
    """
    if not nulls:
        return []
    tables = [{row["layer"]: float(row[measure]) for row in null["layers"]} for null in nulls]
    layers = sorted(tables[0])
    values = np.array([[table[layer] for layer in layers] for table in tables])  # [seeds, layers]
    if pooled:
        edges = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        low, high = (np.full(len(layers), edge) for edge in edges)
    else:
        count = len(values)
        margin = np.zeros(len(layers))
        if count > 1:
            margin = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(0, ddof=1) * math.sqrt(1 + 1 / count)
        low, high = values.mean(0) - margin, values.mean(0) + margin
    return [{"layer": layer, "low": float(a), "high": float(b)} for layer, a, b in zip(layers, low, high, strict=True)]


def _by_document(profiles: Sequence[Rows], key: str) -> tuple[Array, Array]:
    """Numerators and denominators, [seeds, layers, documents]; one document of denominator 1 where none are stored."""

    def documents(row: Mapping[str, Any]) -> Mapping[str, Any]:
        stored = row.get("documents") or {}
        return stored if "above" in stored else stored.get(key) or {}

    cells = [[documents(row) for row in profile] for profile in profiles]
    lengths = {len(cell.get("above", ())) for profile in cells for cell in profile}
    if len(lengths) == 1 and lengths.pop() > 1:
        above, below = (
            np.array([[cell[part] for cell in profile] for profile in cells]) for part in ("above", "below")
        )
        if (below > 0).all():
            return above, below
    values = np.array([[row[key] for row in profile] for profile in profiles], dtype=float)[..., None]
    return values, np.ones_like(values)


def _rho(profiles: Array) -> Array:
    """Spearman's ρ of each profile [B, layers] with the layers' order; 0 where a profile is constant."""
    ranks = stats.rankdata(profiles, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    order = np.arange(profiles.shape[1]) - (profiles.shape[1] - 1) / 2
    spread = np.sqrt((ranks**2).sum(1) * (order**2).sum())
    return np.divide(ranks @ order, spread, out=np.zeros(len(profiles)), where=spread > 0)


def _fisher(rho: Array | float, layers: int) -> Array:
    """arctanh ρ, with |ρ| at most half a step of ρ below 1."""
    largest = 1 - 6 / (layers**3 - layers)
    return np.arctanh(np.clip(rho, -largest, largest))


def _interval(rho: float, above: Array, below: Array) -> tuple[float, float, str]:
    seeds, layers, documents = above.shape
    if layers < FEWEST_LAYERS:
        return -1.0, 1.0, "layers"
    centre = float(_fisher(rho, layers))
    if seeds == documents == 1:
        margin = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((1 + rho**2 / 2) / (layers - 3))
        return math.tanh(centre - margin), math.tanh(centre + margin), "layers"
    total, freedom = _spread(lambda profiles: _fisher(_rho(profiles), layers), above, below)
    covers = " and ".join(name for name, count in (("seeds", seeds), ("documents", documents)) if count > 1)
    if total == 0:
        return rho, rho, covers
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)
    return math.tanh(centre - margin), math.tanh(centre + margin), covers


def _size(mean: Array, above: Array, below: Array) -> dict[str, float | None]:
    """The later third of the layers over the rest, with its interval; None where a mean is not positive."""
    seeds, layers, documents = above.shape
    start = layers - max(1, layers // 3)

    def log_ratio(profiles: Array) -> Array:
        later, rest = profiles[:, start:].mean(1), profiles[:, :start].mean(1)
        ratio = np.divide(later, rest, out=np.full(len(profiles), np.nan), where=(later > 0) & (rest > 0))
        return np.log(ratio)

    value = float(log_ratio(mean[None])[0])
    none: dict[str, float | None] = {"size_low": None, "size_high": None}
    if not math.isfinite(value):
        return {"size": None, **none}
    if layers < FEWEST_LAYERS:
        return {"size": math.exp(value), **none}
    if seeds == documents == 1:
        parts = (mean[start:], mean[:start])
        total = sum(float(part.var(ddof=1)) / len(part) / part.mean() ** 2 if len(part) > 1 else 0.0 for part in parts)
        freedom: float = layers - 2
    else:
        total, freedom = _spread(log_ratio, above, below)
    if not math.isfinite(total):
        return {"size": math.exp(value), **none}
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)
    if value + margin > LARGEST:  # a mean that is all but 0 leaves the ratio open
        return {"size": math.exp(value), **none}
    return {"size": math.exp(value), "size_low": math.exp(value - margin), "size_high": math.exp(value + margin)}


def _spread(statistic: Callable[[Array], Array], above: Array, below: Array) -> tuple[float, float]:
    """Variance over seeds and documents of a statistic of profiles [B, layers], and its degrees of freedom."""
    seeds, _, documents = above.shape
    generator = np.random.default_rng(0)
    drawn_seeds, drawn_documents = _draws(generator, seeds), _draws(generator, documents)

    def variance(by_seed: bool, by_document: bool) -> float:
        weights = drawn_seeds if by_seed else np.ones_like(drawn_seeds)
        counts = drawn_documents if by_document else np.ones_like(drawn_documents)
        ratio = np.einsum("sld,bd->bsl", above, counts) / np.einsum("sld,bd->bsl", below, counts)
        profiles = np.einsum("bsl,bs->bl", ratio, weights) / weights.sum(1, keepdims=True)
        return float(statistic(profiles).var(ddof=1))

    components = []
    if seeds > 1:
        components.append((variance(True, False), seeds - 1))
    if documents > 1:
        components.append((variance(False, True), documents - 1))
    total = variance(True, True)
    spread = sum(value**2 / freedom for value, freedom in components)
    freedom = sum(value for value, _ in components) ** 2 / spread if spread > 0 else min(f for _, f in components)
    return total, freedom


def _draws(generator: np.random.Generator, size: int) -> Array:
    """How often each of `size` is drawn when size - 1 are, [RESAMPLES, size]; all once where there is one."""
    if size == 1:
        return np.ones((RESAMPLES, 1))
    return generator.multinomial(size - 1, np.full(size, 1 / size), RESAMPLES).astype(np.float64)


def autocorrelation(profile: Array) -> float:
    """Lag-1 autocorrelation of the ranks of a profile [layers] about their line, corrected for its bias, 0 to 0.9."""
    layers = len(profile)
    if layers < FEWEST_LAYERS:
        return 0.0
    place, ranks = np.arange(layers), stats.rankdata(profile)
    rest = ranks - np.polyval(np.polyfit(place, ranks, 1), place)
    total = float(rest @ rest)
    if total < 1e-9 * layers**3:  # in order throughout: nothing is left to wander
        return 0.0
    # Its expectation about a line that was fitted is φ - (2 + 4φ) / layers.
    corrected = (layers * float(rest[1:] @ rest[:-1]) / total + 2) / max(1, layers - 4)
    return float(np.clip(round(corrected, 2), 0.0, HIGHEST))


@lru_cache
def chance_band(layers: int, correlation: float = 0.0) -> tuple[float, float]:
    """Central 95 % of ρ over profiles of so many layers without a trend.

    Args:
        layers: how many.
        correlation: between neighbouring layers, from 0 to below 1; 0 gives random orders.
    """
    generator = np.random.default_rng(0)
    if correlation == 0:
        profiles = generator.permuted(np.tile(np.arange(layers, dtype=float), (9_999, 1)), axis=1)
    else:
        profiles = generator.standard_normal((9_999, layers))
        for layer in range(1, layers):
            profiles[:, layer] *= math.sqrt(1 - correlation**2)
            profiles[:, layer] += correlation * profiles[:, layer - 1]
    high = float(np.quantile(np.abs(_rho(profiles)), CONFIDENCE))
    return -high, high


def _nulls(measure: str, layers: Sequence[int], nulls: Mapping[str, Rows]) -> dict[str, list[float]]:
    """ρ of each run of each null that holds this norm in all the layers."""
    found = {}
    for name, runs in nulls.items() if measure in NORM_MEASURES else ():
        tables = [{row["layer"]: row[measure] for row in run["layers"]} for run in runs]
        if tables and all(layer in table for table in tables for layer in layers):
            found[name] = _rho(np.array([[table[layer] for layer in layers] for table in tables])).tolist()
    return found


def _verdict(
    rho: float,
    low: float,
    high: float,
    chance: tuple[float, float],
    nulls: Sequence[float],
    size: Mapping[str, Any],
    layers: int,
) -> str:
    """A trend where the interval leaves out 0 and every null's ρ, and ρ chance; none where both ρ and the size are
    shown to be small.
    """
    if low > max([0.0, *nulls]) and rho > chance[1]:
        return "later more"
    if high < min([0.0, *nulls]) and rho < chance[0]:
        return "later less"
    orders = chance_band(layers)
    is_level = size["size_low"] is not None and LEVEL[0] <= size["size_low"] and size["size_high"] <= LEVEL[1]
    return "no trend" if orders[0] <= low and high <= orders[1] and is_level else "undecided"

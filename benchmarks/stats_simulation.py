"""Coverage of the 95 % intervals, wrong equivalence at the margin, and false discoveries, over simulated experiments.

Prints the tables of docs/statistics.md and one line of JSON. About seven minutes on one thread:
`python benchmarks/stats_simulation.py [experiments]`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from preskip.stats import RatioDistribution, mcnemar, paired_accuracy_difference
from preskip.stats.families import gatekeeping
from preskip.stats.looks import fractions_of, two_sided
from preskip.stats.tests import discordant

RESAMPLES = 999
Make = Callable[[np.random.Generator], tuple[Any, ...]]  # numerator, denominator, clusters if any


def coverage(make: Make, truth: float, experiments: int) -> float:
    """Share of experiments whose 95 % interval holds the truth."""
    covered = 0
    for experiment in range(experiments):
        found = make(np.random.default_rng(experiment))
        interval = RatioDistribution(*found, resamples=RESAMPLES, seed=experiment % 16).interval(0.95)
        covered += interval.low <= truth <= interval.high
    return covered / experiments


def documents_of(seeds: int, units: int, shares: tuple[float, float, float]) -> Make:
    """Skewed documents of unequal size; `shares` of the variance of the mean: seeds, units, seed by unit."""
    of_seeds, of_units, of_both = np.sqrt(np.array(shares) * (seeds, units, seeds * units))

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        size = generator.integers(500, 3000, units).astype(float)
        effect = (
            of_seeds * generator.standard_normal((seeds, 1))
            + of_units * (generator.gamma(4, 0.5, units) - 2)
            + of_both * generator.standard_normal((seeds, units))
        )
        return size * effect, size

    return make


def clustered_items(seeds: int, clusters: int, seed_deviation: float) -> Make:
    """0/±1 differences of four items per document, whose rates the document shares; true mean 0.05."""
    labels = np.repeat(np.arange(clusters), 4)

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        of_seeds = seed_deviation * generator.standard_normal((seeds, 1))
        rate = 0.35 + generator.uniform(-0.2, 0.2, clusters)[labels] + of_seeds
        right = generator.random((seeds, len(labels))) < rate
        difference = right.astype(float) - (generator.random(len(labels)) < 0.30)
        return difference, np.ones_like(difference), labels

    return make


def pieces_of_books(seeds: int, pieces: Sequence[int], *, clustered: bool) -> Make:
    """Pieces of some books, half of whose variance is their book's; counted by book, or wrongly as independent."""
    books = np.repeat(np.arange(len(pieces)), pieces)

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        effect = (
            0.2 * generator.standard_normal((seeds, 1))
            + generator.standard_normal(len(pieces))[books]
            + generator.standard_normal((seeds, len(books)))
        )
        size = generator.integers(1000, 1400, len(books)).astype(float)
        return size * effect, size, books if clustered else None

    return make


def clusters_of(seeds: int, sizes: Sequence[float], *, skewed: bool = False) -> Make:
    """Whole clusters of given sizes, with a seed's own part; ratios normal, or lognormal(1) less their mean."""
    size = np.array(sizes, dtype=float)

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        own = generator.standard_normal(len(size))
        if skewed:
            own = (generator.lognormal(0, 1, len(size)) - np.exp(0.5)) / 2.16
        seed = 0.3 * generator.standard_normal((seeds, 1)) if seeds > 1 else np.zeros((1, 1))
        both = 0.3 * generator.standard_normal((seeds, len(size))) if seeds > 1 else np.zeros((1, 1))
        return size * (seed + own + both), size

    return make


def ties(seeds: int) -> Make:
    """300 units of which 95 % do not differ."""

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        differs = generator.random(300) < 0.05
        effect = differs * (generator.standard_normal(300) + 0.3 * generator.standard_normal((seeds, 300)))
        return effect + 0.02 * generator.standard_normal((seeds, 1)), np.ones(300)

    return make


def answers(seeds: int) -> Make:
    """300 right or wrong answers, of which each seed on its own gains 3 % and loses 3 %."""

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        return generator.choice([1.0, -1.0, 0.0], size=(seeds, 300), p=[0.03, 0.03, 0.94]), np.ones(300)

    return make


def diverging(seeds: int) -> Make:
    """60 documents; one seed in ten lies ten spreads to one side. The mean is 1 spread of 0.1."""

    def make(generator: np.random.Generator) -> tuple[Any, ...]:
        seed = 0.1 * generator.standard_normal((seeds, 1)) + (generator.random((seeds, 1)) < 0.1)
        return seed + 0.5 * generator.standard_normal(60) + 0.3 * generator.standard_normal((seeds, 60)), np.ones(60)

    return make


UNEQUAL = (5, 13, 5, 17, 9, 3)


def scenarios() -> Iterator[tuple[str, Make, float]]:
    """Each with its name and the truth."""
    for seeds in (1, 3, 5):
        yield f"{seeds} seed(s), 6 equal clusters", clusters_of(seeds, [1] * 6), 0.0
        yield f"{seeds} seed(s), 6 unequal clusters", clusters_of(seeds, UNEQUAL), 0.0
        yield f"{seeds} seed(s), 12 clusters of 1 to 50", clusters_of(seeds, np.geomspace(1, 50, 12).tolist()), 0.0
        yield f"{seeds} seed(s), 24 equal clusters", clusters_of(seeds, [1] * 24), 0.0
        yield f"{seeds} seed(s), 6 equal clusters, lognormal", clusters_of(seeds, [1] * 6, skewed=True), 0.0
        yield f"{seeds} seed(s), 24 equal clusters, lognormal", clusters_of(seeds, [1] * 24, skewed=True), 0.0
    for seeds in (3, 5):
        yield f"{seeds} seeds, 300 units, 95 % ties", ties(seeds), 0.0
        yield f"{seeds} seeds, one in ten diverges", diverging(seeds), 0.1
    for units in (25, 60, 200):
        yield f"1 seed, {units} documents", documents_of(1, units, (0, 1, 0)), 0.0
    yield "1 seed, 200 items in 50 clusters", clustered_items(1, 50, 0.0), 0.05
    for seeds in (1, 3):
        for clustered, how in ((True, "clustered"), (False, "as if independent")):
            make = pieces_of_books(seeds, (5, 13, 5, 17), clustered=clustered)
            yield f"{seeds} seed(s), 40 pieces of 4 books, {how}", make, 0.0
    ratios = {
        "seeds dominate": (0.9, 0.05, 0.05),
        "documents dominate": (0.05, 0.9, 0.05),
        "mixed": (0.4, 0.4, 0.2),
        "seed by document dominates": (0.1, 0.1, 0.8),
    }
    for seeds in (2, 3, 5):
        for name, shares in ratios.items():
            yield f"{seeds} seeds, 60 documents, {name}", documents_of(seeds, 60, shares), 0.0
        yield f"{seeds} seeds, 300 answers, each seed's own", answers(seeds), 0.0
    yield "3 seeds, 200 items in 50 clusters", clustered_items(3, 50, 0.02), 0.05


def false_discoveries(seeds: int, experiments: int) -> tuple[float, float]:
    """Share of experiments with a false discovery after Holm, and without it: 7 arms × 3 metrics that do nothing."""
    arms, documents, items = 7, 60, 300
    corrected = 0.05 / (3 * arms)  # Holm finds something exactly when the smallest p is at most this
    found = np.zeros(2)
    for experiment in range(experiments):
        generator = np.random.default_rng(experiment)
        size = generator.integers(500, 3000, documents).astype(float)
        base, loss = 0.5 * generator.standard_normal(documents), 0.3 * generator.standard_normal(items)
        right = generator.random(items) < 0.4
        any_found = np.zeros(2, dtype=bool)
        for _ in range(arms):
            effect = (0.1 if seeds > 1 else 0.0) * generator.standard_normal((2, seeds, 1))
            anew = generator.random((seeds, items)) < 0.2
            answers = np.where(anew, generator.random((seeds, items)) < 0.4, right).astype(float) - right
            nll = size * (effect[0] + base + generator.standard_normal((seeds, documents)))
            losses = effect[1] + loss + generator.standard_normal((seeds, items))
            for above, below in ((nll, size), (losses, np.ones(items)), (answers, np.ones(items))):
                distribution = RatioDistribution(above, below, resamples=RESAMPLES, seed=experiment % 8)
                excluded = [distribution.interval(1 - level).excludes_zero for level in (corrected, 0.05)]
                if above is answers:
                    exact = mcnemar(*discordant(answers))
                    excluded = [out and exact <= p for out, p in zip(excluded, (corrected, 0.05), strict=True)]
                any_found |= excluded
        found += any_found
    return float(found[0] / experiments), float(found[1] / experiments)


def wrong_equivalence(seeds: int, items: int, share: float, experiments: int) -> float:
    """Share of experiments that read "equivalent" within a point where the truth is a point.

    Items are gained at a rate of 1 % + `share` and lost at `share`, each with a difficulty of its own that the seeds
    have in common.
    """
    wrong = 0
    for experiment in range(experiments):
        generator = np.random.default_rng(experiment)
        rate = generator.gamma(0.5, 2.0, items)  # mean 1: which items can be gained is much the same in every seed
        up = generator.random((seeds, items)) < np.minimum(1, (0.01 + share) * rate)
        down = ~up & (generator.random((seeds, items)) < share)
        difference = paired_accuracy_difference(up, down, resamples=RESAMPLES, seed=experiment % 16).distribution
        wrong += difference.p_equivalence(0.01) <= 0.05
    return wrong / experiments


def growing_families(true: Sequence[int], experiments: int) -> tuple[float, float, float]:
    """Looks at 3, 5 and 8 seeds over a primary and four secondary comparisons of one arm, 60 documents.

    Args:
        true: the comparisons that have a difference, a large one; the others have none.
        experiments: simulated.

    Returns:
        Share of experiments with a false difference: by the declared procedure; by it without regard to looking; and
        with every p taken as it is at every look.
    """
    looks, documents, levels = (3, 5, 8), 60, [1, 2, 2, 2, 2]
    fractions = fractions_of(looks)
    found = np.zeros(3)
    for experiment in range(experiments):
        generator = np.random.default_rng(experiment)
        size = generator.integers(500, 3000, documents).astype(float)
        arm = 0.1 * generator.standard_normal((looks[-1], 1)) + 0.3 * generator.standard_normal(documents)
        p_values = np.ones((len(looks), len(levels)))
        for place in range(len(levels)):
            effect = arm + 0.1 * generator.standard_normal((looks[-1], 1)) + 0.3 * generator.standard_normal(documents)
            effect += 0.5 * generator.standard_normal((looks[-1], documents)) + (5.0 if place in true else 0.0)
            for number, look in enumerate(looks):
                distribution = RatioDistribution(size * effect[:look], size, resamples=RESAMPLES, seed=experiment % 8)
                p_values[number, place] = distribution.p_value()
        false = [place for place in range(len(levels)) if place not in true]
        declared = np.array(gatekeeping(list(two_sided(list(p_values), fractions)), levels))
        each = np.array([gatekeeping(list(row), levels) for row in p_values])
        found += [
            (declared[false] <= 0.05).any(),
            (each[:, false] <= 0.05).any(),
            (p_values[:, false] <= 0.05).any(),
        ]
    return tuple(float(share) for share in found / experiments)  # type: ignore[return-value]


def main() -> None:
    """Measure and print."""
    experiments = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    figures: dict[str, float] = {}
    for name, make, truth in scenarios():
        figures[name] = coverage(make, truth, experiments)
        print(f"| {name} | {100 * figures[name]:.1f} % |", flush=True)
    for seeds in (1, 3, 5):
        for items in (300, 1_000):
            for share in (0.0, 0.005):
                name = f"wrong equivalent, {seeds} seed(s), {items} items, lost {share:g}"
                figures[name] = wrong_equivalence(seeds, items, share, max(500, experiments // 5))
                print(f"| {name} | {100 * figures[name]:.1f} % |", flush=True)
    for seeds in (1, 3):
        corrected, raw = false_discoveries(seeds, max(1_000, experiments // 5))
        figures |= {f"false discoveries, {seeds} seed(s)": corrected, f"uncorrected, {seeds} seed(s)": raw}
        print(f"| {seeds} seed(s): any false discovery | {100 * corrected:.1f} % (uncorrected {100 * raw:.1f} %) |")
    of_five = {"nothing differs": (), "the primary one differs": (0,), "all others differ": (1, 2, 3, 4)}
    for words, true in of_five.items():
        declared, unlooked, raw = growing_families(true, max(500, experiments // 20))
        figures |= {f"growing family, {words}": declared, f"growing family, {words}, looks ignored": unlooked}
        print(
            f"| 3, 5, 8 seeds, {words}: any false difference | {100 * declared:.1f} % (looks ignored "
            f"{100 * unlooked:.1f} %, uncorrected {100 * raw:.1f} %) |"
        )
    print(json.dumps({"experiments": experiments, **figures}))


if __name__ == "__main__":
    main()

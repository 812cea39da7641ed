"""The rates that the study from scratch tries for an arm, and the one that it takes (`benchmarks/scratch_study.py`).

A rate is given by its power: how many doublings it is from the centre. Losses are those of development text by power,
infinite where a training diverged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from preskip.runs.files import read_json, write_json

CENTRE = 3e-3
# Doubles of the centre that are tried on either side at most.
FARTHEST = 4


def rate_of(power: float) -> float:
    """The rate so many doublings from the centre."""
    return float(f"{CENTRE * 2**power:.3g}")


def best(losses: Mapping[int, float]) -> int:
    """The power of the lowest loss; of rates that diverged the lowest rate is the one to go on from."""
    return min(losses, key=lambda power: (losses[power], power))


def lowest(losses: Mapping[int, float]) -> float:
    """The power at the lowest point of the parabola through the best and its neighbours, at most half of one from it.

    The best itself where a neighbour diverged or was not tried.
    """
    middle = best(losses)
    below, here, above = (losses.get(middle + step, math.inf) for step in (-1, 0, 1))
    curvature = below - 2 * here + above
    if not 0 < curvature < math.inf:
        return middle
    return middle + (below - above) / (2 * curvature)


def tried(losses: Mapping[int, float]) -> str:
    """The rates that were tried, which of them diverged, and whether the best is the last that may be tried."""
    rates = (f"{rate_of(power):g}" + (" (diverged)" if math.isinf(losses[power]) else "") for power in sorted(losses))
    last = best(losses)
    return ", ".join(rates) + (" (best at the end)" if abs(last) == FARTHEST and math.isfinite(losses[last]) else "")


def is_open(losses: Mapping[int, float], power: int) -> bool:
    """Whether a rate is to be tried: the centre and its neighbours, then what is beyond a best one at the edge."""
    return abs(power) <= 1 or best(losses) == power - (1 if power > 0 else -1)


def write_rates(folder: Path, losses: Mapping[str, Mapping[int, float]]) -> None:
    """Write `rates.json`: the loss of every arm by rate, null where it diverged."""
    shown = {
        arm: {f"{rate_of(power):g}": loss if math.isfinite(loss) else None for power, loss in sorted(found.items())}
        for arm, found in losses.items()
    }
    write_json(folder / "rates.json", shown)


def rates_tried(folder: Path) -> dict[str, dict[int, float]]:
    """What `write_rates` wrote."""
    return {
        arm: {
            round(math.log2(float(rate) / CENTRE)): math.inf if loss is None else loss for rate, loss in found.items()
        }
        for arm, found in read_json(folder / "rates.json").items()
    }

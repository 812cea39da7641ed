"""Tables of numbers as the statistics take them, checked once: shapes, NaN, sizes, clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preskip.errors import PreskipError

Array = NDArray[np.float64]
Labels = Sequence[Any] | NDArray[Any]
LARGEST = 1e100  # beyond it squares are infinite


def matrix(values: ArrayLike, name: str) -> Array:
    """`values` as [seeds, units]; one row when it is [units].

    Raises:
        PreskipError: not numbers, ragged, empty, NaN, infinite or beyond 1e100.
    """
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
    usable = np.abs(array) <= LARGEST  # nor NaN
    if not usable.all():
        bad = int((~usable).sum())
        raise PreskipError(
            f"{name} holds {bad} NaN, infinite or impossible value(s) of {array.size}: a failed evaluation cannot be "
            "compared"
        )
    return array


def ratio_inputs(numerator: ArrayLike, denominator: ArrayLike, clusters: Labels | None = None) -> tuple[Array, Array]:
    """Numerator and denominator as two [seeds, units] of one shape; whole clusters as the units, where there are any.

    Raises:
        PreskipError: as `matrix`, or unequal shapes, not one label per unit, a denominator that is not positive, fewer
            than 2 units.
    """
    above, below = matrix(numerator, "numerator"), matrix(denominator, "denominator")
    if above.shape[1] != below.shape[1] or len(below) not in (1, len(above)):
        raise PreskipError(
            f"numerator has shape {above.shape} and denominator {below.shape}: both need one value per unit"
        )
    below = np.ascontiguousarray(np.broadcast_to(below, above.shape))
    if clusters is not None:
        above, below = _sums(above, below, clusters)
    if (below <= 0).any():
        raise PreskipError(f"denominator holds {below.min():g}: every unit needs a positive size; drop empty documents")
    if above.shape[1] < 2:
        raise PreskipError(f"{above.shape[1]} unit is too few for an interval: evaluate at least 2 documents or items")
    return above, below


def paired(values_a: ArrayLike, values_b: ArrayLike, name_a: str, name_b: str) -> tuple[Array, Array]:
    """Two tables over the same units, rows paired; one row serves all rows of the other.

    Raises:
        PreskipError: as `matrix`, or the shapes do not pair.
    """
    a, b = matrix(values_a, name_a), matrix(values_b, name_b)
    if a.shape[1] != b.shape[1] or (len(a) != len(b) and 1 not in (len(a), len(b))):
        raise PreskipError(
            f"{name_a} has shape {a.shape} and {name_b} {b.shape}: a paired comparison needs the same units"
        )
    return a, b


def _sums(above: Array, below: Array, clusters: Labels) -> tuple[Array, Array]:
    """Sums of both per cluster, [seeds, clusters] each."""
    if len(clusters) != above.shape[1]:
        raise PreskipError(f"{len(clusters)} cluster labels for {above.shape[1]} items: give one label per item")
    labels = np.asarray(clusters)
    names, index = np.unique(labels.astype(str) if labels.dtype == object else labels, return_inverse=True)

    def total(table: Array) -> Array:
        return np.stack([np.bincount(index, weights=row, minlength=len(names)) for row in table]).astype(np.float64)

    return total(above), total(below)

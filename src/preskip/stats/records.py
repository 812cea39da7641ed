"""Item records (items.jsonl) as aligned tables: which seeds pair, which items are shared, what their scores are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preskip.errors import PreskipError
from preskip.runs.schema import Kind
from preskip.runs.stored import UNTRAINED
from preskip.stats.inputs import Array

Record = Mapping[str, Any]  # a line of items.jsonl, checked here
Items = Sequence[Record]
SeedItems = Mapping[Any, Items] | Sequence[Items] | Items


@dataclass(frozen=True)
class Table:
    """One evaluation set: its kind, item ids and cluster labels, and the records of each row (an arm's seed)."""

    name: str
    kind: Kind
    ids: list[str]
    rows: list[list[Record]]

    @property
    def clusters(self) -> list[str] | None:
        """A label per item, or None when no item names a cluster, or all name the same one (`is_one_cluster`)."""
        labels = [record.get("cluster") for record in self.rows[0]]
        if all(label is None for label in labels):
            return None
        # An item without a cluster is its own.
        named = [
            f"id:{record['id']}" if label is None else f"cluster:{label}"
            for record, label in zip(self.rows[0], labels, strict=True)
        ]
        return named if len(set(named)) > 1 else None

    @property
    def is_one_cluster(self) -> bool:
        """Whether all items are of one and the same cluster, such as pieces of a single book."""
        labels = {record.get("cluster") for record in self.rows[0]}
        return len(labels) == 1 and None not in labels

    @property
    def scores(self) -> list[str]:
        """Names of the per-item scores, which every record must have."""
        return list(self.rows[0][0].get("scores") or ())

    def column(self, key: str) -> Array:
        """One number per row and item, [rows, items]; `key` a field of a document or a score of an item.

        Raises:
            PreskipError: a record lacks it or holds no number.
        """
        try:
            return np.array(
                [
                    [float(record[key] if self.kind == "document" else record["scores"][key]) for record in row]
                    for row in self.rows
                ]
            )
        except (KeyError, TypeError, ValueError):
            raise PreskipError(
                f"an item of {self.name} has no usable {key!r}: items.jsonl is damaged, evaluate again"
            ) from None

    def shared_column(self, key: str) -> Array:
        """A property of the items themselves, [items]; it must not differ between rows.

        Raises:
            PreskipError: it differs, or as `column`.
        """
        table = self.column(key)
        differing = np.flatnonzero((table != table[0]).any(axis=0))
        if differing.size:
            values = sorted({f"{value:g}" for value in table[:, differing[0]]})
            raise PreskipError(
                f"{self.kind} {self.ids[differing[0]]!r} of {self.name} has different {key} ({', '.join(values)}): not "
                "the same texts or windows; evaluate both with the same settings"
            )
        return table[0]


def by_seed(items: SeedItems, name: str) -> dict[Any, Items]:
    """Item lists by seed id; a list of lists counts as seeds 0, 1, ..., a plain list of records as one seed.

    Raises:
        PreskipError: nothing in it.
    """
    if not items:
        raise PreskipError(f"{name} has no items: evaluate it first")
    if isinstance(items, Mapping):
        return dict(items)
    if isinstance(items[0], Mapping):
        return {0: items}  # type: ignore[dict-item]
    return dict(enumerate(items))  # type: ignore[arg-type]


def paired_seeds(a: SeedItems, b: SeedItems, name_a: str, name_b: str) -> tuple[list[Items], list[Items]]:
    """The two arms' items, row s of one paired with row s of the other, or one row that serves all of the other.

    Mappings pair on the seeds that both have; an untrained arm (named `none`) with a single cell pairs with every seed.
    Lists pair in the order given, and a list of one with every seed.

    Raises:
        PreskipError: no common seed, or lists of unequal length.
    """
    seeds_a, seeds_b = by_seed(a, name_a), by_seed(b, name_b)
    identified = isinstance(a, Mapping) and isinstance(b, Mapping)
    serves_all = [
        _serves_all(name, seeds) if identified else len(seeds) == 1
        for seeds, name in ((seeds_a, name_a), (seeds_b, name_b))
    ]
    if any(serves_all):
        return list(seeds_a.values()), list(seeds_b.values())
    if not identified and len(seeds_a) != len(seeds_b):
        raise PreskipError(
            f"{name_a} has {len(seeds_a)} seeds and {name_b} has {len(seeds_b)}: give equal numbers, or a reference "
            "with one"
        )
    common = [seed for seed in seeds_a if seed in seeds_b]
    if not common:
        raise PreskipError(
            f"{name_a} (seeds {', '.join(map(str, seeds_a))}) and {name_b} (seeds {', '.join(map(str, seeds_b))}) have "
            "no seed in common: run both with the same --seeds"
        )
    return [seeds_a[seed] for seed in common], [seeds_b[seed] for seed in common]


def _serves_all(name: str, seeds: Mapping[Any, Items]) -> bool:
    """Whether an arm is the untouched model, which is scored once and paired with every seed."""
    return len(seeds) == 1 and name.rpartition(":")[2] == UNTRAINED


def nothing_compared(left_out: Sequence[str]) -> PreskipError:
    """The error of a comparison of which nothing is left.

    Args:
        left_out: notes of what was left out (`preskip.errors.noted`).
    """
    why = left_out[0].partition(": ")[2] if left_out else "what the arms share holds no score: evaluate them again"
    return PreskipError(why)


def unpaired_seeds(items: Mapping[str, SeedItems], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """What pairs leave out because the other arm has no such seed, a line for all pairs of two runs that leave it out.

    Args:
        items: records by arm and seed, arms of several runs named `run:arm`.
        pairs: (arm, reference) of each comparison. Without a common seed there is none, and nothing is said.
    """
    found: dict[str, list[str]] = {}
    for pair in pairs:
        seeds = [by_seed(items[name], name) for name in pair]
        runs, arms = zip(*(name.rpartition(":")[::2] for name in pair), strict=True)
        common = [seed for seed in seeds[0] if seed in seeds[1]]
        left_out = [
            f"{', '.join(map(str, alone))} of {run}"
            for run, own in zip(runs, seeds, strict=True)
            if (alone := [seed for seed in own if seed not in common])
        ]
        if common and left_out and not any(map(_serves_all, pair, seeds)):
            line = f"paired on seeds {', '.join(map(str, common))}; left out are {' and '.join(left_out)}"
            found.setdefault(line, []).append(" and ".join(dict.fromkeys(arms)))
    return [f"{', '.join(pairs)}: {line}" for line, pairs in found.items()]


def tables(
    rows: Sequence[Items], name: str, sets: Sequence[str] | None = None, notes: list[str] | None = None
) -> list[Table]:
    """The sets that all rows hold, each aligned on item ids; order of first appearance.

    Args:
        rows: one list of records per row.
        name: whose rows they are, for messages.
        sets: which sets to take, all of which must be there. Default: all that the rows share.
        notes: where to note a set of which every item has failed. It is left out; without notes it raises its error
            where it was asked for, or is all there is.

    Raises:
        PreskipError: a set asked for is not shared, none is shared, or a shared set's items differ.
    """
    found = [_by_set(row, name) for row in rows]
    shared = [key for key in found[0] if all(key in other for other in found)]
    for key in sets or ():
        if key not in shared:
            known = f"they share {', '.join(shared)}" if shared else "they share no set"
            raise PreskipError(f"{name} do not share the set {key!r}: {known}")
    chosen = [key for key in shared if sets is None or key in sets]
    if not chosen:
        raise PreskipError(f"{name} share no evaluation set: evaluate both on the same sets")
    every = [_aligned(key, [other[key] for other in found], name) for key in chosen]
    usable = [table for table in every if table.ids]
    for key in (table.name for table in every if not table.ids):
        reason = next(record["failed"] for other in found for record in other[key].values() if "failed" in record)
        text = f"every item of {key} has failed in some seed or arm ({reason})"
        if notes is not None:
            notes.append(f"{name}: {text}; it is left out")
        elif sets is not None or not usable:
            raise PreskipError(f"{name}: {text}")
    return usable


def _by_set(row: Items, name: str) -> dict[str, dict[str, Record]]:
    sets: dict[str, dict[str, Record]] = {}
    for record in row:
        key, identity, kind = record.get("set"), record.get("id"), record.get("kind")
        if not isinstance(key, str) or not isinstance(identity, str) or kind not in ("document", "item"):
            raise PreskipError(
                f"an item of {name} lacks set, id or kind: {dict(record)!r:.80}; items.jsonl is damaged, evaluate again"
            )
        records = sets.setdefault(key, {})
        if identity in records:
            raise PreskipError(
                f"{kind} {identity!r} of {key} occurs twice in one seed: ids must be unique; evaluate again"
            )
        records[identity] = record
    return sets


def _aligned(key: str, found: Sequence[Mapping[str, Record]], name: str) -> Table:
    first = found[0]
    for other in found[1:]:
        if other.keys() != first.keys():
            odd = sorted(other.keys() ^ first.keys())
            shared = len(other.keys() & first.keys())
            raise PreskipError(
                f"{name} do not share the items of {key} ({len(first)} and {len(other)}, {shared} shared; not shared: "
                f"{odd[0]!r}{' and others' if len(odd) > 1 else ''}): evaluate both on the same items"
            )
    kinds = {record["kind"] for records in found for record in records.values()}
    if len(kinds) > 1:
        raise PreskipError(f"{key} of {name} mixes documents and items: items.jsonl is damaged, evaluate again")
    # What failed in one row is left out of all, so that they stay paired.
    ids = [identity for identity in sorted(first) if not any("failed" in records[identity] for records in found)]
    return Table(key, kinds.pop(), ids, [[records[identity] for identity in ids] for records in found])

"""tokens.parquet: a row per token, written as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from preskip.analysis.explain.classes import TokenTable
from preskip.runs.files import clear_disk_errors

if TYPE_CHECKING:
    import pyarrow as pa

# Rows per row group: few enough to be held, enough for a reader.
_ROWS = 8192


class TokenWriter:
    """Writes tokens.parquet; a context manager.

    Args:
        path: the file.
        has_skip: whether any layer has a skip; without one `bypass` is null.
        has_enrichment: the same of `enrichment`.
    """

    def __init__(self, path: Path, *, has_skip: bool, has_enrichment: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        by_layer = pa.list_(pa.float32())
        self.schema = pa.schema(
            [
                ("document", pa.string()),
                ("position", pa.int32()),
                ("token_id", pa.int32()),
                ("token", pa.string()),
                ("nll", pa.float32()),
                ("frequency", pa.float64()),
                ("position_in_word", pa.int32()),
                ("repeat", pa.bool_()),
                ("kind", pa.string()),
                ("case", pa.string()),
                ("word", pa.string()),
                ("bypass", by_layer),
                ("enrichment", by_layer),
            ]
        )
        self.path, self.has_skip, self.has_enrichment = path, has_skip, has_enrichment
        self._parts: list[pa.Table] = []
        self._rows = 0
        with clear_disk_errors(path):
            self._writer = pq.ParquetWriter(path, self.schema)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with clear_disk_errors(self.path):
            if kind is None:
                self._flush()
            self._writer.close()

    def write(
        self,
        document: str,
        first: int,
        ids: Sequence[int],
        table: TokenTable,
        nll: Sequence[float | None],
        bypass: NDArray[np.float32],
        enrichment: NDArray[np.float32],
    ) -> None:
        """Add consecutive tokens of a document, the first of which is at index `first` of its table.

        Sizes are ‖skip output‖ / ‖attention output‖ and ‖x̃ - x̂‖ / ‖x̂‖, [layers, tokens], NaN in layers without
        the part.
        """
        import pyarrow as pa

        end = first + len(ids)
        columns: dict[str, Any] = {
            "document": [document] * len(ids),
            "position": list(range(first, end)),
            "token_id": list(ids),
            "token": table.strings[first:end],
            "nll": list(nll),
            "frequency": table.frequency[first:end],
            "position_in_word": table.position_in_word[first:end],
            "repeat": table.repeated[first:end],
            **{name: table.labels[name][first:end] for name in ("kind", "case", "word")},
            "bypass": _lists(bypass) if self.has_skip else [None] * len(ids),
            "enrichment": _lists(enrichment) if self.has_enrichment else [None] * len(ids),
        }
        self._parts.append(pa.table(columns, schema=self.schema))
        self._rows += len(ids)
        if self._rows >= _ROWS:
            with clear_disk_errors(self.path):
                self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._parts:
            self._writer.write_table(pa.concat_tables(self._parts))
            self._parts, self._rows = [], 0


def _lists(values: NDArray[np.float32]) -> list[list[float | None]]:
    """[layers, tokens] → a list by layer for each token, None in place of NaN."""
    return [[None if np.isnan(value) else float(value) for value in column] for column in values.T]

"""The bypass map: the tokens of some texts, each with its two sizes in every layer."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from preskip.analysis.explain.reading import Reading
from preskip.runs.explain_schema import ExplainedDocument


class Shown:
    """Gathers the map until it is full.

    Args:
        most_tokens: of all texts together; the text in which it is reached is cut there.

    Attributes:
        documents: one entry of the map per text; sizes are rounded to 4 significant digits, None for a layer without
            the part and in place of all of them where none has it.
    """

    def __init__(self, most_tokens: int) -> None:
        self.left = most_tokens
        self.documents: list[ExplainedDocument] = []
        self._last: int | None = None

    def add(self, reading: Reading, first: int, bypass: NDArray[np.float32], enrichment: NDArray[np.float32]) -> bool:
        """Add consecutive tokens of a text, from index `first`, as far as there is room; whether the text is shown.

        The sizes are as in `TokenWriter.write`.
        """
        if self.left > 0 and bypass.shape[1]:
            if self._last != reading.index:
                self._last = reading.index
                self.documents.append(
                    {
                        "id": reading.text.id,
                        "title": reading.text.title,
                        "tokens": [],
                        "bypass": _start(bypass),
                        "enrichment": _start(enrichment),
                    }
                )
            size = min(self.left, bypass.shape[1])
            document = self.documents[-1]
            document["tokens"] += reading.table.strings[first : first + size]
            for rows, values in ((document["bypass"], bypass), (document["enrichment"], enrichment)):
                if rows is not None:
                    for row, new in zip(rows, values[:, :size].tolist(), strict=True):
                        row += [None if math.isnan(value) else float(f"{value:.4g}") for value in new]
            self.left -= size
        return self._last == reading.index


def _start(values: NDArray[np.float32]) -> list[list[float | None]] | None:
    return None if np.isnan(values).all() else [[] for _ in values]

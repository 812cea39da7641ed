"""Texts out of rows: JSON lines, tables, folders of them, data sets saved to disk or on the Hub; one rule for all.

A row whose text is null, missing or blank is left out, and how many were is reported. The column is the one asked for,
else a usual name, else the only one of strings. A row's id is the `id` that it names, else where it stands: the file's
name without its form, or the split, and the row's number from 1; so one content has the same ids in every form.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from preskip.assets import is_offline
from preskip.data.rows import Entry, format_of, rows_of, without_form
from preskip.data.scan import Row, Scan
from preskip.errors import PreskipError, explained, one_line
from preskip.progress import say, spinner

# What is scored of a data set in parts, where nothing is asked for: the first of these that it has.
_SCORED = ("test", "validation", "valid", "val", "dev", "eval", "train")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Where reading a data set stops; None is no limit.

    Attributes:
        reason: named in the line that reports the limit.
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
    """Whether a file of this name has rows."""
    return format_of(path) is not None


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    is_one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return is_one or (path / "dataset_dict.json").is_file()


def read_hub(name: str, text_column: str | None, split: str | None, limit: Limit | None, *, quiet: bool) -> Reading:
    """Read a data set `owner/name` or `owner/name:config` of the Hub, or of its cache where HF_HUB_OFFLINE is set.

    Raises:
        PreskipError: it cannot be loaded, or the column is not clear.
    """
    import datasets

    repository, _, config = name.partition(":")
    offline = is_offline()
    scan = Scan(text_column)
    with explained(lambda error: f"corpus {name}: {_explain_hub(error, offline)}"):
        # Streaming reads no more than the limit, but only a whole download can come from the cache.
        with _quiet_libraries():
            found: Any = datasets.load_dataset(repository, config or None, split=split, streaming=not offline)
        if split is None:
            split = choose_split(f"corpus {name}", found, None, quiet=quiet)
            found = found[split]

    def texts() -> Generator[Row, None, None]:
        with explained(lambda error: f"corpus {name}: {_explain_hub(error, offline)}"):
            yield from scan.texts(f"corpus {name}", str(split), _numbered(found))

    return _gather(name, texts(), scan, f"Hugging Face data set {name}, split {split}", limit or HUB_LIMIT, quiet)


def read_file(name: str, path: Path, text_column: str | None, limit: Limit | None, *, quiet: bool) -> Reading:
    """Read one file of rows: JSON lines, JSON, CSV or TSV, these also with `.gz`, Parquet or Arrow.

    Raises:
        PreskipError: it cannot be read, or the column is not clear.
    """
    scan = Scan(text_column)
    return _gather(name, _file_texts(scan, path, without_form(path.name)), scan, f"file {path}", limit, quiet)


def read_folder(
    name: str, path: Path, text_column: str | None, split: str | None, limit: Limit | None, *, quiet: bool
) -> Reading | None:
    """Read the files of rows of a folder, or a data set that was saved in it; None where there are none.

    Split names in files' and folders' names (`train-0.parquet`, `test/`) are understood as on the Hub; without any, all
    files are of the split `train`. A split of None takes what is scored: `test`, else `validation`, else `train`.

    Raises:
        PreskipError: a file cannot be read, a run lies in the folder, there is no such split, or the column is unclear.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    scan = Scan(text_column)
    where = f"corpus folder {path}"
    if is_saved(path):
        with explained(lambda error: f"{where} {_explain_file(error, 'saved data set')}"):
            saved: Any = datasets.load_from_disk(str(path))
            split = choose_split(where, saved, split, quiet=quiet) if isinstance(saved, Mapping) else split or "train"
            saved = saved[split] if isinstance(saved, Mapping) else saved

        def rows() -> Generator[Row, None, None]:
            with explained(lambda error: f"{where} {_explain_file(error, 'saved data set')}"):
                yield from scan.texts(where, str(split), _numbered(saved))

        return _gather(name, rows(), scan, f"folder {path}, split {split}", limit, quiet)
    if not tables_in(path):
        return None
    if re.search(r"[*?\[]", str(path.resolve())):
        raise PreskipError(f"{where}: tables in a folder with *, ? or [ in its name cannot be found: rename it")
    if runs := runs_in(path):  # `datasets` would read their tables, too
        raise PreskipError(f"{where} has tables and the run {runs[0]}: give another --out, or move that run")
    with _quiet_libraries():
        try:
            found = datasets.load_dataset_builder(str(path)).config.data_files or {}
        except (EmptyDatasetError, DataFilesNotFoundError):
            return None
        except Exception as error:  # a README.md that describes the folder wrongly, or several data sets in it
            raise PreskipError(f"{where} {_explain_file(error, 'data set')}: name its files") from error
    files = {part: [Path(file) for file in files if is_table(Path(file))] for part, files in found.items()}
    files = {part: own for part, own in files.items() if own}
    if not files:
        return None
    split = choose_split(where, files, split, quiet=quiet)
    read = {os.path.realpath(file) for part in files.values() for file in part}
    left = [file for file in tables_in(path) if os.path.realpath(file) not in read]
    if left:
        say(
            f"{where}: {len(left):,} table(s) of no split or of another format are left out, e.g. "
            f"{left[0].relative_to(path).as_posix()}",
            quiet=quiet,
        )

    own = [_relative(file, path) for file in files[split]]
    stems = [without_form(name) for name in own]

    def texts() -> Generator[Row, None, None]:
        for file, place, stem in zip(files[split], own, stems, strict=True):
            yield from _file_texts(scan, file, stem if stems.count(stem) == 1 else place)

    return _gather(name, texts(), scan, f"folder {path}, split {split}", limit, quiet)


def tables_in(folder: Path) -> list[Path]:
    """The files of rows of a folder, links followed, but for hidden ones and those that describe a data set."""
    from datasets.data_files import FILES_TO_IGNORE

    return [file for file in files_in(folder) if is_table(file) and file.name not in FILES_TO_IGNORE]


def files_in(folder: Path) -> list[Path]:
    """The files below a folder in the order of their names, links followed, but for hidden ones and those of runs.

    None is read twice.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add(real)
        if Path(place) != folder and _is_run(place, names):  # perhaps the one that reads this
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(place) / name for name in names if not name.startswith((".", "__"))]
    return sorted(file for file in found if file.is_file())


def runs_in(folder: Path) -> list[Path]:
    """The runs of preskip below a folder."""
    places = os.walk(folder, followlinks=False)
    return [Path(place) for place, _, names in places if Path(place) != folder and _is_run(place, names)]


def _is_run(place: str, names: list[str]) -> bool:
    """Whether a folder, of which these files are known, is a run of preskip; others may have a run.json, too."""
    if "run.json" not in names:
        return False
    try:
        record = json.loads(Path(place, "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"schema_version", "config"} <= record.keys()


def choose_split(where: str, parts: Iterable[str], split: str | None, *, quiet: bool) -> str:
    """The split that was asked for; for None the one to score, which is reported where there are others.

    Raises:
        PreskipError: there is no such split.
    """
    names = [str(part) for part in parts]
    if split is None:
        split = next((part for part in _SCORED if part in names), names[0])
        if len(names) > 1:
            say(f"{where}: split {split} of {', '.join(names)} is scored (--corpus-split)", quiet=quiet)
    if split not in names:
        raise PreskipError(f"{where} has no split {split!r}: choose one of {', '.join(names)} (--corpus-split)")
    return split


def _relative(file: Path, folder: Path) -> str:
    """A file's path in its folder, whichever of the two is a link."""
    for place in (folder, folder.absolute(), folder.resolve()):
        if file.is_relative_to(place):
            return file.relative_to(place).as_posix()
    return Path(os.path.relpath(file, folder.resolve())).as_posix()


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[Entry]:
    return (Entry(number, values, f", row {number + 1}") for number, values in enumerate(rows))


def _file_texts(scan: Scan, path: Path, prefix: str) -> Generator[Row, None, None]:
    kind = str(format_of(path))
    with explained(lambda error: f"corpus file {path} {_explain_file(error, 'json' if kind == 'jsonl' else kind)}"):
        yield from scan.texts(f"corpus file {path}", prefix, rows_of(path, scan.column), is_csv=kind == "csv")


def _gather(
    name: str, texts: Generator[Row, None, None], scan: Scan, source: str, limit: Limit | None, quiet: bool
) -> Reading:
    rows: list[Row] = []
    characters = 0
    whole = True
    with _quiet_libraries(), spinner(f"reading {name}", quiet=quiet):
        for row in chain(texts, scan.rest()):
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
    if scan.empty and rows:
        say(f"corpus {name}: {scan.empty:,} of {scan.rows:,} rows have no text and are left out", quiet=quiet)
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
    text = one_line(error)
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8: convert it, for example with iconv"
    if isinstance(error, PermissionError):
        return "cannot be read (Permission denied): check its permissions"
    if type(error).__name__ == "EmptyDataError":
        return "is empty: give one with text in it"
    return f"cannot be read as {kind}, it may be damaged or cut short ({type(error).__name__}: {text[:160]})"


def _explain_hub(error: BaseException, offline: bool) -> str:
    text = one_line(error)
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

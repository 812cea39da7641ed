"""Files of a run: atomic writes, JSON without NaN, and a full disk or a damaged file told in one line.

Every file is written beside its place and then renamed, so that a reader sees the old file or the new one, never half.
"""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError

# Ends the names of files that are being written.
TEMPORARY = ".tmp"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission while writing `path` into one clear line.

    Raises:
        PreskipError: in place of the error; other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise PreskipError(f"no space left on the disk while writing {path}: free some and resume") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PreskipError(
                f"{path} cannot be written ({os.strerror(error.errno)}): check its permissions, or choose another place"
            ) from error
        raise


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised in place of, says that a disk is full.

    safetensors raises its own type with the system's words; torch.save a RuntimeError that names its archive writer
    but not the reason, which is a full disk in all but rare cases.
    """
    words = ("inline_container", *(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)))
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step; a crash leaves the old content.

    Raises:
        PreskipError: the disk is full or the place cannot be written; nothing is left behind.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file's content in one step, see `write_text`; `mode` is the file's permissions."""
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is put at `path` as the block ends: what is there is whole.

    Where the block fails nothing is left behind.

    Raises:
        PreskipError: it cannot be made or put there, or another process has just made one.
    """
    if path.is_symlink():  # nothing is put in its place, and what it points at may not exist
        raise PreskipError(f"{path} is a link: choose another --out")
    with clear_disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        except (FileExistsError, NotADirectoryError, FileNotFoundError):
            raise PreskipError(f"no folder can be made in {path.parent}: choose another --out") from None
    try:
        yield made
        with clear_disk_errors(path):
            made.chmod(0o755)
            _put(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _put(made: Path, path: Path) -> None:
    try:
        made.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise PreskipError(f"{path} has just been made by another process: choose another --out") from None


def sync_tree(folder: Path) -> None:
    """Bring all files of a folder to the disk, so that a power cut after it cannot take them.

    Raises:
        OSError: the disk is full.
    """
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such thing
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value atomically; a NaN or infinity is refused, because JSON has none.

    Raises:
        PreskipError: a number is not finite, or the disk is full.
    """
    try:
        text = _json(value, indent=1)
    except ValueError as error:
        raise PreskipError(f"{path.name} would hold NaN or infinity: a result is not finite ({error})") from error
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line atomically; see `write_json`."""
    rows = list(rows)
    for number, row in enumerate(rows, 1):
        for key, value in {**row, **row.get("scores", {})}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PreskipError(f"{path.name} line {number}: {key} is {value}: a result is not finite")
    write_text(path, "".join(_json(row) + "\n" for row in rows))


def _json(value: Any, indent: int | None = None) -> str:
    """JSON in UTF-8; half of a surrogate pair, as in a path that is not UTF-8, is escaped."""
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    return LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        PreskipError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreskipError(f"{path} does not exist: is this a run directory?") from None
    except (ValueError, OSError) as error:
        raise PreskipError(f"{path} cannot be read: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's or an adapter's configuration.

    Raises:
        PreskipError: as `read_json`, or it is no object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise PreskipError(f"{path} is damaged, it holds no configuration: save the model or the adapter again")
    return content


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON object per line, of the file or, where it is not there, of the same compressed (`.gz`).

    Raises:
        PreskipError: the file cannot be read or a line is not a JSON object (its number is given).
    """
    compressed = path.with_name(f"{path.name}.gz")
    try:
        if not path.exists() and compressed.exists():
            path = compressed
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise PreskipError(f"{path} cannot be read: {error}") from None
    rows = []
    # Not splitlines: a document's id may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise PreskipError(f"{path} line {number} is not a JSON object")
        rows.append(row)
    return rows

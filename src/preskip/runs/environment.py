"""What a run ran on: versions, processor, memory, device, and which dtype the processor computes in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.runs.schema import Environment
from preskip.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "lm_eval",
)


def version_of(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Marketing name of the processor where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware_name(device: str) -> str:
    """Name of what computes: the accelerator, or the processor."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def computes_in_bfloat16(device: str) -> bool:
    """Whether a device has bf16 instructions; without them bf16 is emulated and many times slower than fp32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(errors="replace").split() if cpuinfo.is_file() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def resolve_device(name: str) -> str:
    """`auto` → cuda where there is one, else cpu.

    Raises:
        PreskipError: cuda was asked for and there is none, or the name is unknown.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise PreskipError(f"--device {name!r} is unknown: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise PreskipError("--device cuda: torch sees no CUDA device (see `preskip doctor`)")
    return name


def resolve_dtype(name: str, device: str) -> tuple[str, str]:
    """`auto` → bfloat16 where the device computes in it, else float32; with the reason, for the user to read."""
    if name != "auto":
        return name, "as asked"
    if computes_in_bfloat16(device):
        return "bfloat16", "the device computes in bfloat16"
    return "float32", "the device has no bfloat16 instructions"


@cache
def commit() -> str | None:
    """Commit of this code, with "+changes" where its files differ from it; None where nothing tells.

    Of a git checkout that the package is imported from, or the one that pip recorded when it installed from git.
    """
    folder = Path(__file__).parents[1]
    # A package that is only installed somewhere below a checkout is none of its files.
    if _git(folder, "ls-files", "--error-unmatch", "--", str(folder / "version.py")) is not None:
        head, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", str(folder))
        return head and head + ("+changes" if changed else "")
    try:
        recorded = importlib.metadata.distribution("preskip").read_text("direct_url.json")
        found = json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says about a folder, or None where it is missing, slow or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: str) -> Environment:
    """The `environment` of run.json."""
    import psutil
    import torch

    facts: Any = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "preskip": __version__,
        "commit": commit(),
        **{package: version_of(package) for package in PACKAGES},
        "torch": str(torch.__version__),  # with its build, which the package's own version can lack
    }
    return facts

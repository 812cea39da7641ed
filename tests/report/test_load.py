"""What the report reads beside results.json."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from preskip.errors import PreskipError
from preskip.report.load import load_curves


def test_a_compressed_training_log_is_read(tmp_path: Path) -> None:
    results = {"arms": {"preskip": {"seeds": [1, 2, 3]}}}
    folders = [tmp_path / f"arms/preskip/seed-{seed}" for seed in (1, 2, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
    line = b'{"step": 1, "loss": 2.5}\n'
    (folders[0] / "train.jsonl").write_bytes(line)
    (folders[1] / "train.jsonl.gz").write_bytes(gzip.compress(line))
    curves = load_curves(tmp_path, results)
    assert [(curve.seed, curve.lines) for curve in curves] == [(s, [{"step": 1, "loss": 2.5}]) for s in "12"]
    (folders[1] / "train.jsonl.gz").write_bytes(line)
    with pytest.raises(PreskipError, match="cannot be read"):
        load_curves(tmp_path, results)

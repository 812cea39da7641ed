"""The base that stored weights go on, as bake, explain and serve look it up."""

import json

import pytest

from preskip.cli.base import base_of
from preskip.errors import PreskipError
from preskip.runs.schema import SCHEMA_VERSION
from preskip.runs.weights import find_source


def adapter(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PRESKIP", "base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return find_source(folder)


def test_the_recorded_base_unless_another_is_given(tmp_path):
    source = adapter(tmp_path / "adapter", "owner/model")
    assert base_of(source, None) == ("owner/model", None)
    assert base_of(source, "other") == ("other", None)


def test_a_base_that_is_gone_or_unknown_is_one_line(tmp_path):
    gone = adapter(tmp_path / "gone", str(tmp_path / "base"))
    with pytest.raises(PreskipError, match=r"base, is not there any more: give it with --model$"):
        base_of(gone, None)
    (tmp_path / "base").mkdir()
    assert base_of(gone, None) == (str(tmp_path / "base"), None)
    with pytest.raises(PreskipError, match=r"does not say which base it was trained on: give it with --model$"):
        base_of(adapter(tmp_path / "unknown", None), None)
    assert base_of(adapter(tmp_path / "unknown-too", ""), "other") == ("other", None)


def test_the_commit_is_that_of_the_run_and_not_of_another_base(tmp_path):
    run = tmp_path / "run"
    cell = run / "arms" / "preskip" / "seed-1"
    cell.mkdir(parents=True)
    manifest = {"schema_version": SCHEMA_VERSION, "config": {"model": "owner/model"}, "model": {"revision": "abc"}}
    (run / "run.json").write_text(json.dumps(manifest))
    adapter(cell / "adapter", "owner/model")
    source = find_source(cell / "adapter")
    assert base_of(source, None) == ("owner/model", "abc")
    assert base_of(source, "owner/model") == ("owner/model", None)

"""The examples of docs/adapters.md run, in the order in which they stand."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

import zoo

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = [{"input_ids": ids, "labels": ids} for ids in torch.randint(8, zoo.VOCABULARY, (16, 6))]
    names = {"load_base": lambda: zoo.build("llama"), "dataset": dataset}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert not any("lora_" in key for key in names["merged"].state_dict())
    assert any(".preskip." in key for key in names["merged"].state_dict())

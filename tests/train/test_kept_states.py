"""States on the disk: what comes back is what was given, bit for bit, or nothing."""

from collections import namedtuple

import pytest
import torch

from preskip.train import kept_states
from preskip.train.kept_states import KeptStates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [0, 2])
def test_what_comes_back_is_what_was_given(tmp_path, dtype, parts):
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[0, 0, 0] = float("nan")
    KeptStates(tmp_path / "new").save("a", states, parts)
    found, again = KeptStates(tmp_path / "new").load("a")
    assert (found.dtype, found.shape, again) == (dtype, states.shape, parts)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(found.view(bits), states.view(bits))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_what_is_not_whole_is_not_there(tmp_path):
    kept = KeptStates(tmp_path)
    assert kept.load("a") is None
    kept.save("a", torch.ones(2, 3, 4), 0)
    whole = (tmp_path / "a").read_bytes()
    assert kept.size() == len(whole)
    spoiled = [whole[:length] for length in (0, 3, 8, 20, len(whole) - 1)]
    spoiled += [whole + b"\0", whole.replace(b"[2, 3, 4]", b"[2, 3, 9]"), whole.replace(b"float32", b"float99")]
    spoiled += [bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]) for place in range(len(whole))]
    for content in spoiled:
        (tmp_path / "a").write_bytes(content)
        assert kept.load("a") is None
    kept.save("a", torch.ones(2, 3, 4), 0)
    assert torch.equal(kept.load("a")[0], torch.ones(2, 3, 4))


def test_a_full_disk_ends_keeping_with_one_line(tmp_path, monkeypatch, capsys):
    kept, usage = KeptStates(tmp_path), namedtuple("usage", "free")
    kept.save("a", torch.ones(2, 3, 4), 0)
    monkeypatch.setattr(kept_states.shutil, "disk_usage", lambda folder: usage(kept_states.RESERVE + 95))
    for name in "bc":
        kept.save(name, torch.ones(2, 3, 4), 0)  # 96 bytes
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("less than 512 MiB would be left on the disk") == 1
    assert not kept.is_open
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert kept.load("a") is not None


def test_a_disk_that_fills_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_states.os, "replace", full)
    kept = KeptStates(tmp_path, quiet=True)
    kept.save("a", torch.ones(2, 3, 4), 0)
    assert not kept.is_open
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept = KeptStates(tmp_path / "file")
    kept.save("a", torch.ones(2, 3, 4), 0)
    kept.save("b", torch.ones(2, 3, 4), 0)
    assert capsys.readouterr().err.count("no more states of frozen layers are kept") == 1
    assert kept.load("a") is None

import errno
import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from preskip.errors import PreskipError
from preskip.experiment.preflight import check_place
from preskip.runs import directory as rundir
from preskip.runs import files
from preskip.runs.directory import RunDirectory
from preskip.runs.files import (
    clear_disk_errors,
    new_folder,
    read_json,
    read_jsonl,
    sync_tree,
    write_json,
    write_jsonl,
    write_text,
)
from preskip.runs.schema import CellSummary


def test_write_replaces_whole_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": [1.5, "é"]})
    assert read_json(path) == {"b": [1.5, "é"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_crash_while_writing_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RuntimeError):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EACCES, "choose another place$"),
        (errno.EIO, None),
    ],
)
def test_disk_errors(tmp_path, monkeypatch, number, words):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PreskipError if words else OSError, match=words):
        write_text(tmp_path / "a.txt", "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device that is always full")
def test_a_full_disk_is_found_behind_the_libraries_own_errors(tmp_path):
    import torch

    def save_through_torch():
        torch.save(torch.zeros(1_000_000), "/dev/full")

    def save_through_safetensors():
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    for save in (save_through_torch, save_through_safetensors):
        with (
            pytest.raises(PreskipError, match="no space left on the disk while writing there"),
            clear_disk_errors("there"),
        ):
            save()
    with pytest.raises(RuntimeError, match="something else"), clear_disk_errors(tmp_path):
        raise RuntimeError("something else")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused(tmp_path, value):
    with pytest.raises(PreskipError, match="finite"):
        write_json(tmp_path / "a.json", {"x": value})
    with pytest.raises(PreskipError, match=r"line 2: nll"):
        write_jsonl(tmp_path / "a.jsonl", [{"nll": 1.0}, {"nll": value}])
    assert list(tmp_path.iterdir()) == []


def test_jsonl_round_trip_and_bad_line(tmp_path):
    rows = [{"a": 1}, {"a": "x y"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a":')
    with pytest.raises(PreskipError, match="line 2 is not a JSON object"):
        read_jsonl(tmp_path / "a.jsonl")


def test_create_open_update(tmp_path):
    run = RunDirectory.create(tmp_path / "runs" / "a", {"status": "running"})
    run.update_manifest(status="finished")
    assert RunDirectory.open(run.path).manifest == {"schema_version": 2, "status": "finished"}
    with pytest.raises(PreskipError, match="exists already"):
        RunDirectory.create(run.path, {})


def test_a_link_to_nothing_is_refused_before_there_is_work_to_lose(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PreskipError, match="a exists already"):
        RunDirectory.create(tmp_path / "a", {})
    with pytest.raises(PreskipError, match="a exists already"):
        check_place(tmp_path / "a")
    with pytest.raises(PreskipError, match="a is a link: choose another --out"), new_folder(tmp_path / "a"):
        raise AssertionError
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_two_at_once_do_not_share_a_new_run(tmp_path, monkeypatch):
    real = rundir.write_json

    def other_is_faster(path, value):
        real(path, value)
        if not (tmp_path / "a").exists():
            (tmp_path / "a").mkdir()
            real(tmp_path / "a" / "run.json", {"theirs": 1})

    monkeypatch.setattr(rundir, "write_json", other_is_faster)
    with pytest.raises(PreskipError, match="just been made by another process"):
        RunDirectory.create(tmp_path / "a", {})
    assert read_json(tmp_path / "a" / "run.json") == {"theirs": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_one_process_works_on_a_run(tmp_path):
    run = RunDirectory.create(tmp_path / "a", {})
    with (
        run.lock(),
        pytest.raises(PreskipError, match=f"another process is working on {run.path}: wait"),
        RunDirectory.open(run.path).lock(),
    ):
        pass
    with run.lock():
        pass


def test_the_lock_ends_with_a_killed_process(tmp_path):
    run = RunDirectory.create(tmp_path / "a", {})
    code = "import sys, os, signal, pathlib; from preskip.runs.directory import RunDirectory\n"
    code += "with RunDirectory(pathlib.Path(sys.argv[1])).lock(): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code, str(run.path)])
    assert killed.returncode == -signal.SIGKILL
    with run.lock():
        pass


def test_what_a_killed_process_left_is_cleared(tmp_path):
    run = RunDirectory.create(tmp_path / "a", {})
    done, waiting = run.cell("lora", 1), run.cell("lora", 2)
    for cell in (done, waiting):
        (cell.checkpoints / "checkpoint-1").mkdir(parents=True)
        (cell.folder / ".items.jsonl.abc.tmp").write_text("{")
    write_json(done.summary, {})
    with run.lock():
        found = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.name != ".lock"}
    assert found == {
        *("run.json", "arms", "arms/lora", "arms/lora/seed-1", "arms/lora/seed-1/cell.json"),
        *("arms/lora/seed-2", "arms/lora/seed-2/checkpoints", "arms/lora/seed-2/checkpoints/checkpoint-1"),
    }


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux names the file behind a handle")
def test_files_and_folders_are_brought_to_the_disk(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    sync_tree(tmp_path / "a")
    assert sorted(synced) == [str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path / "a" / "b" / "file")]
    synced.clear()
    write_text(tmp_path / "c.txt", "x")
    assert synced[1:] == [str(tmp_path)]  # the file under its temporary name, then the folder that has it now


def test_create_leaves_nothing_behind_on_failure(tmp_path):
    with pytest.raises(PreskipError):
        RunDirectory.create(tmp_path / "a", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PreskipError, match="no folder can be made in"):
        RunDirectory.create(tmp_path / "file" / "a", {})


def test_open_refuses(tmp_path):
    with pytest.raises(PreskipError, match="not a run directory"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(PreskipError, match="does not exist"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(PreskipError, match=r"schema_version 99, this preskip .* reads 2"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PreskipError, match="cannot be read"):
        RunDirectory.open(tmp_path)


def test_a_cell_is_done_when_its_summary_is_there(tmp_path):
    cell = RunDirectory(tmp_path).cell("lora", 3)
    assert cell.folder == tmp_path / "arms" / "lora" / "seed-3"
    assert not cell.is_done
    write_json(cell.summary, {})
    assert cell.is_done
    assert rundir.SCHEMA_VERSION == 2


def test_line_separators_inside_a_value_are_not_line_ends(tmp_path):
    rows = [{"id": "a\u2028b\x85c"}, {"id": "d"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("name", "content"), [("cell.json", "{"), ("cell.json", "[]"), ("cell.json", "{}"), ("items.jsonl", "1\n")]
)
def test_a_damaged_cell_names_the_folder_to_delete(tmp_path, name, content):
    cell = RunDirectory(tmp_path).cell("lora", 1)
    summary = dict.fromkeys(CellSummary.__required_keys__, 1)
    write_json(cell.summary, summary)
    write_jsonl(cell.items, [{"nll": 1.0}])
    assert cell.load() == (summary, [{"nll": 1.0}])
    (cell.folder / name).write_text(content)
    with pytest.raises(PreskipError, match=f"{name}.*; delete {cell.folder} and resume"):
        cell.load()


def test_lines_are_read_compressed_where_they_are_not_plain(tmp_path):
    rows = [{"id": "a", "nll": 1.0}, {"id": "ä", "nll": 2.0}]
    write_jsonl(tmp_path / "items.jsonl", rows)
    packed = gzip.compress((tmp_path / "items.jsonl").read_bytes(), mtime=0)
    (tmp_path / "items.jsonl").unlink()
    (tmp_path / "items.jsonl.gz").write_bytes(packed)
    assert read_jsonl(tmp_path / "items.jsonl") == rows
    for damaged in (packed[:-9], b"\x1f\x8bnothing", packed[:20] + b"\0" * 20, b"[]"):
        (tmp_path / "items.jsonl.gz").write_bytes(damaged)
        with pytest.raises(PreskipError, match=r"items\.jsonl\.gz cannot be read: "):
            read_jsonl(tmp_path / "items.jsonl")
    write_jsonl(tmp_path / "items.jsonl", rows[:1])
    assert read_jsonl(tmp_path / "items.jsonl") == rows[:1]  # what is computed again goes before


def test_a_score_that_is_not_finite_names_its_line(tmp_path):
    rows = [{"id": "a", "scores": {"nll": 1.0}}, {"id": "b", "scores": {"nll": float("nan")}}]
    with pytest.raises(PreskipError, match="line 2: nll is nan"):
        files.write_jsonl(tmp_path / "items.jsonl", rows)
    assert not list(tmp_path.iterdir())

"""Copy of a run that is small enough to keep: no weights, items compressed, no paths of this machine.

    python benchmarks/keep_run.py runs/confirmatory/smollm2-wikitext2 results/confirmatory-smollm2-wikitext2
    python benchmarks/keep_run.py --unfinished runs/confirmatory/gemma-3-270m-books24 elsewhere/gemma-3-270m-books24

`preskip report`, `compare` and `power` read the copy as they read the run, and `preskip probe --resume COPY` finishes
it or adds seeds, on any machine: what is trained and scored is not repeated. Called again it replaces the copy, unless
the copy has something that the run lacks.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.runs.directory import RunDirectory
from preskip.runs.files import write_json

PLAIN = (
    "results.json",
    "arch.json",
    "arms/*/*/cell.json",
    "arms/*/*/train.jsonl",
    "controls/*/*/*/*.json*",
    "controls/*.json",
)
PLAIN += ("search/**/search.json", "search/**/trial.json", "search/**/train.jsonl")  # one for all seeds, or for each
PLAIN += ("arms/*/*/items.jsonl.gz",)  # of a copy that was resumed
COMPRESSED = ("arms/*/*/items.jsonl",)


def keep(run: RunDirectory, target: Path, *, unfinished: bool = False) -> None:
    """Write the copy.

    Args:
        run: of `preskip probe` or `preskip pretrain`.
        target: the folder of the copy.
        unfinished: take a run that was interrupted, too.

    Raises:
        PreskipError: the run is not finished, a process is working on it, or at `target` is the run itself, something
            that is no copy of a run, or a copy with more in it than the run has.
    """
    with run.lock():
        _copy(run, target, unfinished)


def _copy(run: RunDirectory, target: Path, unfinished: bool) -> None:
    manifest = run.manifest
    if manifest.get("status") != "finished" and not unfinished:
        raise PreskipError(f"{run.path} is not finished: finish it with --resume {run.path}, or give --unfinished")
    if target.resolve() == run.path.resolve():
        raise PreskipError(f"{target} is the run itself: choose another place")
    if not target.exists():
        _write(run, target)
        return
    if not (target / "run.json").is_file() or RunDirectory.open(target).manifest["directory"] != ".":
        raise PreskipError(f"{target} exists and is no such copy: choose another place")
    with RunDirectory.open(target).lock():
        if lost := _done(target) - _done(run.path):
            raise PreskipError(f"{target} has {min(lost)}, which {run.path} lacks: choose another place")
        _write(run, target)


def _done(folder: Path) -> set[Path]:
    """What a run has finished: cells and searches."""
    return {path.relative_to(folder).parent for name in ("cell", "trial") for path in folder.rglob(f"{name}.json")}


def _write(run: RunDirectory, target: Path) -> None:
    """Write the copy beside its place, then put it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    manifest: Any = run.manifest
    for part in ("model", "tokenizer"):
        if source := manifest.get(part, {}).get("source"):
            manifest[part]["source"] = re.sub(r"^(GGUF file|local folder) .*/(?=.)", r"\1 ", source)
    command = list(manifest["command"])
    kept = f"runs/{target.name}"
    if "--out" in command:
        command[command.index("--out") + 1] = kept
    command = [f"--out={kept}" if word.startswith("--out=") else word for word in command]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        new = Path(folder) / target.name
        new.mkdir()
        write_json(new / "run.json", {**manifest, "command": command, "directory": "."})
        for pattern in PLAIN + COMPRESSED:
            for source in run.path.glob(pattern):
                place = new / source.relative_to(run.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                if pattern in COMPRESSED:
                    place.with_name(f"{place.name}.gz").write_bytes(gzip.compress(source.read_bytes(), mtime=0))
                else:
                    shutil.copy(source, place)
        if target.exists():
            target.rename(Path(folder) / "old")
        new.rename(target)


def main() -> int:
    """Copy, or say why not in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--unfinished", action="store_true", help="take a run that was interrupted, too")
    options = parser.parse_args()
    try:
        keep(RunDirectory.open(options.run), options.target, unfinished=options.unfinished)
    except PreskipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

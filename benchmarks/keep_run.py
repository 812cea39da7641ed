"""Copy of a finished run that is small enough to keep: no weights, items compressed, no paths of this machine.

    python benchmarks/keep_run.py runs/confirmatory/smollm2-wikitext2 results/confirmatory-smollm2-wikitext2

`preskip report`, `compare` and `power` read the copy as they read the run. Called again it replaces the copy.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from pathlib import Path

from preskip.errors import PreskipError
from preskip.runs.directory import RunDirectory
from preskip.runs.files import write_json

PLAIN = ("results.json", "arms/*/*/cell.json", "arms/*/*/train.jsonl", "controls/*/*/*/*.json*", "controls/*.json")
PLAIN += ("search/*/*/search.json", "search/*/*/*/*/trial.json", "search/*/*/*/*/train.jsonl")
COMPRESSED = ("arms/*/*/items.jsonl",)


def keep(run: RunDirectory, target: Path) -> None:
    """Write the copy.

    Raises:
        PreskipError: the run is not finished, or at `target` is something that is no copy of a run.
    """
    manifest = run.manifest
    if manifest.get("status") != "finished":
        raise PreskipError(f"{run.path} is not finished: finish it with --resume {run.path}")
    if manifest["directory"] == ".":
        raise PreskipError(f"{run.path} is such a copy itself: give the run, or copy the folder")
    if target.exists():
        if not (target / "run.json").is_file() or RunDirectory.open(target).manifest["directory"] != ".":
            raise PreskipError(f"{target} exists and is no such copy: choose another place")
        shutil.rmtree(target)
    target.mkdir(parents=True)
    command = list(manifest["command"])
    if "--out" in command:
        command[command.index("--out") + 1] = f"runs/{target.name}"
    write_json(target / "run.json", {**manifest, "command": command, "directory": "."})
    for pattern in PLAIN + COMPRESSED:
        for source in run.path.glob(pattern):
            place = target / source.relative_to(run.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if pattern in COMPRESSED:
                place.with_name(f"{place.name}.gz").write_bytes(gzip.compress(source.read_bytes(), mtime=0))
            else:
                shutil.copy(source, place)


def main() -> int:
    """Copy, or say why not in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    try:
        keep(RunDirectory.open(options.run), options.target)
    except PreskipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

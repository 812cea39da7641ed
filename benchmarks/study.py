"""The confirmatory study: `preskip probe --preset confirmatory` on every model and corpus, and one estimate over all.

    python benchmarks/study.py --out runs/confirmatory --models smollm2,./gemma-3-270m.gguf --corpora wikitext2,books24
    python benchmarks/study.py ... --minutes 9        # the same command goes on where it was (make gpu-study)
    python benchmarks/study.py ... -- --steps 200       # what follows -- goes to every probe that is not begun yet
    python benchmarks/study.py ... --seeds 1,2,3 -- --looks 3,5     # then --seeds 1,...,5 adds two to every run

Each probe is a process of its own with a run directory `OUT/MODEL-CORPUS`. One that was begun is resumed with the
options it has. Ctrl-C, SIGTERM and the end of the minutes interrupt the probe, which keeps all that is finished. After
the last one, every pair of arms is compared in each run and over all of them (`preskip compare --combine`).

Exit code: 0 when all is done, 3 when something is left to do, else that of the probe that failed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from preskip.data.splits import slug
from preskip.experiment.parse import parse_seeds
from preskip.runs.directory import RunDirectory

LEFT_TO_DO = 3


def main() -> int:
    """Run what is not finished, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/confirmatory"))
    parser.add_argument("--models", default="smollm2", help="names, ids or paths, separated by commas")
    parser.add_argument("--corpora", default="wikitext2,books24")
    parser.add_argument("--seeds", help="default: the preset's; more than a finished run has are added to it")
    parser.add_argument("--minutes", type=float, help="stop after so many; default: when all is done")
    parser.add_argument("more", nargs="*", metavar="-- OPTIONS", help="options of preskip probe")
    options = parser.parse_args()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pairs = [(model, corpus) for model in options.models.split(",") for corpus in options.corpora.split(",")]
    runs = {
        options.out / f"{slug(model.removesuffix('.gguf'))}-{slug(corpus)}": (model, corpus) for model, corpus in pairs
    }
    if len(runs) < len(pairs):
        parser.error("two of the models or corpora have one name: give each a study of its own (--out)")
    seeds = ["--seeds", options.seeds] if options.seeds else []
    for run, (model, corpus) in runs.items():
        begin = [model, "--preset", "confirmatory", "--corpus", corpus, "--out", str(run), *seeds, *options.more]
        for _ in range(2):  # a run that was begun is finished with the seeds that it has before any are added
            if (what := left_to_do(run, begin, seeds)) is None:
                break
            code = interruptible(["probe", *what], deadline)
            if code is None:
                print(f"stopped; {run} and what follows it go on with the same command", flush=True)
                return LEFT_TO_DO
            if code:
                return code
    if len(runs) > 1:
        return preskip(["compare", *map(str, runs), "--combine"]).wait()
    return 0


def left_to_do(run: Path, begin: Sequence[str], seeds: Sequence[str]) -> Sequence[str] | None:
    """What to call `preskip probe` with; None where a run is finished and has the seeds."""
    if not (run / "run.json").is_file():
        return begin
    if not is_finished(run):
        return ["--resume", str(run)]
    wanted = set(parse_seeds(seeds[1])) if seeds else set()
    return ["--resume", str(run), *seeds] if wanted - set(RunDirectory.open(run).manifest.get("seeds", ())) else None


def is_finished(run: Path) -> bool:
    """Whether a run has its results."""
    return (run / "run.json").is_file() and RunDirectory.open(run).manifest.get("status") == "finished"


def preskip(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command."""
    return subprocess.Popen([sys.executable, "-m", "preskip", *arguments])


def interruptible(arguments: Sequence[str], deadline: float | None) -> int | None:
    """The exit code of a command; None where the deadline or the user interrupted it."""
    process = preskip(arguments)
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()  # SIGINT is ignored by a child of a shell's `... &`
        process.wait()
        return None


if __name__ == "__main__":
    sys.exit(main())

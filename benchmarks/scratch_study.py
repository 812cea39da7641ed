"""The study from scratch: the published changes of a block beside preskip, each at its own rate, loss against cost.

    python benchmarks/scratch_study.py --out runs/scratch --archs llama-1m,llama-3m --corpus books --tokens 10.01M
    python benchmarks/scratch_study.py --minutes 9         # the same command goes on where it was
    python benchmarks/scratch_study.py -- --workers 2      # what follows -- goes to every preskip pretrain

For each architecture `OUT/ARCH/rate-R` trains arms at one rate, seed 0, on a share of the tokens. The rates are 3e-3,
its halves and doubles; an arm whose best has no worse one on either side is trained at the next beyond, too. Then
`OUT/ARCH/study` trains all arms on all tokens, each at its rate: the lowest point of the parabola through its best one
and both neighbours, the losses over the logarithm of the rate. `OUT/ARCH/speed` trains some steps of each, alone and in
turns, whatever --workers says: the study's times are its tokens over that speed. `OUT/ARCH/loss.svg` draws the loss
against weights, training FLOPs and time. A rate that diverges is the worst one; an arm that diverges at every rate is
left out, and a line says so. `OUT/ARCH/rates.json` has the loss at each rate, null where it diverged.

`benchmarks/scratch_report.py` prints what was found, for each architecture apart, here as its last step.

What is scored and declared (--eval-corpora, --primary, --looks ...) is the study's alone. Seeds that a finished study
lacks are added to it; any other option than it was begun with is refused.

Exit code: 0 when all is done, 3 when something is left to do, else that of the run that failed.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scratch_rates import FARTHEST, best, is_open, lowest, rate_of, tried, write_rates
from scratch_report import ARMS, SPEECHES, report
from study import LEFT_TO_DO, interruptible, left_to_do

from preskip.experiment.parse import parse_tokens
from preskip.report.load import load_json
from preskip.runs.directory import RunDirectory

# Of every training: a development loss of 256 sequences, four checkpoints of the shortest one, short logs.
EACH = {"--eval-blocks": "256", "--eval-steps": "100", "--log-steps": "10", "--save-steps": "100"}
# Of the trainings that choose a rate or measure the speed, which are not scored for a result.
UNSCORED = ["--eval-documents", "2"]
# What says how a run is executed and nothing of what it computes: a resume has to be told again.
EXECUTION = ("--workers", "--executor", "--ray-address")
# What is scored and declared.
SCORING = ("--eval-corpora", "--eval-documents", "--eval-words", "--primary", "--looks")
# Of the speed: tokens of a training, and seeds; for each all arms are trained in turn.
SPEED_TOKENS, SPEED_SEEDS = 131_072, "1,2,3"
# More steps than the speed's trainings have, and nothing that their times depend on.
UNTIMED = ("--warmup-steps",)
# Of the study: text of more than six speakers beside the few books, and `base-flops` may read on where the text ends.
STUDY = {"--eval-documents": "100", "--eval-words": "1000", "--eval-corpora": f"{SPEECHES}:50x400"}


def main() -> int:
    """Run what is not finished; print and draw what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scratch"))
    parser.add_argument("--archs", default="llama-1m,llama-3m")
    parser.add_argument("--arms", default=ARMS)
    parser.add_argument("--corpus", default="books")
    parser.add_argument("--tokens", default="10.01M", help="rounded to whole steps; these are at least 10M then")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--search", type=float, default=0.2, help="share of the tokens that a rate is chosen on")
    parser.add_argument("--minutes", type=float, help="stop after so many; default: when all is done")
    parser.add_argument("more", nargs="*", metavar="-- OPTIONS", help="options of preskip pretrain")
    options = parser.parse_args()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    for arch in options.archs.split(","):
        if code := study(options.out / arch, arch, options, deadline):
            return code
    return 0


def study(folder: Path, arch: str, options: argparse.Namespace, deadline: float | None) -> int:
    """The search and the study of one architecture; gives the exit code."""
    arms, tokens = options.arms.split(","), parse_tokens(options.tokens)
    execution, more = split(options.more, EXECUTION)
    scoring, more = split(more, SCORING)
    same = ["--arch", arch, "--corpus", options.corpus, *unless_given(EACH, more), *more]
    few = [*same, *UNSCORED, "--tokens", str(round(options.search * tokens)), "--seeds", "0"]
    losses: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for power in sorted(range(-FARTHEST, FARTHEST + 1), key=abs):
        waiting = [arm for arm in arms if is_open(losses[arm], power)]
        if not waiting:
            continue
        run, rate = folder / f"rate-{rate_of(power):g}", f"{rate_of(power):g}"
        given = [*few, "--arms", ",".join(waiting), "--lr", rate]
        if (code := train(run, given, deadline, execution=execution)) and not has_diverged(run):
            return code
        found = {} if has_diverged(run) else load_json(run / "results.json")["arms"]
        for arm in waiting:
            losses[arm][power] = found[arm]["final_eval_loss"] if arm in found else math.inf
    write_rates(folder, losses)
    for arm in [arm for arm in arms if math.isinf(losses[arm][best(losses[arm])])]:
        print(f"{arch}: {arm} is left out, it diverged at every rate that was tried: {tried(losses[arm])}", flush=True)
        arms.remove(arm)
    if not arms:
        return 1
    chosen = ["--arms", ",".join(arms)]
    chosen += [part for arm in arms for part in ("--lr", f"{arm}={rate_of(lowest(losses[arm])):g}")]
    whole = [*same, "--tokens", str(tokens), *chosen, *unless_given(STUDY, scoring), *scoring]
    if "--repeat" not in more:
        whole.append("--repeat")
    if {"preskip", "base-wide"} <= set(arms) and "--primary" not in flags(scoring) and scores_sotu(whole):
        whole += ["--primary", f"preskip:base-wide:{SPEECHES}"]  # the held-out books are too few for a verdict
    if code := train(folder / "study", whole, deadline, execution=execution, seeds=["--seeds", options.seeds]):
        return code
    timed = split(same, UNTIMED)[1]
    speed = [*timed, *UNSCORED, "--tokens", str(min(tokens, SPEED_TOKENS)), "--seeds", SPEED_SEEDS, *chosen]
    if code := train(folder / "speed", speed, deadline):
        return code
    report(folder, options.arms.split(","))
    return 0


def parsed(given: Sequence[str]) -> list[tuple[str, ...]]:
    """The options of a command line, each with its value where it has one: `--name value` and `--name=value`."""
    found: list[tuple[str, ...]] = []
    for word in given:
        if word.startswith("--"):
            found.append(tuple(word.split("=", 1)))
        elif found and len(found[-1]) == 1:
            found[-1] += (word,)
    return found


def split(given: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of these names, and the others."""
    options = parsed(given)
    return (
        [word for option in options if option[0] in names for word in option],
        [word for option in options if option[0] not in names for word in option],
    )


def scores_sotu(given: Sequence[str]) -> bool:
    """Whether the speeches are among the corpora that are scored."""
    corpora = [corpus for name, *value in parsed(given) if name == "--eval-corpora" for corpus in value[0].split(",")]
    return any(corpus.partition(":")[0] == SPEECHES for corpus in corpora)


def unless_given(defaults: Mapping[str, str], given: Sequence[str]) -> list[str]:
    """The options that the command line does not give."""
    return [part for flag, value in defaults.items() if flag not in flags(given) for part in (flag, value)]


def flags(given: Sequence[str]) -> set[str]:
    """The names of the options."""
    return {name for name, *_ in parsed(given)}


def has_diverged(run: Path) -> bool:
    """Whether every training of a run diverged; it has no results then."""
    return (run / "run.json").is_file() and RunDirectory.open(run).manifest.get("status") == "diverged"


def check_asked(run: Path, given: Sequence[str], free: Sequence[str]) -> None:
    """Refuse a run that was begun with other options: an arm that is not in it has not diverged there.

    Args:
        run: its directory.
        given: the options that it is to have.
        free: names of options that may be others.
    """
    if not (run / "run.json").is_file():
        return
    begun, asked = (values(split(every, free)[1]) for every in (RunDirectory.open(run).manifest["command"], given))
    for name in (*asked, *begun):
        if begun.get(name) != asked.get(name):
            had, wanted = (
                f"{name} {','.join(its[name])}".strip() if name in its else f"no {name}" for its in (begun, asked)
            )
            raise SystemExit(f"{run} was begun with {had}, not {wanted}: give another --out, or delete it")


def values(given: Sequence[str]) -> dict[str, list[str]]:
    """What every option is given, in any order."""
    found: dict[str, list[str]] = {}
    for name, *value in parsed(given):
        found[name] = sorted([*found.get(name, []), *(part for one in value for part in one.split(","))])
    return found


def train(
    run: Path, given: Sequence[str], deadline: float | None, *, execution: Sequence[str] = (), seeds: Sequence[str] = ()
) -> int:
    """Begin a run or go on with it, unless it is finished; gives the exit code.

    Args:
        run: its directory.
        given: its options, of which a run that was begun must have the same.
        deadline: when to interrupt it.
        execution: options that a resume takes, too.
        seeds: `--seeds` and their list, where more may be added to a finished run.
    """
    check_asked(run, given, ["--out", *EXECUTION, *seeds[:1]])
    if has_diverged(run):
        return 1
    for _ in range(2):  # a run that was begun is finished with the seeds that it has before any are added
        if (what := left_to_do(run, [*given, *seeds, "--out", str(run)], seeds)) is None:
            return 0
        code = interruptible(["pretrain", *what, *execution], deadline)
        if code is None:
            print(f"stopped; {run} and what follows it go on with the same command", flush=True)
            return LEFT_TO_DO
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

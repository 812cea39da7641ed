"""The study from scratch: the published changes of a block beside preskip, each at its own rate, loss against cost.

    python benchmarks/scratch_study.py --out runs/scratch --archs llama-1m,llama-3m --corpus books --tokens 10.01M
    python benchmarks/scratch_study.py --minutes 9         # the same command goes on where it was
    python benchmarks/scratch_study.py -- --workers 2      # what follows -- goes to every preskip pretrain
    python benchmarks/scratch_study.py --report --out results/peers --archs llama-1m     # of one that is finished

For each architecture `OUT/ARCH/rate-R` trains arms at one rate, seed 0, on a share of the tokens. The rates are 3e-3,
its halves and doubles; an arm whose best has no worse one on either side is trained at the next beyond, too. Then
`OUT/ARCH/study` trains all arms on all tokens, each at its rate: the lowest point of the parabola through its best one
and both neighbours, the losses over the logarithm of the rate. `OUT/ARCH/speed` trains some steps of each, alone and in
turns, whatever --workers says: the study's times are its tokens over that speed. `OUT/ARCH/loss.svg` draws the loss
against weights, training FLOPs and time. A rate that diverges is the worst one; an arm that diverges at every rate is
left out, and a line says so. `OUT/ARCH/rates.json` has the loss at each rate, null where it diverged.

What was asked of the peers before anything was trained (`QUESTIONS`) is printed with p-values corrected over them, for
each architecture apart, and beside it, exploratory (†), what the development loss says.

What is scored and declared (--eval-corpora, --primary, --looks ...) is the study's alone. Seeds that a finished study
lacks are added to it; any other option than it was begun with is refused.

Exit code: 0 when all is done, 3 when something is left to do, else that of the run that failed.
"""

from __future__ import annotations

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import altair as alt
from study import LEFT_TO_DO, interruptible, left_to_do

from preskip.errors import PreskipError
from preskip.experiment.parse import parse_tokens
from preskip.report.load import load_json
from preskip.report.lookup import find
from preskip.report.pictures import picture
from preskip.report.plots.base import POINT, Record, chart, colour, shape, shown_arms, specification, value_axis
from preskip.report.table import NONE
from preskip.report.words.verdicts import MINUS, difference_text, mean_difference_texts, p_text
from preskip.runs.directory import RunDirectory
from preskip.runs.files import read_json, write_json
from preskip.runs.schema import MetricValue, Results
from preskip.stats.equal_harm import mean_difference
from preskip.stats.families import holm

ARMS = "base,base-wide,base-flops,canon-a,canon,value-residual,value-embed,nonlinear-q,gated-attention,preskip"
ARMS += ",base-wide+canon-a,preskip+canon-a,preskip+canon,preskip+value-residual,preskip+value-embed"
ARMS += ",preskip+nonlinear-q,preskip+gated-attention"
# Arm and reference: does a peer help alone, with the weights that it has; beside the branch; and the branch beside it?
QUESTIONS = [(peer, "base") for peer in ("canon-a", "canon", "value-residual", "nonlinear-q", "gated-attention")]
QUESTIONS += [("value-embed", "base-wide")]
QUESTIONS += [(arm, "preskip") for arm in ARMS.split(",") if arm.startswith("preskip+")]
QUESTIONS += [("preskip+canon-a", "base-wide+canon-a")]
CENTRE = 3e-3
# Doubles of the centre that are tried on either side at most.
FARTHEST = 4
# Of every training: a development loss of 256 sequences, four checkpoints of the shortest one, short logs.
EACH = {"--eval-blocks": "256", "--eval-steps": "100", "--log-steps": "10", "--save-steps": "100"}
# Of the trainings that choose a rate or measure the speed, which are not scored for a result.
UNSCORED = ["--eval-documents", "2"]
# What says how a run is executed and nothing of what it computes: a resume has to be told again.
EXECUTION = ("--workers", "--executor", "--ray-address")
# Of the held-out texts the one with speakers enough for a verdict.
SPEECHES = "sotu"
# What is scored and declared.
SCORING = ("--eval-corpora", "--eval-documents", "--eval-words", "--primary", "--looks")
# Of the speed: tokens of a training, and seeds; for each all arms are trained in turn.
SPEED_TOKENS, SPEED_SEEDS = 131_072, "1,2,3"
# More steps than the speed's trainings have, and nothing that their times depend on.
UNTIMED = ("--warmup-steps",)
# Of the study: text of more than six speakers beside the few books, and `base-flops` may read on where the text ends.
STUDY = {"--eval-documents": "100", "--eval-words": "1000", "--eval-corpora": f"{SPEECHES}:50x400"}
COSTS = {
    "parameters": "Weights",
    "training_flops": "Training FLOPs",
    "seconds": "Seconds of a training",
}


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
    parser.add_argument("--report", action="store_true", help="draw and print what is finished, train nothing")
    parser.add_argument("--minutes", type=float, help="stop after so many; default: when all is done")
    parser.add_argument("more", nargs="*", metavar="-- OPTIONS", help="options of preskip pretrain")
    options = parser.parse_args()
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    for arch in options.archs.split(","):
        if options.report:
            try:
                report(options.out / arch, arch, options.arms.split(","))
            except PreskipError as error:
                parser.error(str(error))
        elif code := study(options.out / arch, arch, options, deadline):
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
    write_json(folder / "rates.json", {
        arm: {f"{rate_of(power):g}": loss if math.isfinite(loss) else None for power, loss in sorted(found.items())}
        for arm, found in losses.items()
    })  # fmt: skip
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
    report(folder, arch, options.arms.split(","))
    return 0


def report(folder: Path, arch: str, arms: Sequence[str]) -> None:
    """Draw what a finished study of one architecture found, and print its tables.

    Args:
        folder: has its `study`, `speed` and `rates.json`.
        arch: the architecture.
        arms: that were asked for, those that were left out included.
    """
    results, alone = (load_json(folder / name / "results.json") for name in ("study", "speed"))
    rows = records(results, alone)
    (folder / "loss.svg").write_text(draw(rows), encoding="utf-8")
    print(f"{arch}, {folder / 'loss.svg'}\n\n{table(rows, results, rates_tried(folder))}\n", flush=True)
    if answered := questions(results, arms):
        print(f"{answered}\n", flush=True)
    for note in results.get("notes", ()):
        print(note, flush=True)


def rates_tried(folder: Path) -> dict[str, dict[int, float]]:
    """The loss of every arm at each power of two that its rate was tried at; infinite where it diverged."""
    return {
        arm: {
            round(math.log2(float(rate) / CENTRE)): math.inf if loss is None else loss for rate, loss in found.items()
        }
        for arm, found in read_json(folder / "rates.json").items()
    }


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


def rate_of(power: float) -> float:
    """The rate so many doublings from the centre."""
    return float(f"{CENTRE * 2**power:.3g}")


def best(losses: Mapping[int, float]) -> int:
    """The power of the lowest loss; of rates that diverged the lowest rate is the one to go on from."""
    return min(losses, key=lambda power: (losses[power], power))


def lowest(losses: Mapping[int, float]) -> float:
    """The power at the lowest point of the parabola through the best and its neighbours, at most half of one from it.

    The best itself where a neighbour diverged or was not tried.
    """
    middle = best(losses)
    below, here, above = (losses.get(middle + step, math.inf) for step in (-1, 0, 1))
    curvature = below - 2 * here + above
    if not 0 < curvature < math.inf:
        return middle
    return middle + (below - above) / (2 * curvature)


def tried(losses: Mapping[int, float]) -> str:
    """The rates that were tried, which of them diverged, and whether the best is the last that may be tried."""
    rates = (f"{rate_of(power):g}" + (" (diverged)" if math.isinf(losses[power]) else "") for power in sorted(losses))
    last = best(losses)
    return ", ".join(rates) + (" (best at the end)" if abs(last) == FARTHEST and math.isfinite(losses[last]) else "")


def is_open(losses: Mapping[int, float], power: int) -> bool:
    """Whether a rate is to be tried: the centre and its neighbours, then what is beyond a best one at the edge."""
    return abs(power) <= 1 or best(losses) == power - (1 if power > 0 else -1)


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


def records(results: Results, alone: Results) -> list[Record]:
    """An arm each: its costs, and its loss on development documents over the seeds.

    Args:
        results: of the study.
        alone: of the trainings that measure the speed.
    """
    rows = []
    for arm, summary in results["arms"].items():
        curves = results["curves"][arm].values()
        losses = [points[-1]["eval_loss"] for points in curves]
        speed = alone["arms"][arm]["tokens_per_second"]
        assert speed  # every arm is trained
        rows.append(
            {
                "arm": arm,
                **{key: summary[key] for key in ("parameters", "training_flops", "learning_rate")},
                "seconds": summary["tokens"] / speed,
                "seeds": len(losses),
                "loss": statistics.fmean(losses),
                "low": min(losses),
                "high": max(losses),
            }
        )
    return rows


def draw(rows: Sequence[Record]) -> str:
    """Loss against weights, FLOPs and time: means over seeds, lines from the lowest to the highest."""
    arms = [row["arm"] for row in rows]
    figures = []
    for key, title in COSTS.items():
        x = alt.X(
            f"{key}:Q", title=title, scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(format="~s", tickCount=5)
        )
        legend = shown_arms(arms, rows, 110)
        legend.columns = 6  # 17 arms in one row are twice as wide as the panels
        base = chart(rows).encode(x=x, color=colour(arms, legend))
        loss, low = (value_axis(field, "Development loss, nats per token", zero=False) for field in ("loss", "low"))
        marks = base.mark_point(size=160, **POINT).encode(y=loss, shape=shape(arms, legend))
        layers = [base.mark_rule(strokeWidth=2).encode(y=low, y2="high:Q"), marks]
        figures.append({"title": title, "spec": specification(layers, height=320)})
    return picture(figures, columns=len(figures), shared=True)


def table(rows: Sequence[Record], results: Results, losses: Mapping[str, Mapping[int, float]]) -> str:
    """The same in Markdown, the lowest loss first, with the rates that were tried and what held-out text takes."""
    sets = [name for name, described in results["sets"].items() if described["kind"] == "document"]
    headings = ["arm", "lr, from those tried", "weights", "PFLOP", "seconds", "seeds", "loss, lowest to highest"]
    headings += [f"{name}, bits per byte [95 %]" for name in sets]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in sorted(rows, key=lambda row: row["loss"]):
        cells = (
            f"`{row['arm']}`",
            f"{row['learning_rate']:g} from {tried(losses[row['arm']])}",
            f"{row['parameters']:,}",
            f"{row['training_flops'] / 1e15:.3g}",
            f"{row['seconds']:.0f}",
            f"{row['seeds']}",
            f"{row['loss']:.4f}, {row['low']:.4f} to {row['high']:.4f}",
            *map(limits, (results["arms"][row["arm"]]["metrics"][name].get("bits_per_byte") for name in sets)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def questions(results: Results, arms: Sequence[str]) -> str:
    """The questions about these arms, on the speeches, in Markdown; "" where none can be answered.

    A question whose arm was left out, as it diverged, counts as p = 1: the family does not shrink after the fact.
    """
    asked = [pair for pair in QUESTIONS if {*pair} <= {*arms}] if SPEECHES in results["sets"] else []
    found = [find(results, *pair, SPEECHES) for pair in asked]
    p_values = [1.0 if pair is None or pair["p_value"] is None else pair["p_value"] for pair in found]
    if not any(found):
        return ""
    lines = [f"| asked before training, {SPEECHES} | seeds | difference [95 %] | p after Holm over {len(asked)} |"]
    lines[0] += " development loss, nats [95 %] †|"
    lines.append("|---" * 5 + "|")
    for (arm, reference), pair, p in zip(asked, found, holm(p_values), strict=True):
        if pair is None:
            lines.append(f"| `{arm}` {MINUS} `{reference}` | – | not trained | 1 | – |")
            continue
        shown = difference_text(pair)
        names = f"`{pair['arm']}` {MINUS} `{pair['reference']}`"
        found_loss = development(results, pair["arm"], pair["reference"])
        row = (names, pair["seeds"], f"{shown['value']} {shown['interval']}", p_text(p), found_loss)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def development(results: Results, arm: str, reference: str) -> str:
    """The difference of two arms' last development losses and Student's interval over seeds: exploratory, since rates
    were chosen on these blocks and no other text is in the interval; "–" for fewer than two seeds.
    """
    losses = [
        {seed: points[-1]["eval_loss"] for seed, points in results.get("curves", {}).get(one, {}).items()}
        for one in (arm, reference)
    ]
    value, limits, _ = mean_difference_texts(mean_difference(*losses))
    return value if value == NONE else f"{value} {limits}"


def limits(found: MetricValue | None) -> str:
    """A value and its interval."""
    return "–" if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    sys.exit(main())

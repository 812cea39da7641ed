"""How long a run takes: by a measured step at first, by what is done as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from preskip.arms import resolve_arms
from preskip.experiment.frozen import Frozen
from preskip.experiment.prepared import Prepared
from preskip.experiment.scratch import Scratch
from preskip.experiment.search import GRID, rungs, searched_seeds
from preskip.progress import about
from preskip.train.keep import kept_per_step
from preskip.train.speed import synchronise

# Work is counted in tokens that are read once; training reads each and goes back through twice the arithmetic.
TRAINING = 3
# Trainings of a search for a learning rate, by rung; `--lr-rule frontier` usually has one more on the last.
FULL_SEARCH = (len(GRID), -(-len(GRID) // 2) + 2)
LATER_SEARCH = (0, 3)
# Of the work: what has to be done before its own pace is believed.
FIRST_SHARE = 0.05


class Outlook:
    """What is left of a run, in seconds.

    Args:
        work: tokens read, by part of the run ("search", "later search", "cell", "control"), one number for each of its
            steps.
        token_seconds: seconds per token read, measured; None where nothing was measured.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        work: dict[str, list[float]],
        token_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.work, self.token_seconds, self.clock = work, token_seconds, clock
        self.started, self.total, self.finished = clock(), sum(map(sum, work.values())), 0.0

    def left(self) -> float | None:
        """Seconds left: by the measured step, and by the pace so far once enough is done to tell it; None without
        either. What is done first is small (the untouched model), and the start of the workers is in its time.
        """
        is_told = self.finished > 0 and (self.token_seconds is None or self.finished >= FIRST_SHARE * self.total)
        pace = (self.clock() - self.started) / self.finished if is_told else self.token_seconds
        return None if pace is None else pace * (self.total - self.finished)

    def done(self, what: str, index: int) -> str:
        """Note that a step is done, and say what is left, such as ", about 12 min left"."""
        steps = self.work.get(what, [])
        self.finished += steps[index] if index < len(steps) else 0.0
        left = self.left()
        return f", {about(left)} left" if left and self.finished < self.total else ""


def outlook(prepared: Prepared, cells: Sequence[tuple[str, int]], token_seconds: float | None) -> Outlook:
    """The work of a run: its search, the cells that are still to be computed, its controls."""
    config, heldout = prepared.config, prepared.heldout
    scored = heldout.scored_tokens

    def training(arm: str) -> float:
        if not prepared.arms[arm].trains:
            return 0.0
        plan = prepared.plans[arm] if isinstance(prepared, Scratch) else None
        if plan:
            return TRAINING * plan.tokens
        kept = (TRAINING + 1) * kept_per_step(config.batch_size) / config.batch_size if config.keep_weight else 0
        return (TRAINING + kept) * config.steps * config.batch_size * config.seq_len

    work: dict[str, list[float]] = {"cell": [training(arm) + scored for arm, _ in cells]}
    if isinstance(prepared, Frozen):
        first, *later = searched_seeds(prepared)
        # A full search adds both neighbours of the best to the grid, a later one is a rate and its neighbours.
        for what, seeds, trials in (("search", [first], FULL_SEARCH), ("later search", later, LATER_SEARCH)):
            trials = (*trials[:-1], trials[-1] + (config.lr_rule == "frontier"))
            share = sum(count * rung for count, rung in zip(trials, rungs(config), strict=True))
            work[what] = [
                0.0
                if prepared.run.search_file(arm, seed).is_file()
                else share * training(arm) + sum(trials) * heldout.development_tokens
                for seed in seeds
                for arm in config.tuned_arms
            ]
        arms = [arm.name for arm in resolve_arms(config.arms) if arm.trains]
        again = len({"shuffled"} & {*config.nulls}) + config.equal_step
        work["control"] = [again * training(arms[0]) if arms else 0.0, 3.0 * scored * config.dtype_audit]
    return Outlook(work, token_seconds)


def measured_token(prepared: Prepared, facts: Any) -> float | None:
    """Seconds per token read, by a forward and a backward pass of the first arm that trains; None where none does.

    The weights that are made for it are thrown away, and the random state is as before.
    """
    config = prepared.config
    arm = next((arm for arm in config.arms if prepared.arms[arm].trains), None)
    if arm is None:
        return None
    device, own = torch.device(config.device), facts["arms"][arm]
    shape = (min(2, config.micro_batch), config.seq_len)
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    mixed = own["compute_dtype"] != own["base_dtype"].split(",")[0]  # of a quantised base what is not its matrices
    with torch.random.fork_rng(devices=devices), prepared.build(arm, config.seeds[0]) as built:
        model: Any = built.model
        ids = torch.arange(shape[0] * shape[1], device=device).view(shape) % model.get_input_embeddings().num_embeddings
        seconds = 0.0
        for _ in range(2):  # the first makes what later ones find
            started = time.perf_counter()
            with torch.autocast(device.type, getattr(torch, config.dtype), enabled=mixed):
                # With a cache, as most configurations have it: such a pass reuses nothing of frozen layers.
                loss = model(input_ids=ids, labels=ids, use_cache=True).loss
            loss.backward()
            synchronise(device)
            seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
    return seconds / (TRAINING * ids.numel())


def plan_text(prepared: Prepared, cells: Sequence[tuple[str, int]], facts: Any) -> str:
    """What is computed, in one line."""
    config = prepared.config
    arms = [arm for arm in config.arms if prepared.arms[arm].trains]
    parts = [f"{_count(len(cells), 'cell')} to compute: {', '.join(arms)} with {_count(len(config.seeds), 'seed')}"]
    if isinstance(prepared, Frozen):
        tuned = config.tuned_arms
        each = ", for each seed" if len(config.seeds) > 1 else ""
        parts += [f"a search for the learning rate of {_count(len(tuned), 'arm')}{each}"] if tuned else []
        controls = [*config.nulls, *(["equal steps"] if config.equal_step else [])]
        controls += ["dtypes"] if config.dtype_audit else []
        parts += [f"controls: {', '.join(controls)}"] if controls else []
    return f"plan: {'; '.join(parts)}; {_count(len(facts['family']['declared']), 'declared comparison')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

"""What the cells of a run share, prepared once per process, and what the two kinds of training have to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from preskip.arms import Arm
from preskip.arms.insert import Inserted
from preskip.experiment.heldout import Config, HeldOut
from preskip.progress import progress_bar
from preskip.runs import environment
from preskip.runs.attempt import check_same_inputs
from preskip.runs.directory import Cell, RunDirectory
from preskip.runs.schema import Facts, StepRow
from preskip.train.distributed import Crew

# Training text is shuffled in pieces of about this many characters, so that a short training sees many documents.
PIECE_CHARACTERS = 4000


@dataclass(kw_only=True)
class Prepared(ABC):
    """What the cells of a run share; its two subclasses are the two kinds of training.

    Attributes:
        run: the run directory.
        config: every option.
        tokenizer: of all arms.
        heldout: what is scored.
        quiet: no progress.
        crew: the processes that train together.
        options: the class of `config`.
        arms: what can be compared.
    """

    options: ClassVar[type[Config]]
    arms: ClassVar[Mapping[str, Arm]]

    run: RunDirectory
    config: Any
    tokenizer: Any
    heldout: HeldOut
    quiet: bool = True
    crew: Crew = field(default_factory=Crew)

    @classmethod
    @abstractmethod
    def prepare(cls, run: RunDirectory, config: Any, quiet: bool, crew: Crew) -> tuple[Prepared, Facts]:
        """Make what the run needs, as far as it is not there yet.

        Returns:
            What cells share, and the facts for run.json.

        Raises:
            PreskipError: anything that would fail later: models, corpora, budgets of all arms, sizes, tasks.
        """

    @classmethod
    def open(cls, run: RunDirectory, config: Any) -> Prepared:
        """What the cells of a run share, in a process that has not prepared it.

        Raises:
            PreskipError: something is missing or damaged, or the inputs are not those of the run's main process: a data
                set that has changed since, or another machine's data directory.
        """
        prepared, facts = cls.prepare(run, config, True, Crew())
        check_same_inputs(run, facts, is_complete=True)  # of what is still to come the main process has made sure
        return prepared

    @abstractmethod
    def build(self, arm: str, seed: int) -> AbstractContextManager[Inserted]:
        """The model of an arm, its new weights drawn from the seed."""

    @abstractmethod
    def fit(self, built: Inserted, settings: dict[str, Any], **where: Any) -> list[StepRow]:
        """Train a built model.

        Args:
            built: of `build`.
            settings: steps, seed, rates and batches.
            where: arm, checkpoints, log and advance of `train_frozen` and `train_scratch`.

        Returns:
            The rows of the training log.
        """

    @abstractmethod
    def save(self, built: Inserted, cell: Cell) -> None:
        """Store the trained weights in a cell."""

    @abstractmethod
    def summarise(self, arm: str, rows: list[StepRow]) -> dict[str, Any]:
        """What cell.json says of a training."""

    @abstractmethod
    def measure(self, built: Inserted, label: str) -> dict[str, Any]:
        """What cell.json says of a trained model beside its scores."""

    def rate(self, arm: str, seed: int) -> float | None:
        """Peak learning rate of an arm, from run.json: as given, default or found for the seed; None where nothing is
        trained.
        """
        facts = self.run.manifest["arms"][arm]
        return facts.get("learning_rates", {}).get(str(seed), facts["learning_rate"])

    def train(
        self, built: Inserted, arm: str, seed: int, cell: Cell, label: str, *, rate: float | None = None,
        steps: int | None = None, **more: Any,
    ) -> list[StepRow]:  # fmt: skip
        """Train a built arm, with the other processes of the launch.

        Args:
            built: the arm's model.
            arm: its name.
            seed: of data order, dropout and initialisation.
            cell: where checkpoints and the log go.
            label: for the progress bar.
            rate: peak learning rate; None for the arm's own.
            steps: optimiser steps; None for the arm's own.
            more: fields of the settings that make it a control.
        """
        rate = self.rate(arm, seed) if rate is None else rate
        if steps is None:
            steps = self.run.manifest["arms"][arm].get("steps", self.config.steps)
        if self.crew.leads and more.get("control") != "noise":  # which takes no data, so there is nothing to share
            self.crew.announce({"arm": arm, "seed": seed, "cell": cell, "rate": rate, "steps": steps, **more})
        micro_batch = self.config.micro_batch
        settings = {"steps": steps, "seed": seed, "learning_rate": rate, "micro_batch_size": micro_batch, **more}
        where = {"arm": arm, "checkpoints": cell.checkpoints, "log": cell.train_log}
        with progress_bar(label, steps, quiet=self.quiet) as advance:
            return self.fit(built, settings, advance=advance, **where)


def started_in(run: RunDirectory) -> Path:
    """Where a run was started; relative paths that do not exist here are taken from there."""
    return Path(run.manifest.get("directory", "."))


def common_facts(config: Config, splits: Any, *, tokens: int, passes: float, documents: int) -> Facts:
    """What run.json says of the training corpus, the environment and the seeds, whatever the kind.

    Args:
        config: every option.
        splits: the training corpus.
        tokens: to train on.
        passes: how often the longest training reads them.
        documents: that the tokens come from.
    """
    return {
        "corpus": {
            "name": config.corpus,
            "training_documents": documents,
            "training_tokens": tokens,
            "training_passes": round(passes, 2),
            "development_documents": len(splits.development),
            "heldout_documents": len(splits.heldout),
            "source": splits.source,
            "sha256": splits.sha256,
        },
        "environment": environment.describe(config.device),
        "seeds": list(config.seeds),
    }

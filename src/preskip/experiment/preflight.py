"""What can be refused at once: names, data and the place of a run, looked at before torch is imported."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from preskip.assets import check_model
from preskip.data.corpus import check_corpus
from preskip.data.last_word import LAST_WORD
from preskip.data.local import data_directory
from preskip.data.splits import PUBLISHED, missing_file, no_data_directory, slug
from preskip.errors import PreskipError
from preskip.evaluate.task_names import check_tasks
from preskip.experiment.options import ExperimentConfig
from preskip.experiment.parse import check_primary, parse_extent
from preskip.experiment.probe_options import ProbeConfig
from preskip.runs.files import clear_disk_errors

# Less than this no run has room for: a small adapter, its log and its scores.
LEAST_FREE = 64 * 2**20


def check_experiment(config: ExperimentConfig) -> None:
    """`check_inputs` of all that a new run reads."""
    corpora = [config.corpus]
    corpora += [parse_extent(text, config.eval_documents, config.eval_words)[0] for text in config.eval_corpora]
    tasks = config.tasks if isinstance(config, ProbeConfig) else ()
    if config.primary[2:] and not tasks:  # a group of tasks has other names than its own
        sets = [*dict.fromkeys(map(slug, corpora)), *([LAST_WORD] if isinstance(config, ProbeConfig) else [])]
        check_primary(config.primary, sets)
    if isinstance(config, ProbeConfig):
        own = config.task_settings.include_path
        check_inputs(corpora, config.tasks, data_dir=config.data_dir, model=config.model, include_path=own)
    else:
        check_inputs(corpora, data_dir=config.data_dir)


def check_inputs(
    corpora: Sequence[str] = (),
    tasks: Sequence[str] = (),
    *,
    data_dir: Path | str | None = None,
    model: str | None = None,
    include_path: str | None = None,
    scored_only: bool = False,
) -> None:
    """Refuse what is not there, as far as it can be seen without reading it.

    Args:
        corpora: names of corpora.
        tasks: lm-eval tasks.
        data_dir: see `preskip.data.local.data_directory`.
        model: name of a model, or None.
        include_path: folder of the user's own tasks, or None.
        scored_only: nothing is trained on: of corpora only the held-out part is read.

    Raises:
        PreskipError: a path that does not exist, or an unknown name.
    """
    directory = data_directory(data_dir)
    if model is not None:
        check_model(model)
    for name in corpora:
        if name not in PUBLISHED or Path(name).exists():
            check_corpus(name)
        elif directory is None:
            raise no_data_directory(name)
        elif file := missing_file(name, directory, scored_only=scored_only):
            raise PreskipError(f"corpus {name}: {directory / file} is missing: `preskip data` says where to get it")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise PreskipError("tasks need lm-eval: pip install 'preskip[eval]'")
    if tasks:
        check_tasks(tasks, include_path)


def check_place(out: Path) -> None:
    """Refuse a run directory that cannot be made; what is tried leaves nothing behind.

    Raises:
        PreskipError: it exists, its parent cannot be written, or the disk is full.
    """
    if out.exists() or out.is_symlink():
        raise PreskipError(f"{out} exists already: choose another --out, or finish it with --resume {out}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    with clear_disk_errors(out):
        try:
            with tempfile.TemporaryDirectory(dir=parent, prefix=".preskip-"):
                pass
        except (FileNotFoundError, NotADirectoryError):
            raise PreskipError(f"no folder can be made in {parent}: choose another --out") from None
    check_space(parent, LEAST_FREE)


def needed_bytes(weights: Iterable[int | None], *, checkpoints: bool) -> float:
    """What the trained weights of a run take, and one checkpoint: weights, perhaps twice, and the optimiser's moments.

    Args:
        weights: how many each cell has, all float32.
        checkpoints: whether there are any.
    """
    sizes = [4.0 * (count or 0) for count in weights]
    return sum(sizes) + (4 * max(sizes, default=0.0) if checkpoints else 0.0)


def check_space(folder: Path, needed: float) -> None:
    """Refuse a disk on which so many bytes have no room.

    Raises:
        PreskipError: there are fewer.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PreskipError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB free, about {needed / 2**20:,.0f} MiB are needed: free "
            "some, or choose another --out"
        )

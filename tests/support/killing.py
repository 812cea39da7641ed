"""Children that die by SIGKILL at a chosen moment, and the work that they are killed at.

A moment is the n-th time that a child does a certain thing: opens, renames or removes a file of its folder, brings one
to the disk, writes tensors (it dies with half of the file written), takes an optimiser step, scores sequences. A server
that has imported everything forks the children, so that one costs well under a second.
"""

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from peft import get_peft_model
from torch.utils.data import Dataset

from preskip import PreskipConfig
from preskip.cli.main import main
from preskip.experiment import run as _run  # noqa: F401  imported by the server, once for all children
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.distributed import adapt_trainer
from preskip.train.frozen import train_frozen
from preskip.train.settings import TrainingSettings
from tiny_model import tiny_llama

# A thing that a child does, and the how manieth time.
Moment = tuple[str, int]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "shutil.rmtree": "rmtree"}


class Fate:
    """Counts what this process does in a folder, and ends it at its moment."""

    def __init__(self, folder: Path, moment: Moment | None) -> None:
        self.folder, self.moment = folder, moment
        self.counts: Counter[str] = Counter()

    def reached(self, kind: str, path: str | bytes | os.PathLike = "") -> bool:
        place = ""
        if path != "":
            full = Path(os.fsdecode(path))
            if not full.is_relative_to(self.folder):
                return False
            place = "/".join(full.relative_to(self.folder).parts[-2:])
            place = re.sub(r"\.([\w.]+?\.\w+)\.\w+\.tmp$", r"\1.tmp", place)
            place = re.sub(r"\.run\.\w+", "run.tmp", re.sub(r"-[0-9]+", "-N", place))
        label = f"{kind} {place}".strip()
        self.counts[label] += 1
        return (label, self.counts[label]) == self.moment

    def meet(self, kind: str, path: str | bytes | os.PathLike = "") -> None:
        if self.reached(kind, path):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[2] & WRITES:
            self.meet("open", arguments[0])
        elif event in AUDITED and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.meet(AUDITED[event], arguments[0])

    def watch(self) -> None:
        sys.addaudithook(self.audit)
        self._tear(torch, "save", 1)
        self._tear(safetensors.torch, "serialize_file", 1)
        self._count(os, "fsync", "fsync")
        self._count(torch.optim.AdamW, "step", "optimiser step")
        from preskip.evaluate import texts

        self._count(texts, "score_sequences", "score")

    def _tear(self, module: object, name: str, position: int) -> None:
        real = getattr(module, name)

        def write(*arguments, **options):
            path = arguments[position]
            torn = isinstance(path, (str, os.PathLike)) and self.reached(f"tear by {name}", path)
            real(*arguments, **options)
            if torn:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, write)

    def _count(self, owner: object, name: str, kind: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments, **options):
            self.meet(kind)
            return real(*arguments, **options)

        setattr(owner, name, counted)


def _live(
    work: Callable[[Path], None],
    folder: Path,
    moment: Moment | None,
    counts: Path | None,
    environment: dict[str, str],
) -> None:
    gc.freeze()  # else every training walks over what the server has imported
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(folder.with_suffix(".log"), "a")  # noqa: SIM115
    fate = Fate(folder, moment)
    fate.watch()
    work(folder)
    if counts is not None:
        counts.write_text(json.dumps(fate.counts))


def child(
    work: Callable[[Path], None],
    folder: Path,
    *,
    moment: Moment | None = None,
    counts: Path | None = None,
) -> int:
    """Let a child do the work in the folder; its exit code, negative where a signal ended it.

    Args:
        work: a function of a module in this folder.
        folder: where.
        moment: when it is killed; None: not.
        counts: where it leaves how often it did what.
    """
    process = _server().Process(target=_live, args=(work, folder, moment, counts, {}))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


DDP = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
FSDP = {
    **DDP,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def crew(
    work: Callable[[Path], None], folder: Path, launch: dict[str, str], *, moment: Moment | None = None
) -> list[int]:
    """Let two children that train together over gloo do the work; their exit codes.

    Under load gloo's own thread has crashed (torch 2.13, `pt_gloo_runloop` in malloc by the kernel's log, twice in many
    suites). That is no outcome of the work, which is then done once more from where it began, with a warning.

    Args:
        work: a function of a module in this folder.
        folder: where.
        launch: how they share it, `DDP` or `FSDP`.
        moment: when the first, which writes, is killed; the other one follows.
    """
    with tempfile.TemporaryDirectory() as place:
        before = Path(place) / "before"
        if folder.exists():
            shutil.copytree(folder, before)
        codes = _crew(work, folder, launch, moment)
        if moment is None and -signal.SIGSEGV in codes:
            warnings.warn(f"a process over gloo crashed, once more: {codes}", stacklevel=2)
            shutil.rmtree(folder)
            if before.exists():
                shutil.copytree(before, folder)
            codes = _crew(work, folder, launch, moment)
    return codes


def _crew(work: Callable[[Path], None], folder: Path, launch: dict[str, str], moment: Moment | None) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {**launch, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (work, folder, None if rank else moment, None, environment)
        processes.append(_server().Process(target=_live, args=arguments))
        processes[-1].start()
    connection.wait([process.sentinel for process in processes])
    for process, other in (processes, reversed(processes)):
        if process.exitcode:
            other.kill()  # it would wait for its partner
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def log(folder: Path) -> str:
    """The end of what the children of this folder have printed."""
    return folder.with_suffix(".log").read_text()[-3000:]


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it is to import there alone
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def moments(work: Callable[[Path], None], folder: Path) -> dict[str, int]:
    """What the work does, undisturbed, and how often; the folder then holds its outcome."""
    with tempfile.TemporaryDirectory() as elsewhere:
        counts = Path(elsewhere) / "counts.json"
        assert child(work, folder, counts=counts) == 0
        return json.loads(counts.read_text())


BLOCKS = np.random.default_rng(0).integers(2, 400, (12, 16)).astype(np.int32)


def frozen(folder: Path) -> None:
    """The probe's training: a branch with dropout on a frozen model, two micro-batches to a step."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper", init_std=0.1, dropout=0.2))
    settings = TrainingSettings(
        steps=7, batch_size=4, micro_batch_size=2, learning_rate=1e-2, seed=1, save_steps=2, equal_step=True
    )
    train_frozen(model, BLOCKS, settings, arm="preskip", checkpoints=folder / "checkpoints", log=folder / "train.jsonl")


class MappedBlocks(Dataset):
    """Blocks [N, seq_len] that stay on the disk."""

    def __init__(self, path: Path) -> None:
        self.blocks = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def crash_once(folder: Path) -> None:
    """The second of two leaves something and crashes, as gloo does; when it is done again both leave their rank."""
    rank, crashed = os.environ["RANK"], folder.with_suffix(".crashed")
    folder.mkdir(exist_ok=True)
    if rank == "1" and not crashed.exists():
        crashed.touch()
        (folder / "left").touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    (folder / rank).touch()


def scratch(folder: Path) -> None:
    """Training from scratch: all weights, shuffled epochs, evaluation, logs and checkpoints at different steps."""
    data = folder.parent / "blocks.npy"
    if not data.exists():
        np.save(data, BLOCKS)
    transformers.set_seed(3)
    trainer = ResumableTrainer(
        model=tiny_llama(attention_dropout=0.2),
        args=transformers.TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            logging_steps=3,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            save_total_limit=2,
            seed=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=MappedBlocks(data),
        eval_dataset=MappedBlocks(data),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    adapt_trainer(trainer)
    trainer.train(resume_from_checkpoint=True)


PROBE = ["--arms", "none,preskip", "--steps", "4", "--batch-size", "2", "--seq-len", "16", "--eval-documents", "4"]
PROBE += ["--eval-words", "30", "--last-word-items", "6", "--context-length", "32", "--save-steps", "1"]
PROBE += ["--device", "cpu", "--dtype", "float32", "--heldout-fraction", "0.4", "--lr", "tune", "--dropout", "0.1"]
PROBE += ["--development-documents", "2", "--development-words", "20", "--equal-step"]


def probe(folder: Path) -> None:
    """`preskip probe` on the model and the corpus beside the folder; `--resume` where there is a run already."""
    run, inputs = folder / "run", folder.parent
    if (run / "run.json").exists():
        arguments = ["--resume", str(run)]
    else:
        arguments = [str(inputs / "model"), "--corpus", str(inputs / "corpus.jsonl"), "--out", str(run), *PROBE]
    _main("probe", *arguments)


PRETRAIN = "--arch llama-1m --num-layers 2 --hidden-size 32 --heads 4 --kv-heads 2 --mlp-width 64 --set head_dim=8"
PRETRAIN += " --vocab-size 400 --seq-len 16 --batch-size 4 --tokens 256 --arms base,preskip --seeds 1 --device cpu"
PRETRAIN += " --dtype float32 --eval-steps 2 --eval-blocks 4 --eval-documents 3 --eval-words 30 --log-steps 1"


def pretrain(folder: Path) -> None:
    """`preskip pretrain` on the corpus beside the folder."""
    corpus, run = folder.parent / "corpus.jsonl", folder / "run"
    _main("pretrain", *PRETRAIN.split(), "--corpus", str(corpus), "--out", str(run))


def _main(*arguments: str) -> None:
    try:
        main(list(arguments))
    except SystemExit as stop:
        if stop.code:
            raise

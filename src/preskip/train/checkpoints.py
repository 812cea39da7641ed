"""Checkpoints that outlive a kill at any moment: sealed with checksums, verified before use, the last good one kept.

The trainer writes a checkpoint file by file. The seal, a list of all files with their sizes and SHA-256, is written
last, when everything else is on the disk; only then are older checkpoints removed. A folder without a seal was not
written to its end; one that does not match its seal is damaged.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints, sort_checkpoints

from preskip.adapter import base_model
from preskip.assets import file_sha256
from preskip.errors import PreskipError
from preskip.progress import say
from preskip.runs.files import clear_disk_errors, read_json, sync_tree, write_json
from preskip.train.trained import is_partly_frozen, read_rest, write_rest, write_trained

SEAL = "seal.json"
DAMAGED = "damaged-"


class ResumableTrainer(Trainer):
    """A `Trainer` that continues exactly: on CPU in fp32, stopped and resumed ends bit for bit as if never stopped.

    Its checkpoints are sealed (see `seal`), and `args.save_total_limit` is applied after the new one is sealed: give 2
    or more, so that there is one to fall back on. Beyond `Trainer` a checkpoint keeps every trained weight under its
    module name (`preskip.train.trained`), and the losses since the last log, so that logging and saving need not fall
    together. Of a model that is frozen in part it keeps the trained weights alone; `save_model` writes all.
    `state.log_history` is part of the checkpoint: what a callback adds to its last row in `on_log` comes back with it,
    and never runs ahead of the weights.

    In a distributed run the main process alone seals, verifies and removes; the processes agree on what to resume from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Trainer knows by a class's name that labels are shifted, and takes GPT-2 to predict first tokens, too.
        self._loss_shifts_labels = True
        self.resumed_from: Path | None = None
        self.add_callback(_Restore(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As `Trainer.train`, with verified checkpoints.

        Args:
            resume_from_checkpoint: True for the newest good checkpoint of `args.output_dir`, or from the start where
                there is none; a folder for that very checkpoint.
            trial: as in `Trainer.train`.
            ignore_keys_for_eval: as in `Trainer.train`.

        Raises:
            PreskipError: the given folder is not a whole checkpoint.
        """
        checkpoint = [self._verified(resume_from_checkpoint) if self.is_world_process_zero() else None]
        broadcast_object_list(checkpoint)
        self.resumed_from = checkpoint[0]
        if self.resumed_from is not None:
            self.args.eval_on_start = False  # done, and logged, before the checkpoint
        resumed = None if self.resumed_from is None else str(self.resumed_from)
        return super().train(resumed, trial, ignore_keys_for_eval)

    def _verified(self, asked: str | bool | None) -> Path | None:
        if not isinstance(asked, str):
            return last_good_checkpoint(Path(str(self.args.output_dir))) if asked else None
        fault = find_fault(Path(asked))
        if fault is not None:
            raise PreskipError(f"checkpoint {asked} cannot be used ({fault}): give another one")
        return Path(asked)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As `Trainer.compute_loss`, reported without the router's term of a mixture of experts.

        The gradient is that of the whole loss; its value, which is logged and evaluated, is the language model's.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if getattr(outputs, "aux_loss", None) is not None:
            base = base_model(self.accelerator.unwrap_model(model))
            given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            size = base.config.get_text_config().vocab_size
            with torch.no_grad():
                plain = base.loss_function(outputs.logits, inputs["labels"], vocab_size=size, **given)
            if given and self.args.average_tokens_across_devices:  # as Trainer scales its own
                plain = plain * self.accelerator.num_processes
            loss = loss + (plain - loss.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the mean loss of the whole training counts the steps before a resume, too."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # The trainer itself would remove the older checkpoints before the new one is known to be whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                checkpoint.mkdir(parents=True, exist_ok=True)  # else the best one is not noted where FSDP shards it
                (checkpoint / SEAL).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(checkpoint)
        except BaseException:
            shutil.rmtree(checkpoint, ignore_errors=True)  # a full disk gets back what half a checkpoint takes
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        model, is_checkpoint = self._plain_model, folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.is_fsdp_enabled:  # which keeps module names
            super()._save(output_dir, state_dict)
            return
        if is_checkpoint and is_partly_frozen(model) and not isinstance(model, PeftModel):  # whose own file is small
            if self.args.should_save:
                write_trained(folder, model, state_dict or model.state_dict())
        else:
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_rest(folder, model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            read_rest(Path(resume_from_checkpoint), self._plain_model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """No word of frozen weights that a checkpoint does not hold; `read_rest` refuses it without a trained one."""

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        if not self.is_fsdp_enabled and best.is_dir():
            read_rest(best, self._plain_model)

    @property
    def _plain_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        losses = {
            "since_log": str(self._tr_loss.item()),  # as text: it may be NaN, which the next log will tell
            "logged": str(self._total_loss_scalar),
            "logged_step": self._globalstep_last_logged,
        }
        write_json(Path(output_dir) / self._loss_file, losses)

    @property
    def _loss_file(self) -> str:
        return f"losses_{self.args.process_index}.json"


class _Restore(TrainerCallback):
    """Gives a resumed trainer back what `Trainer` itself forgets; the losses are there only for a process of before."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, checkpoint = self.trainer, self.trainer.resumed_from
        if checkpoint is None:
            return
        if state.best_global_step:  # stored as a path, which another working directory does not have
            best = checkpoint.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None
        if (checkpoint / trainer._loss_file).is_file():
            losses = read_json(checkpoint / trainer._loss_file)
            trainer._tr_loss.fill_(float(losses["since_log"]))
            trainer._total_loss_scalar = float(losses["logged"])
            trainer._globalstep_last_logged = int(losses["logged_step"])


def last_good_checkpoint(folder: Path, *, quiet: bool = False) -> Path | None:
    """The newest whole checkpoint, or None; bad ones that are newer are put out of the way, with one line on stderr.

    A checkpoint that was not written to its end is removed; a damaged one stays as `damaged-checkpoint-N`. Nobody else
    may be writing checkpoints to the folder.

    Args:
        folder: where the trainer's checkpoints are; need not exist.
        quiet: no message.
    """
    told = []
    good = None
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        fault = find_fault(checkpoint)
        if fault is None:
            good = checkpoint
            break
        if (checkpoint / SEAL).is_file():
            aside = checkpoint.with_name(DAMAGED + checkpoint.name)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            told.append(f"{checkpoint.name} is damaged ({fault}) and set aside as {aside.name}")
        else:
            shutil.rmtree(checkpoint)
            told.append(f"{checkpoint.name} was not written to its end and is removed")
    if told:
        onward = f"goes on from {good.name}" if good else "starts anew"
        say(f"{folder}: {'; '.join(told)}; training {onward}", quiet=quiet)
    return good


def seal(checkpoint: Path) -> None:
    """Bring every file of a checkpoint, also in its folders, to the disk, then list sizes and checksums in `seal.json`.

    Raises:
        PreskipError: the disk is full.
    """
    with clear_disk_errors(checkpoint):
        sync_tree(checkpoint)
        names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
        write_json(checkpoint / SEAL, {"files": {name: _fingerprint(checkpoint / name) for name in names}})


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None where every file is as it was sealed."""
    if not (checkpoint / SEAL).is_file():
        return "it was not written to its end" if checkpoint.is_dir() else "it does not exist"
    try:
        files = read_json(checkpoint / SEAL)["files"]
        for name, sealed in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != sealed["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {sealed['bytes']:,}"
            if _fingerprint(path) != sealed:
                return f"{name} has another checksum than when it was written"
    except (PreskipError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    except OSError as error:
        return str(error)
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

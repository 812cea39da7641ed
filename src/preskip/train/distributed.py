"""Several processes for one training, as `torchrun` or `accelerate launch` start them: what Trainer leaves open.

The first process, the main one, runs the command as if it were alone: it prints, scores and writes. The others follow:
they wait until it announces a training, take part in it, and wait again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.errors import PreskipError

if TYPE_CHECKING:
    from torch import nn

# A follower waits for the next training while the main process scores, and scoring may take days.
PATIENCE = timedelta(days=14)
# How gloo and NCCL say that another process is no more.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "NCCL communicator was aborted")


def world_size() -> int:
    """Number of processes that train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes; true without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def share_batch(batch_size: int, micro_batch_size: int) -> tuple[int, int]:
    """How the processes share the sequences of one optimiser step.

    Args:
        batch_size: sequences per optimiser step, over all processes.
        micro_batch_size: sequences per forward pass of a process, at most.

    Returns:
        Sequences per forward pass of each process, and forward passes per optimiser step.

    Raises:
        PreskipError: the processes cannot have equal shares.
    """
    processes = world_size()
    if batch_size % processes:
        raise PreskipError(
            f"{processes} processes cannot share a batch of {batch_size} sequences evenly: give a --batch-size that is "
            f"a multiple of {processes}, or start another number of processes"
        )
    share = batch_size // processes
    micro = min(micro_batch_size, share)
    if share % micro:
        raise PreskipError(
            f"--micro-batch-size {micro} does not divide the {share} sequences that each of {processes} processes has "
            f"of a batch of {batch_size}"
        )
    return micro, share // micro


class Crew:
    """The processes of one launch: the main one leads, the others follow. Without a launcher there is nobody to lead.

    Args:
        device: "cpu" or "cuda", where the models are; None joins nobody.
    """

    def __init__(self, device: str | None = None) -> None:
        self._group: Any = None
        if device is None or world_size() == 1:
            return
        from accelerate import PartialState
        from torch import distributed

        PartialState(cpu=device == "cpu")
        # Waiting goes over gloo: it costs no device time, and has its own patience.
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def leads(self) -> bool:
        """Whether this process has others to lead."""
        return self._group is not None and is_main()

    def announce(self, task: Any) -> None:
        """Main process: tell the others what to do next, once all of them have done what they were told before.

        Raises:
            PreskipError: one of them has ended.
        """
        if self.leads:
            self._exchange([task])

    def dismiss(self) -> None:
        """Main process: let the others end. Where it fails instead, the launcher ends them."""
        self.announce(None)
        self._leave()

    def tasks(self) -> Iterator[Any]:
        """The other processes: what the main one announces, until it dismisses them or is no more."""
        while True:
            box = [None]
            self._exchange(box)
            if box[0] is None:
                self._leave()
                return
            yield box[0]

    def _exchange(self, box: list[Any]) -> None:
        from torch import distributed

        with _losses_told():
            distributed.broadcast_object_list(box, src=0, group=self._group)
            # The main process may have sent all before the others listen; training has less patience than this.
            distributed.barrier(group=self._group)

    def _leave(self) -> None:
        if self._group is not None:
            from torch import distributed

            distributed.destroy_process_group()
            self._group = None


@contextmanager
def _losses_told() -> Iterator[None]:
    """In place of the error of whatever waits for a process that has ended, the end of this one."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        if is_main():
            raise PreskipError("another process of this launch has ended: see above what it said") from None
        raise SystemExit(1) from None  # the main process has said why


def uses_fsdp() -> bool:
    """Whether the launcher asks for FSDP (`accelerate launch --use_fsdp`, or its environment under `torchrun`)."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def shared_training(model: nn.Module) -> Iterator[nn.Module]:
    """The model to hand to a trainer; after the block every process has the trained weights, whole.

    FSDP shards a model in place and for good. It gets a copy, from which the trained weights are taken back, so that
    one process can score and store the model. While the copy trains, the model itself waits in the CPU's memory.

    Args:
        model: its parameters that require gradients are trained.

    Raises:
        PreskipError: another process has ended while this one, the main one, waited for it.
    """
    with _losses_told():
        if not uses_fsdp():
            yield model
            return
        import torch
        from torch.distributed.tensor import DTensor

        device = next(model.parameters()).device
        try:
            trained = copy.deepcopy(model.cpu())
            yield trained
            weights = dict(trained.named_parameters())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        value = weights[name].detach()
                        parameter.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
        finally:
            model.to(device)


def adapt_trainer(trainer: Any) -> None:
    """Make a new `Trainer` fit for several processes; alone, it stays as it is.

    * Each process draws its own dropout masks; Trainer gives all of them the same.
    * FSDP on CPUs: Accelerate reads the wish for it on accelerators alone, and trains with DDP on CPUs without a word.
      All that it does after that works over gloo, too.

    Args:
        trainer: a `transformers.Trainer`, before training.

    Raises:
        PreskipError: FSDP of version 1 is asked for, or an interrupted training is to go on that sharded otherwise.
    """
    import numpy as np
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.utils.constants import FSDP_MODEL_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    if not is_main():
        own = np.random.SeedSequence([trainer.args.seed, trainer.args.process_index])
        torch.manual_seed(int(own.generate_state(1)[0]))
    folder = Path(trainer.args.output_dir)
    sharded = {any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")) for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    if sharded == {not uses_fsdp()}:
        raise PreskipError(
            f"the training in {folder} began {'without' if uses_fsdp() else 'with'} FSDP: start it the same way again, "
            "or delete that folder to begin it anew"
        )
    if not uses_fsdp():
        return
    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if state.fsdp_plugin.fsdp_version != 2:
        raise PreskipError("FSDP of version 1 is not possible: set fsdp_version: 2, or FSDP_VERSION=2 under torchrun")

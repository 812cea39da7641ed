"""A training loop of one's own around DDP, without Trainer."""

import os
from pathlib import Path

import torch
from peft import get_peft_model
from torch import distributed, nn

import zoo
from preskip import PreskipConfig

STEPS = 4


def adapted(name: str = "llama", **settings):
    model = get_peft_model(zoo.build(name), PreskipConfig(**settings))
    zoo.randomise(model)
    return model


def branch_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: p for key, p in model.named_parameters() if ".preskip." in key}


def train_steps(model: nn.Module, rows: slice) -> list[float]:
    """Train on these rows of the same four sequences per step; returns the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        ids = torch.randint(8, zoo.VOCABULARY, (4, 12))[rows]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_half(folder: Path) -> None:
    """What each of two processes does: train on its half of every batch; the first leaves `results.pt`."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    assert os.environ["WORLD_SIZE"] == "2"
    model = nn.parallel.DistributedDataParallel(adapted())
    losses = torch.tensor(train_steps(model, slice(2 * rank, 2 * rank + 2)))
    distributed.all_reduce(losses)
    if rank == 0:
        torch.save({"losses": losses / 2, "weights": branch_weights(model.module)}, folder / "results.pt")
    distributed.barrier()
    # Not torn down: ~ProcessGroupGloo joins its thread with the GIL held, which that thread may be waiting for.
    os._exit(0)

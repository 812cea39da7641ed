"""One pass over texts in which every layer's branch is measured at every token; nothing but sums outlives a batch.

Shapes: L layers with a branch, B rows, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from preskip.analysis.branches import LiveBranch, observed
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import batches, token_scores

# What is measured per layer and token: norms of the skip's output, of what it joins, of x̃ - x̂ and of x̂; cosines of the
# skip's output with attention's and with the MLP's.
MEASURES = ("skip", "attention", "change", "input", "attention_cosine", "mlp_cosine")
# Children of a block whose output is the MLP's; Bloom's adds the residual itself.
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2", "mlp_block")
INNER_MLPS = {"BloomBlock": "mlp.dense_4h_to_h"}


@dataclass(frozen=True)
class Chunk:
    """A stretch of a text that the model reads at once.

    Attributes:
        owner: whatever tells the caller whose it is.
        begin: index in the text of its first own token.
        ids: its tokens.
        targets: the token behind each; one fewer at the end of the text.
        counts: whether its tokens count for `Recorder.written`.
        lead: how many of its first tokens are not the text's: 1 behind a start token, which counts for nothing.
    """

    owner: Any
    begin: int
    ids: list[int]
    targets: list[int]
    counts: bool
    lead: int = 0


@dataclass(frozen=True)
class Measured:
    """What a pass found in one chunk.

    Attributes:
        chunk: the chunk.
        values: by name of `MEASURES`, [L, T], float32; NaN in layers that lack the part.
        nll: nats of each target, [targets].
    """

    chunk: Chunk
    values: dict[str, NDArray[np.float32]]
    nll: NDArray[np.float64]


class Recorder:
    """Hooks on every branch that measure it while the model runs.

    Args:
        branches: of a model whose layers have one active adapter each.

    Attributes:
        written: sum of the skip's output over tokens that count, [L, d], float64; of such tokens there are `counted`.
    """

    def __init__(self, branches: Sequence[LiveBranch]) -> None:
        self.branches = branches
        self.rows: list[dict[str, torch.Tensor]] = [{} for _ in branches]
        self.mask: torch.Tensor | None = None
        self.written: list[torch.Tensor | None] = [None] * len(branches)
        self.counted = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Measure while the context lasts; each pass leaves its values in `rows` for `take`."""
        with ExitStack() as stack:
            for index, branch in enumerate(self.branches):
                held: dict[str, torch.Tensor] = {}
                ((settings, linears),) = branch.active()
                sources: list[tuple[str, nn.Module]] = [("attention", branch.tap or branch.attention)]
                if settings.preprojection:
                    sources.append(("feature", linears["down"]))
                if settings.content_skip:
                    sources.append(("skip", linears["skip"] if "skip" in linears else linears["skip_up"]))
                if (mlp := mlp_of(branch.block)) is not None:
                    sources.append(("mlp", mlp))
                stack.enter_context(observed(branch, partial(held.__setitem__, "input")))
                # Prepended: attention's output is seen before the branch's own hook adds the skip.
                for name, module in sources:
                    keep_output = partial(_keep_output, held, name)
                    stack.callback(module.register_forward_hook(keep_output, prepend=True).remove)
                stack.callback(branch.block.register_forward_hook(partial(self._reduce, index, held)).remove)
            yield

    def _reduce(self, index: int, held: dict[str, torch.Tensor], block: nn.Module, args: tuple, output: Any) -> None:
        """Vectors of one layer become numbers per token.

        Raises:
            PreskipError: the layer runs several times in a pass.
        """
        if self.rows[index]:
            raise PreskipError(
                f"layer {self.branches[index].layer} runs several times in a pass: explain knows layers that run once"
            )
        ((settings, _),) = self.branches[index].active()
        values = {name: tensor.float() for name, tensor in held.items()}
        held.clear()
        row = {"attention": _length(values["attention"]), "input": _length(values["input"])}
        feature = values.get("feature")
        skip = values.get("skip")
        if settings.enrich_attention:
            if feature is not None:
                row["change"] = _length(feature)
        elif skip is None:
            skip = feature  # the parallel adapter
        if skip is not None:
            row["skip"] = _length(skip)
            row["attention_cosine"] = F.cosine_similarity(skip, values["attention"], dim=-1)
            if "mlp" in values:
                row["mlp_cosine"] = F.cosine_similarity(skip, values["mlp"].view_as(skip), dim=-1)
            if self.mask is not None:
                total = skip[self.mask].double().sum(0)
                earlier = self.written[index]
                self.written[index] = total if earlier is None else earlier + total
        self.rows[index] = row

    def take(self) -> dict[str, NDArray[np.float32]]:
        """The values of the last pass by name of `MEASURES`, [L, B, T]."""
        empty = torch.full_like(self.rows[0]["attention"], torch.nan)
        taken = {name: torch.stack([row.get(name, empty) for row in self.rows]).cpu().numpy() for name in MEASURES}
        self.rows = [{} for _ in self.branches]
        return taken


@torch.inference_mode()
def measure(model: nn.Module, recorder: Recorder, chunks: Iterable[Chunk], *, batch_tokens: int) -> Iterator[Measured]:
    """Read chunks and give what was found in each, in order; memory holds one batch at a time.

    Args:
        model: a causal language model in evaluation mode, also a PEFT model.
        recorder: recording on that model.
        chunks: what to read; taken one batch at a time.
        batch_tokens: upper bound of padded tokens per forward pass.

    Raises:
        DivergedError: a log-likelihood is NaN or infinite.
    """
    device = next(model.parameters()).device
    for batch in batches(chunks, batch_tokens, lambda chunk: len(chunk.ids)):
        lengths = torch.tensor([len(chunk.ids) for chunk in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)  # [B, T], padded behind
        counts = torch.zeros_like(ids, dtype=torch.bool)
        for row, chunk in enumerate(batch):
            ids[row, : len(chunk.ids)] = torch.tensor(chunk.ids)
            counts[row, chunk.lead : len(chunk.ids)] = chunk.counts
        recorder.mask = counts.to(device)
        recorder.counted += int(counts.sum())
        # No mask for attention: what stands behind a token cannot change it.
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        values = recorder.take()
        for row, chunk in enumerate(batch):
            own = {name: value[:, row, : len(chunk.ids)] for name, value in values.items()}
            targets = torch.tensor(chunk.targets, dtype=torch.long, device=logits.device)
            yield Measured(chunk, own, token_scores(logits[row, : len(targets)], targets)[0].numpy())


def mlp_of(block: nn.Module) -> nn.Module | None:
    """The module of a block whose output is its MLP's, or None."""
    inner = INNER_MLPS.get(type(block).__name__)
    if inner is not None:
        return block.get_submodule(inner)
    children = dict(block.named_children())
    return next((children[name] for name in MLP_NAMES if name in children), None)


def _keep_output(held: dict[str, torch.Tensor], name: str, module: nn.Module, args: tuple, output: Any) -> None:
    held[name] = output[0] if isinstance(output, tuple) else output


def _length(x: torch.Tensor) -> torch.Tensor:
    """‖x‖ of each token, [B, T, d] → [B, T]."""
    return x.norm(dim=-1)

"""Sequences with a common beginning in one row: the beginning is read once, each continuation sees its own only.

A row is a tree of tokens, each behind its parent: what a token sees is the path from the root to it, given to the model
as a mask and as positions. The choices of one question, and questions behind the same examples, share so; the numbers
are those of one row per sequence, up to rounding. T tokens of a row, B rows.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from preskip.adapter import base_model

# What a config calls the reach of its layers. A row within all of them needs one mask for every layer.
_REACHES = ("sliding_window", "attention_chunk_size", "window_size", "index_topk", "max_position_embeddings")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens that a model reads at once.

    Attributes:
        ids: the tokens, each behind its parent.
        positions: how many tokens each one sees before itself.
        paths: by index of a sequence, where its tokens lie in the row, all but the last, which is not read.
    """

    ids: array[int]
    positions: array[int]
    paths: dict[int, array[int]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def branches(self) -> bool:
        """Whether not every token sees all tokens before it."""
        return self.positions != array("i", range(len(self.ids)))

    @property
    def shared(self) -> bool:
        """Whether it holds sequences of different tokens."""
        return any(len(path) < len(self.ids) for path in self.paths.values())


def plain_rows(reads: Mapping[int, Sequence[int]]) -> list[Row]:
    """One row per sequence of tokens, by index; the same tokens again, as choices of one token have, are in one row."""
    return _rows(reads, lambda size, first, read, common: size == read == common)


def shared_rows(reads: Mapping[int, Sequence[int]], *, limit: int, reach: int, width: int) -> list[Row]:
    """Rows in which sequences share their beginnings where that pays.

    What a row of T tokens costs is taken as T + T²/width: the second term is its attention. With SmolLM2 (d = 576) that
    took 0.2 (float32) and 0.9 (bfloat16) of the time of the matrix products at T = 512, on one core of an AMD EPYC. So
    the choices of a question join from a beginning of some 15 tokens on, and questions do not for a start token's sake.

    Args:
        reads: of each sequence, by its index, the tokens that are read.
        limit: most tokens of a row, unless its first sequence has more than half of them: half as many behind it.
        reach: most tokens of a row in any case.
        width: d of the model.
    """

    def cost(tokens: int) -> float:
        return tokens + tokens**2 / width

    def joins(size: int, first: int, read: int, common: int) -> bool:
        together = size + read - common
        fits = together <= min(reach, max(limit, first + limit // 2))
        return common == read or (fits and cost(together) < cost(size) + cost(read))

    return _rows(reads, joins)


def _rows(reads: Mapping[int, Sequence[int]], joins: Callable[[int, int, int, int], bool]) -> list[Row]:
    """Rows of sequences; one joins the row of the last where `joins` says so.

    `joins` gets numbers of tokens: of that row, of its first sequence, of the one that may join, and of those that this
    has in common with the last.
    """
    rows: list[Row] = []
    last: Sequence[int] = ()
    path = array("i")
    first = 0  # tokens of the row's first sequence
    # In falling order, neighbours have the most in common, and a sequence stands behind those that begin with it.
    for index, read in sorted(reads.items(), key=lambda item: array("i", item[1]), reverse=True):
        common = _common(read, last)
        if not rows or not joins(len(rows[-1]), first, len(read), common):
            rows.append(Row(ids=array("i"), positions=array("i"), paths={}))
            common, first = 0, len(read)
        row = rows[-1]
        path = path[:common] + array("i", range(len(row), len(row) + len(read) - common))
        row.ids.extend(read[common:])
        row.positions.extend(range(common, len(read)))
        row.paths[index] = path
        last = read
    return rows


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for place, (mine, other) in enumerate(zip(first, second, strict=False)):
        if mine != other:
            return place
    return min(len(first), len(second))


def tree_inputs(rows: Sequence[Row], length: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Mask [B, 1, T, T], added to the attention's scores, and positions [B, T] of rows padded to T = `length`.

    Rows that do not branch need neither: what stands behind a token cannot change it, and without a mask attention has
    its fast path.
    """
    if not any(row.branches for row in rows):
        return {}
    seen = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no empty softmax
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    for line, row in enumerate(rows):
        positions[line, : len(row)] = torch.tensor(list(row.positions))
        for path in map(torch.tensor, map(list, row.paths.values())):
            seen[line, path[:, None], path] = torch.ones((len(path), len(path)), dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None].to(device), "position_ids": positions.to(device)}


def reach(model: nn.Module) -> int | None:
    """The longest row in which a model's sequences may share their beginnings; None where they may not.

    That needs attention alone to mix the tokens, by a mask and positions that are given from outside; ALiBi, recurrent
    and convolutional layers, and the virtual tokens of prompt tuning have others. Whether a model does with them what
    it should is measured besides (`preskip.evaluate.likelihood`).
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    if config is None or "position_ids" not in inspect.signature(base.forward).parameters:
        return None
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    stateful = getattr(base, "_is_stateful", False)
    if virtual or stateful or getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config()
    if getattr(text, "alibi", False) or getattr(text, "_attn_implementation", None) not in ("sdpa", "eager"):
        return None
    if not set(getattr(text, "layer_types", None) or ()) <= _ATTENTION_LAYERS:
        return None
    reaches = [getattr(text, name, None) for name in _REACHES]
    return min([value for value in reaches if isinstance(value, int) and value > 0], default=2**31)

"""What a peer knows of the tokens of a forward pass: ids, which of them belong together, and what came before them.

A layer that mixes neighbouring tokens needs what attention does without: the tokens' documents, and in generation the
last tokens of the pass before. The model's decoder is told both; hooks on it keep them for the modules of its blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from preskip.casting import is_transformed
from preskip.errors import PreskipError
from preskip.kv_cache import cache_name, given_cache
from preskip.peers.child_hook import ChildHook, follow

# How many earlier tokens a token may be mixed with.
REACH = 3

# What gradient checkpointing asks for again in the backward pass; other passes may have run meanwhile.
_OF_A_PASS = ("ids", "first_value", "first_has_graph", "is_running", "_given", "_reach", "_length")


class Tails:
    """The last tokens that each mixing module has read, kept in a cache of transformers as a layer behind its own.

    As a layer it goes where the keys and values go: to the beams that are kept, to the rows that are selected. Earlier
    tokens are gone, so a cache with tails cannot be cut back.
    """

    is_croppable = supports_early_init = is_sliding = is_initialized = False
    # As far as the tails are concerned: a cache whose other layers say the same is static, and needs its masks.
    is_compileable = True
    keys = values = None

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}  # by module, [B, REACH, C]
        self.run: torch.Tensor | None = None  # [B], how many of them the next token may be mixed with
        self.seen = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the beams that are kept."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Rows by index."""
        self.inputs = {name: rows[indices.to(rows.device)] for name, rows in self.inputs.items()}
        self.run = None if self.run is None else self.run[indices.to(self.run.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.inputs = {name: rows.repeat_interleave(repeats, dim=0) for name, rows in self.inputs.items()}
        self.run = None if self.run is None else self.run.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused where tokens would be removed.

        Raises:
            PreskipError: always then.
        """
        if tokens_to_remove:
            raise PreskipError("layers that mix tokens keep the last 3 alone, so their cache cannot be cut back")

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_seq_length(self) -> int:
        """Tokens that have been read."""
        return self.seen

    def offload(self) -> None:
        """Three tokens stay where they are."""

    def prefetch(self) -> None:
        """See `offload`."""


class Tokens:
    """The tokens of the forward pass that runs, ran last, or is recomputed by gradient checkpointing.

    A document ends with the config's end token, or in front of its start token where that is another; where position
    ids are given it also ends where they do not go on by one. Padding belongs to none.

    Args:
        config: of the text decoder.

    Attributes:
        ids: token ids [B, T], or None where the pass was given embeddings.
        first_value: the values of the first layer [B, T, W], for `preskip.peers.value_residual`.
        first_has_graph: whether gradients were recorded when they were computed.
        is_running: whether the pass has not ended; False while a part of it is recomputed.
        child_hooks: of the peers, on layers that an adapter may wrap.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.ids: torch.Tensor | None = None
        self.first_value: torch.Tensor | None = None
        self.first_has_graph = False
        self.is_running = False
        self.handles: list[Any] = []
        self.child_hooks: list[ChildHook] = []
        self._names = ["input_ids"]  # of the decoder's arguments, for those that are given by their place
        self._cache_name = cache_name()  # asked here: in a compiled pass it would be traced
        self._given: tuple[Any, Any, int, torch.device] = (None, None, 0, torch.device("cpu"))
        self._reach: torch.Tensor | None = None
        self._past: Tails | None = None
        self._kept: Tails | None = None
        self._run: torch.Tensor | None = None
        self._length = 0  # of the cache

    def __reduce__(self) -> Any:
        # Without the tensors of the last pass, which may hang on a graph.
        return Tokens, (self.config,), {name: getattr(self, name) for name in ("handles", "child_hooks", "_names")}

    def watch(self, decoder: nn.Module) -> None:
        """Register the hooks on the text decoder."""
        self._names = list(inspect.signature(decoder.forward).parameters)
        self.handles = [
            decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            decoder.register_forward_hook(self.finish, with_kwargs=True),
        ]

    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: take down what it is given, and put hooks where the layers are by now.

        Raises:
            PreskipError: neither input_ids nor inputs_embeds are given.
        """
        if any(hook.is_behind for hook in self.child_hooks):
            follow(self.child_hooks)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.ids = given.get("input_ids")
        source = given.get("inputs_embeds") if self.ids is None else self.ids
        if source is None:
            raise PreskipError("the decoder was called without input_ids and inputs_embeds")
        self._given = (given.get("attention_mask"), given.get("position_ids"), source.shape[1], source.device)
        self._reach = self.first_value = self._past = self._kept = None
        self.is_running = True
        cache, use_cache = given_cache(given), given.get("use_cache")
        if cache is not None and cache.get_seq_length() > 0:
            self._past = next((layer for layer in cache.layers if isinstance(layer, Tails)), None)
        if cache is not None or (self.config.use_cache if use_cache is None else use_cache):
            self._kept = Tails()
        self._length = 0 if cache is None else int(cache.get_seq_length())

    def finish(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the decoder: the tails go with the cache, and a backward pass finds its own tokens again."""
        self.is_running = False
        hidden = output[0]
        if hidden.requires_grad and not (torch.compiler.is_compiling() or is_transformed()):
            of_this_pass = {name: getattr(self, name) for name in _OF_A_PASS}
            hidden.register_hook(lambda gradient: self.__dict__.update(of_this_pass))
        kept, self._kept, self._past = self._kept, None, None
        cache = getattr(output, self._cache_name, None)
        if kept is None or not kept.inputs or cache is None:
            return
        kept.run = self._run
        cache.layers = [*(layer for layer in cache.layers if not isinstance(layer, Tails)), kept]
        kept.seen = int(cache.get_seq_length())

    def before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The module's input with the `REACH` tokens in front of it (zeros at the start), [B, REACH + T, C].

        Args:
            name: of the module.
            x: its input [B, T, C].

        Raises:
            PreskipError: a cache that was filled without these tokens, or cut back.
        """
        if self._length and (self._past is None or self._past.seen != self._length or name not in self._past.inputs):
            raise PreskipError("the cache lacks the last tokens that this model mixes: fill it with the model itself")
        tail = x.new_zeros(x.shape[0], REACH, x.shape[2]) if self._past is None else self._past.inputs[name].to(x.dtype)
        whole = torch.cat((tail, x), dim=1)
        if self._kept is not None and name in self._kept.inputs:
            self._kept = None  # the layer runs several times in a pass: a cache with its tokens would mix the runs
        elif self._kept is not None:
            self._kept.inputs[name] = whole[:, -REACH:].clone()
        return whole

    def reach(self) -> torch.Tensor:
        """How many tokens before it a token may be mixed with, 0 to `REACH`, [B or 1, T].

        Raises:
            PreskipError: an attention mask of another form than [B, T], which does not show what is padding.
        """
        if self._reach is None:
            self._reach = self._counted()
        return self._reach

    def _counted(self) -> torch.Tensor:
        mask, positions, length, device = self._given
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise PreskipError(
                "a layer that mixes tokens needs the attention mask as [batch, tokens], to see padding: leave static "
                "caches and prepared masks out"
            )
        rows = max(1 if given is None else given.shape[0] for given in (self.ids, mask))
        starts = torch.zeros(rows, length, dtype=torch.bool, device=device)
        ends = torch.zeros_like(starts)  # of a document, or padding
        if self.ids is not None:
            stops = _ids(self.config.eos_token_id)
            ends |= _among(self.ids, stops)
            starts |= _among(self.ids, _ids(self.config.bos_token_id) - stops)
        if mask is not None:
            padding = mask[:, -length:] == 0
            ends, starts = ends | padding, starts | padding
        if positions is not None and positions.ndim == 2:
            starts[:, 1:] |= positions[:, 1:] != positions[:, :-1] + 1
            starts[:, :1] |= positions[:, :1] == 0
        starts[:, 1:] |= ends[:, :-1]
        index = torch.arange(length, device=device)
        run = 0 if self._past is None or self._past.run is None else self._past.run[:, None]
        begun = torch.where(starts, index, -torch.as_tensor(run, device=device)).cummax(dim=1).values
        reach = (index - begun).clamp(max=REACH)
        self._run = torch.where(ends[:, -1], 0, (reach[:, -1] + 1).clamp(max=REACH))
        return reach


def _ids(token: int | Iterable[int] | None) -> set[int]:
    """A config's end or start tokens."""
    return set() if token is None else {token} if isinstance(token, int) else set(token)


def _among(ids: torch.Tensor, tokens: set[int]) -> torch.Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found |= ids == token
    return found

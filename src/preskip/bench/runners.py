"""How each kind of work is run on one row: what is prepared, what is repeated, and the logits that are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from preskip.bench.models import Row
from preskip.bench.settings import COMPILED, Work
from preskip.errors import PreskipError, one_line
from preskip.kv_cache import cache_name
from preskip.peers.tokens import Tails


class NotPossible(PreskipError):
    """A row that cannot do a piece of work here, with the reason."""


class Runner:
    """One row doing one piece of work.

    Attributes:
        before: to be called before each `run`, not timed.
        run: what is timed.
        logits: of the position that is checked, [V], from the last run; of a training with dropout from a pass without.
        cache: the K/V cache, or None.
    """

    def __init__(self, row: Row, work: Work, ids: torch.Tensor) -> None:
        self.row, self.work, self.ids = row, work, ids
        self.cache: Any = None
        self.logits: torch.Tensor | None = None
        self.before: Callable[[], None] = lambda: None
        self.run: Callable[[], None] = getattr(self, f"_prepare_{work.kind}")()

    def _prepare_prefill(self) -> Callable[[], None]:
        is_compiled = self.row.name in COMPILED
        if is_compiled:  # its graph writes into a static cache, whose tensors are not to be made inside of it
            self.cache = new_cache("static", self.row.model, self.work.tokens)
            with torch.inference_mode():
                self.row.model(input_ids=self.ids, **with_cache(self.cache), logits_to_keep=1)

        def before() -> None:
            if is_compiled:
                self._rewind(0)
            else:
                self.cache = new_cache("dynamic", self.row.model, self.work.tokens)

        @torch.inference_mode()
        def run() -> None:
            out = self.row.forward(input_ids=self.ids, **with_cache(self.cache), logits_to_keep=1)
            self.logits = out.logits[0, -1].clone()

        self.before = before
        return run

    def _prepare_decode(self) -> Callable[[], None]:
        context, steps = self.work.tokens, self.work.new_tokens
        started = new_cache(self.work.cache, self.row.model, context + steps)
        with torch.inference_mode():
            self.row.model(input_ids=self.ids[:, :context], **with_cache(started), logits_to_keep=1)
        is_static = self.work.cache == "static"
        self.cache = started
        is_cuda = self.ids.device.type == "cuda"

        def before() -> None:
            if is_static:
                self._rewind(context)
            else:
                self.cache = copy.deepcopy(started)

        @torch.inference_mode()
        def run() -> None:
            token = self.ids[:, context : context + 1]
            for step in range(steps):
                if is_cuda:
                    torch.compiler.cudagraph_mark_step_begin()
                logits = self.row.forward(input_ids=token, **with_cache(self.cache)).logits
                if step == 0:
                    self.logits = logits[0, -1].clone()
                token = logits[:, -1:].argmax(-1)

        self.before = before
        return run

    def _prepare_scoring(self) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            logits = self.row.forward(input_ids=self.ids, use_cache=False).logits
            self.logits = logits[0, -1].clone()  # a view would keep all of them
            for row, ids in zip(logits, self.ids, strict=True):
                F.cross_entropy(row[:-1].float(), ids[1:], reduction="sum")

        return run

    def _prepare_training(self) -> Callable[[], None]:
        model = self.row.model
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)  # weights stay, so that rows on shared ones do
        drops = has_dropout(model)
        if drops:  # what a training step computes cannot be checked then
            with torch.inference_mode():
                self.logits = model(input_ids=self.ids, use_cache=False).logits[0, -1].clone()

        def run() -> None:
            model.train()
            out = model(input_ids=self.ids, labels=self.ids, use_cache=False)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if not drops:
                self.logits = out.logits[0, -1].detach().clone()
            model.eval()

        return run

    @torch.inference_mode()  # in which the counts were moved to the device; they may be written nowhere else then
    def _rewind(self, tokens: int) -> None:
        layers = self.cache.layers
        if any(not isinstance(getattr(layer, "cumulative_length", None), torch.Tensor) for layer in layers):
            raise NotPossible("this model's static cache cannot be set back to a length")
        # A sliding window counts once more, in Python, and has shifted what it holds once that exceeds its length.
        windows = [layer for layer in layers if hasattr(layer, "cumulative_length_int")]
        if any(layer.cumulative_length_int > layer.max_cache_len for layer in windows):
            self.cache.reset()
            if tokens:
                self.row.model(input_ids=self.ids[:, :tokens], **with_cache(self.cache), logits_to_keep=1)
            return
        for layer in layers:
            layer.cumulative_length.fill_(tokens)
        for layer in windows:
            layer.cumulative_length_int = tokens


def has_dropout(model: Any) -> bool:
    """Whether a training step drops features, by its modules and by what its config passes to functions."""
    config = model.config.get_text_config().to_dict()
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()) or any(
        "drop" in key and isinstance(value, float) and value > 0 for key, value in config.items()
    )


def with_cache(cache: Any) -> dict[str, Any]:
    """The arguments of a pass that reads a cache and goes on with it."""
    return {cache_name(): cache, "use_cache": True}


def new_cache(kind: str, model: Any, tokens: int) -> Any:
    """An empty K/V cache of transformers.

    Raises:
        NotPossible: this version, or the model, has none of this kind.
    """
    from transformers import DynamicCache, QuantizedCache, StaticCache

    config = model.config
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=tokens)
    try:
        return QuantizedCache(backend="fp8", config=config)
    except ValueError as error:
        raise NotPossible(f"no quantised cache: {one_line(error)}") from None


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, read off its layers; of a quantised one as they are stored.

    The last tokens that a Canon layer keeps are among them.
    """
    total = 0
    for layer in cache.layers:
        if isinstance(layer, Tails):
            total += sum(tensor.nbytes for tensor in layer.inputs.values())
            continue
        packed = getattr(layer, "_quantized_keys", None) is not None
        names = ("_quantized_keys", "_quantized_values") if packed else ("keys", "values")
        for name in names:
            held = getattr(layer, name)
            for tensor in held if isinstance(held, tuple) else (held,):
                total += tensor.numel() * tensor.element_size()
    return total

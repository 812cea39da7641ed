"""Frozen first layers computed once per batch: what the last of them gives is kept, and read back from then on.

Where an adapter's first trained layer is layer k, layers 0 to k − 1 give the same for a batch in every training and
every scoring, bit for bit: the batch has the same shape and the same tokens, and nothing in these layers is random.
The decoder's own forward runs as it is (embeddings, masks, positions, norm); a layer below k gives the kept states in
place of computing. Whether that holds for a model is not taken from its type but tried, see `FrozenPrefix.fault`.
"""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preskip.errors import PreskipError, one_line
from preskip.forwards import forward_replaced, forwards_counted
from preskip.sites import find_sites, text_decoder
from preskip.train.kept_states import KeptStates

# Arguments of a decoder that do not change what its layers give.
_HARMLESS = {"return_dict", "num_items_in_batch"}


@dataclass(kw_only=True)
class Passes:
    """Forward passes while a prefix was reused.

    Attributes:
        passes: that could reuse something, or be kept.
        reused: that computed nothing of the first layers.
    """

    passes: int = 0
    reused: int = 0


class FrozenPrefix:
    """The first layers of a base that adapters leave as they are.

    Args:
        base: the untouched base; adapters may come and go.
        identity: what they depend on beside the batch: the weights, their dtype, the versions of libraries, the device.

    Raises:
        PreskipError: the base has no text decoder with one list of layers.
    """

    def __init__(self, base: nn.Module, identity: str) -> None:
        self.decoder = text_decoder(base)
        stacks = {site.stack for site in find_sites(base).attentions}
        if self.decoder is base or len(stacks) != 1:
            raise PreskipError(f"{type(base).__name__} has no text decoder with one list of layers")
        self.blocks: list[nn.Module] = list(base.get_submodule(stacks.pop()))  # type: ignore[call-overload]
        self.identity = identity
        self._signature = inspect.signature(type(self.decoder).forward)
        self._clear()

    def _clear(self) -> None:
        """End of a pass: layers compute, and nothing is kept."""
        self._names: dict[int, str] = {}  # by number of first layers, what is to be kept of this pass
        self._replayed: Any = None

    def untrained_layers(self, model: nn.Module) -> int:
        """How many layers stand before the first trained weight; 0 where anything outside the layers is trained."""
        trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
        inside = [{id(weight) for weight in block.parameters()} for block in self.blocks]
        if trained - set().union(*inside):
            return 0
        return next((index for index, own in enumerate(inside) if own & trained), 0)

    @contextmanager
    def reused(
        self, kept: KeptStates, *, training: int = 0, scoring: int = 0, keep: Collection[int] = ()
    ) -> Iterator[Passes]:
        """Compute the first layers once per batch while the context lasts, in this process and later ones.

        A pass with a cache, a mask, positions or embeddings of its own is computed as it is; so is one while somebody
        watches the layers by a hook.

        Args:
            kept: where states are kept.
            training: number of first layers that are reused while the model trains; 0 for none.
            scoring: the same while it is in evaluation mode.
            keep: further numbers of first layers whose states are kept in evaluation mode, for others to reuse.
        """
        blocks = self.blocks[: max((training, scoring, *keep))]
        counts, watchers = Passes(), _hooks(blocks)

        def begin(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._clear()
            depth = training if decoder.training else scoring
            wanted = {depth, *(() if decoder.training else keep)} - {0}
            ids = self._read(args, kwargs) if wanted else None
            if ids is None or _hooks(blocks) != watchers:
                return
            counts.passes += 1
            names = {each: self._name(each, ids) for each in wanted}
            found = kept.load(names[depth]) if depth else None
            if found is not None:
                counts.reused += 1
                states, parts = found[0].to(ids.device), found[1]
                self._replayed = (states, *[None] * (parts - 1)) if parts else states
            self._names = {each: name for each, name in names.items() if each > depth or found is None}

        def end(*_: Any) -> None:
            self._clear()

        with ExitStack() as stack:
            for number, block in enumerate(blocks, 1):
                below = (number <= scoring, number <= training)
                stack.enter_context(forward_replaced(block, self._layer(number, block.forward, kept, below)))
            stack.callback(self.decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(self.decoder.register_forward_hook(end, always_call=True).remove)
            yield counts

    def _layer(
        self, number: int, own: Callable[..., Any], kept: KeptStates, below: tuple[bool, bool]
    ) -> Callable[..., Any]:
        """The forward of the `number`-th layer, counted from 1: it gives kept states, or computes and keeps them.

        `below` says whether it is one of those reused, in evaluation mode and in training.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._replayed is not None and below[self.decoder.training]:
                return self._replayed
            output = own(*args, **kwargs)
            name = self._names.get(number)
            states, parts = (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
            # Other strides than those of what is read back might take other kernels.
            if name is not None and isinstance(states, torch.Tensor) and states.is_contiguous():
                kept.save(name, states, parts)
            return output

        return forward

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The token ids [B, T] of a call of the decoder whose layers depend on them alone, else None."""
        given = dict(self._signature.bind(self.decoder, *args, **kwargs).arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        del given[next(iter(self._signature.parameters))]  # the decoder itself
        ids = given.pop("input_ids", None)
        if not self.decoder.training and given.get("use_cache") is not False:
            return None  # a cache would lack the first layers' keys and values; in training nobody reads it
        if any(given[name] is not None and given[name] is not False for name in given.keys() - _HARMLESS):
            return None
        return ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None

    def _name(self, depth: int, ids: torch.Tensor) -> str:
        kind = ids.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        about = (self.identity, depth, self.decoder.training, tuple(ids.shape), mixed, torch.get_num_threads())
        digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
        digest.update(ids.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def fault(self, model: nn.Module, layers: int, *, training: bool) -> str | None:
        """Why the first layers of an adapted model cannot be reused, or None: loss, logits and gradients are compared.

        Tried on two small batches, with another random state for what is kept, and another text in between: layers
        that draw random numbers, or leave something for later layers, are found. The random state stays.

        Args:
            model: with its adapter.
            layers: number of first layers.
            training: in training mode, with gradients; else in evaluation mode.
        """
        device = next(model.parameters()).device
        ids = torch.arange(32, device=device).view(2, 16) % model.get_input_embeddings().weight.shape[0]  # type: ignore
        was_training = model.training
        devices = [device] if device.type == "cuda" else []
        try:
            with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices):
                first, second = (KeptStates(Path(folder) / name, quiet=True, reserve=0) for name in ("first", "second"))
                model.eval()  # gradient checkpointing would run them twice
                with forwards_counted((self.decoder, *self.blocks)) as calls:
                    _pass(model, ids, seed=1)
                if set(calls.values()) != {1}:  # an adapter that changes nothing yet would hide it
                    return "layers run several times in a pass, and read what later ones gave"
                model.train(training)
                with self.reused(first, training=layers * training, scoring=layers * (not training)):
                    _pass(model, ids, seed=1)
                with self.reused(second, training=layers * training, scoring=layers * (not training)) as counts:
                    plain = _pass(model, ids, seed=2)
                    if not _same_files(first.folder, second.folder):
                        return "they give other states for the same tokens, as with dropout"
                    _pass(model, ids.flip(1), seed=2)
                    again = _pass(model, ids, seed=2)
                if not counts.passes:
                    return "the decoder is given more than token ids"
                if counts.reused != 1:
                    return "their output cannot be kept"
                if not all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)):
                    return "later layers need more of them than their output"
        except Exception as error:
            return one_line(f"{type(error).__name__}: {error}", 160)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
        return None


def _hooks(blocks: Collection[nn.Module]) -> int:
    """How many hooks watch the layers."""
    modules = (module for block in blocks for module in block.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def _pass(model: Any, ids: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Logits of a batch; in training also the loss and every gradient."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    if not model.training:
        with torch.inference_mode():
            return [model(input_ids=ids, use_cache=False).logits]
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    return [output.loss.detach(), output.logits.detach(), *gradients]


def _same_files(one: Path, other: Path) -> bool:
    names = {path.name for path in one.glob("*")} | {path.name for path in other.glob("*")}
    return all((one / n).is_file() and (one / n).read_bytes() == (other / n).read_bytes() for n in names)

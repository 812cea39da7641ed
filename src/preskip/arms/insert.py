"""Put one arm into the base model, and take it out again with the base bit for bit as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from preskip.adapter.norms import float32_norms
from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import TOLERANCE
from preskip.errors import PreskipError
from preskip.forwards import forward_autocast, forward_replaced
from preskip.peers.insert import attach_peers, detach_peers, peer_weights, peers_off, save_peers
from preskip.peers.place import PeerModule
from preskip.runs.weights import OWN_WEIGHTS


@dataclass(kw_only=True)
class Inserted:
    """One arm inside the base model.

    Attributes:
        model: what to train and to score; the base itself for an arm without adapter.
        layers: the PEFT models, one per stacked adapter, first to last.
        configs: the configuration of each.
        own: the base's parameters that are trained in place, by name; those of a bfloat16 base are in float32 then,
            and it computes in bfloat16 by autocast.
        before: what these were before, by name, in the base's dtype.
        plain: the base's forward without autocast, where there is one with it.
        peers: settings by name of what was put into the blocks (`preskip.peers`).
        targets: paths of the attentions whose blocks have them.
    """

    model: nn.Module
    layers: list[nn.Module] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    plain: Callable[..., Any] | None = None
    peers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name in `model`."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(weight.numel() for weight in self.trainable.values())

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs per token that the arm adds to the base: 2 per weight of a matrix, 1 per factor of a vector.

        HiRA multiplies by a second matrix of the base's size. Weights that take the place of the base's own (norms,
        biases, full fine-tuning) add none. Activations, additions, and what is computed of weights alone, once per pass
        (DoRA's norms, HiRA's products), are not counted.
        """
        added = 0
        if self.peers:
            added += sum(module.flops_per_token for module in self.model.modules() if isinstance(module, PeerModule))
        beside = {id(weight) for weight in peer_weights(self.model).values()}
        hira: list[Any] = [module for module in self.model.modules() if hasattr(module, "hira_A")]
        for layer in hira:
            added += 2 * layer.in_features * layer.out_features
            beside |= {id(weight) for weight in (*layer.hira_A.values(), *layer.hira_B.values())}
        for name, weight in self.trainable.items():
            if name not in self.own and "ln_tuning_layers" not in name and id(weight) not in beside:
                added += (1 if weight.dim() == 1 or "ia3_l" in name else 2) * weight.numel()
        return added

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """While the context lasts, the model computes as the untouched base, bit for bit; what was trained stays."""
        trained = {name: weight.data for name, weight in self.own.items()}
        with ExitStack() as stack:
            if self.layers:  # one of them switches off the layers of all that are stacked
                tuner: Any = self.layers[-1].base_model
                stack.callback(tuner.enable_adapter_layers)
                tuner.disable_adapter_layers()
            stack.enter_context(peers_off(self.model))
            if self.plain is not None:
                stack.enter_context(forward_replaced(self.model, self.plain))
            try:
                for name, weight in self.own.items():
                    weight.data = self.before[name]
                yield
            finally:
                for name, weight in self.own.items():
                    weight.data = trained[name]

    def save(self, folder: Path) -> None:
        """Write the trained weights: PEFT's own files, one folder per stacked adapter; others as safetensors."""
        from safetensors.torch import save_file

        tuners: list[Any] = [layer.base_model for layer in self.layers]
        for number, (layer, config) in enumerate(zip(self.layers, self.configs, strict=True)):
            target = folder / f"{number + 1}" if len(self.layers) > 1 else folder
            tuner = tuners[number]
            # PEFT keeps the configs of stacked adapters in one dictionary, where the last one of a name stays, and
            # takes every tensor of that name for its own.
            others = [other.prefix for other in tuners if other is not tuner]
            state = {key: value for key, value in layer.state_dict().items() if not any(o in key for o in others)}
            shared, tuner.peft_config = tuner.peft_config, {"default": config}
            try:
                layer.save_pretrained(str(target), state_dict=state)  # type: ignore[operator]
            finally:
                tuner.peft_config = shared
        if self.own:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: weight.detach().contiguous() for name, weight in self.own.items()}
            save_file(tensors, folder / OWN_WEIGHTS)
        if self.peers:
            save_peers(self.model, folder, self.peers, self.targets)


@contextmanager
def insert(arm: Arm, context: ArmContext, seed: int) -> Iterator[Inserted]:
    """Insert an arm, its new weights initialised from the seed; on leaving, the base is as it was.

    Args:
        arm: what to insert.
        context: the base, and what the arm depends on.
        seed: of the initialisation.

    Raises:
        PreskipError: the arm misses its budget by more than 0.5 %, would train weights that are not float32, is no PEFT
            adapter and the base is quantised, or cannot be built for this model.
    """
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    base = context.base
    frozen = {name: weight.requires_grad for name, weight in base.named_parameters()}
    inserted = Inserted(model=base)
    autocast = ExitStack()
    try:
        for weight in base.parameters():
            weight.requires_grad_(False)
        configs = arm.configs(context)
        if arm.is_inserted and not configs and getattr(base, "is_quantized", False):
            raise PreskipError(
                f"arm {arm.name} is no PEFT adapter, and only these are trained in a quantised base: leave it out, or "
                "give the model without quantisation"
            )
        trained: list[nn.Parameter] = []
        for config in configs:
            with warnings.catch_warnings():
                # PEFT warns of a second adapter in one base, which is meant, and of norms, which it tunes itself.
                warnings.simplefilter("ignore", UserWarning)
                inserted.model = get_peft_model(base, config)
            float32_norms(inserted.model)
            inserted.layers.append(inserted.model)
            inserted.configs.append(config)
            trained += [weight for weight in inserted.model.parameters() if weight.requires_grad]
        for weight in trained:  # a second adapter freezes the first
            weight.requires_grad_(True)
        if arm.peers:
            inserted.peers, inserted.targets = arm.peers_in(context), context.targets
            attach_peers(base, inserted.peers, targets=context.targets, identity=True)
        if arm.own_weights is not None:
            weights = dict(base.named_parameters())
            inserted.own = {name: weights[name] for name in arm.own_weights(context)}
            inserted.before = {name: weight.data for name, weight in inserted.own.items()}
            mixed = {weight.dtype for weight in inserted.own.values()} == {torch.bfloat16}
            for weight in inserted.own.values():
                weight.data = weight.data.to(torch.float32 if mixed else weight.dtype, copy=True)
                weight.requires_grad_(True)
            if mixed:
                inserted.plain = base.forward
                autocast.enter_context(forward_autocast(base, torch.bfloat16))
                for norm in base.modules():
                    if isinstance(norm, nn.LayerNorm):
                        forward = partial(_layer_norm, norm, norm.forward)
                        autocast.enter_context(forward_replaced(norm, forward))
        _check(arm, context, inserted)
        yield inserted
    finally:
        for layer in reversed(inserted.layers):
            layer.unload()  # type: ignore[operator]
        detach_peers(base)
        autocast.close()
        for name, values in inserted.before.items():
            inserted.own[name].data = values
        for name, weight in base.named_parameters():
            weight.requires_grad_(frozen[name])
            weight.grad = None


def _layer_norm(norm: nn.LayerNorm, plain: Callable[..., Any], hidden_states: torch.Tensor) -> torch.Tensor:
    """A LayerNorm of which the bias alone is trained, in float32: torch's own on a processor takes one dtype only."""
    if hidden_states.device.type != "cpu" or len({weight.dtype for weight in norm.parameters()}) < 2:
        return plain(hidden_states)
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(hidden_states.float(), norm.normalized_shape, weight, bias, norm.eps).to(hidden_states.dtype)


def _check(arm: Arm, context: ArmContext, inserted: Inserted) -> None:
    other = {str(weight.dtype).removeprefix("torch.") for weight in inserted.trainable.values()} - {"float32"}
    if other:
        raise PreskipError(
            f"arm {arm.name} would train weights in {other.pop()}, too coarse for its steps: give --dtype float32, or "
            "leave it out"
        )
    if arm.budget != "matched" or context.match == "none":
        return
    is_params = context.match == "params"
    has = inserted.parameters if is_params else inserted.flops_per_token
    wanted = context.budget if is_params else 2 * context.budget
    if abs(has - wanted) > TOLERANCE * wanted:
        what = "parameters" if is_params else "forward FLOPs per token"
        raise PreskipError(f"arm {arm.name} has {has:,} {what}, the budget is {wanted:,}")

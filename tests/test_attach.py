"""How a branch is hooked in: values against written-out equations and every family's own attention; refusals."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

import equations
import zoo
from preskip import PreskipBranch, PreskipConfig, PreskipError
from preskip.attach import CHILD, POST_ATTENTION_NORMS, attach, detach, forget_compiled, tap_of
from preskip.sites import find_sites, input_width

WRITTEN_OUT = {
    "llama": ("llama", "attention", equations.llama),
    "gpt_neox": ("gpt_neox", "attention", partial(equations.gpt_neox, parallel=True)),
    "gpt_neox_sequential": ("gpt_neox_sequential", "attention", partial(equations.gpt_neox, parallel=False)),
    "gpt2": ("gpt2", "attention", equations.gpt2),
    "bert": ("bert", "attention", equations.bert),
    "gemma2_attention": ("gemma2", "attention", partial(equations.gemma2, skip_position="attention")),
    "gemma2_residual": ("gemma2", "residual", partial(equations.gemma2, skip_position="residual")),
}


def add_branches(model: nn.Module, skip_position: str = "attention", **settings: Any) -> list[PreskipBranch]:
    """Attach a random branch at every site."""
    branches = []
    generator = torch.Generator().manual_seed(4)
    for site in find_sites(model).attentions:
        attention = model.get_submodule(site.name)
        branch = PreskipBranch(input_width(attention), **settings)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        attach(attention, branch, tap_of(model, site.name, skip_position))
        branches.append(branch)
    return branches


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("family", "skip_position"), [("bert", "attention"), ("gemma2", "residual")])
def test_threads_that_call_at_once_keep_their_own_skips(family: str, skip_position: str) -> None:
    model = zoo.build(family).eval()
    add_branches(model, skip_position)
    rows = [{key: value[row : row + 1] for key, value in zoo.inputs(family).items()} for row in (0, 1)]
    alone = [model(**row).logits for row in rows]
    both = Barrier(2)

    def wait(*_: Any) -> None:
        both.wait(timeout=60)  # behind each attention, where its skip is on the way

    for site in find_sites(model).attentions:
        model.get_submodule(site.name).register_forward_hook(wait)

    def run(row: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return model(**row).logits

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, rows))
    assert not torch.equal(alone[0], alone[1])
    for one, wanted in zip(found, alone, strict=True):
        assert torch.equal(one, wanted)


@torch.no_grad()
def test_a_tap_reads_the_branch_of_the_module_that_runs() -> None:
    """DataParallel's replicas share hooks, and have branches of their own."""
    model = zoo.build("gemma2").eval()
    branches = add_branches(model, "residual")
    twin = copy.deepcopy(model)
    for site, branch in zip(find_sites(model).attentions, branches, strict=True):
        other = copy.deepcopy(branch)
        other.skip.weight.mul_(2)
        model.get_submodule(site.name)._modules[CHILD] = other
        twin.get_submodule(site.name).preskip.skip.weight.mul_(2)
    assert torch.equal(zoo.logits(model, "gemma2"), zoo.logits(twin, "gemma2"))


def weights(branch: PreskipBranch) -> dict[str, torch.Tensor]:
    return {part: linear.weight.detach() for part, linear in branch.linears.items()}


@pytest.mark.parametrize("case", WRITTEN_OUT)
@torch.no_grad()
def test_equations_written_out(case: str) -> None:
    name, skip_position, equation = WRITTEN_OUT[case]
    model = zoo.build(name)
    ids = zoo.inputs(name)["input_ids"]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    zero = {part: torch.zeros(1, 1) for part in ("up", "down", "skip")}
    zero = {part: torch.zeros(shape) for part, shape in (("up", (40, 32)), ("down", (32, 40)), ("skip", (32, 32)))}
    base = model(input_ids=ids).logits
    # The equations are the model's, before the branch comes in.
    assert zoo.difference(base, equation(ids, state, [zero] * zoo.LAYERS)) <= 1e-5

    branches = add_branches(model, skip_position)
    adapted = model(input_ids=ids).logits
    assert zoo.difference(adapted, equation(ids, state, [weights(branch) for branch in branches])) <= 1e-5
    assert zoo.difference(adapted, base) > 1e-2


def enclose(model: nn.Module, name: str, branches: dict[str, dict[str, torch.Tensor]], enrich: bool = True) -> None:
    """The branch without hooks: each attention's `forward` replaced by one around it, with plain matrix products.

    `enrich=False` leaves attention its x̂.
    """
    family = zoo.FAMILIES[name]
    for path in family.attention:
        for layer in family.layers:
            attention = model.get_submodule(path.format(layer))
            behind = model.get_submodule(family.dense.format(layer)) if family.dense else attention
            w, skips = branches[path.format(layer)], []

            def attend(*args, _forward=attention.forward, _w=w, _skips=skips, **kwargs):
                x = args[0] if args else kwargs.pop("hidden_states")
                xt = equations.enriched(x, _w)
                _skips.append(xt @ _w["skip"].T)
                return _forward(xt if enrich else x, *args[1:], **kwargs)

            attention.forward = attend

            def add(*args, _forward=behind.forward, _skips=skips, **kwargs):
                output = _forward(*args, **kwargs)
                skip = _skips.pop()
                return (output[0] + skip, *output[1:]) if isinstance(output, tuple) else output + skip

            behind.forward = add


@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_every_family_against_its_own_attention_enclosed(name: str) -> None:
    model, reference = zoo.build(name), zoo.build(name)
    base, hooks_before = zoo.logits(model, name), hooks(model)
    sites = find_sites(model)
    assert {site.name for site in sites.attentions} == zoo.FAMILIES[name].attention_names
    assert sites.layers == list(zoo.FAMILIES[name].layers)
    assert bool(sites.blocks_without) == (zoo.FAMILIES[name].chosen is not None)

    branches = dict(zip((site.name for site in sites.attentions), add_branches(model), strict=True))
    enclose(reference, name, {path: weights(branch) for path, branch in branches.items()})
    adapted = zoo.logits(model, name)
    assert zoo.difference(adapted, zoo.logits(reference, name)) <= 1e-5
    assert zoo.difference(adapted, base) > 1e-2

    for site in sites.attentions:
        detach(model.get_submodule(site.name))
    assert zoo.difference(zoo.logits(model, name), base) == 0.0
    assert hooks(model) == hooks_before
    assert not any(hasattr(module, CHILD) for module in model.modules())


@pytest.mark.parametrize("settings", [{"content_skip": False}, {"preprojection": False}, {"enrich_attention": False}])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
@torch.no_grad()
def test_parts_of_the_branch(name: str, settings: dict) -> None:
    model, reference = zoo.build(name), zoo.build(name)
    branches = add_branches(model, **settings)
    zero = {"up": torch.zeros(40, 32), "down": torch.zeros(32, 40), "skip": torch.zeros(32, 32)}
    names = (site.name for site in find_sites(model).attentions)
    parts = {path: {**zero, **weights(branch)} for path, branch in zip(names, branches, strict=True)}
    enclose(reference, name, parts, settings.get("enrich_attention", True))
    assert zoo.difference(zoo.logits(model, name), zoo.logits(reference, name)) <= 1e-5


@torch.no_grad()
def test_residual_is_the_attention_position_where_no_norm_follows() -> None:
    ids = zoo.inputs("llama")["input_ids"]
    outputs = []
    for position in ("attention", "residual"):
        model = zoo.build("llama")
        add_branches(model, position)
        outputs.append(model(input_ids=ids).logits)
    assert torch.equal(*outputs)
    with pytest.raises(PreskipError, match="skip_position='behind' is not possible: choose attention or residual"):
        tap_of(model, "model.layers.0.self_attn", "behind")


def norms_in_transformers() -> dict[str, str]:
    """The norm between attention and the sum of every block of the installed transformers, read from its sources."""
    found = {}
    for path in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        for block, body in re.findall(r"^class (\w+Layer)\(.*?:\n(.*?)(?=^\w|\Z)", path.read_text(), re.M | re.S):
            attention = re.search(r"^ +(\w+)(?:, _)* = self\.self_attn\(.*?^ +\)\n(.*?) \+ ", body, re.M | re.S)
            output, rest = attention.groups() if attention else ("", "")
            norm = re.search(rf"^ +{output} = self\.(\w*norm\w*)\({output}\)", rest, re.M)
            if norm and "return" not in rest:
                found[block] = norm[1]
    return found


def test_post_attention_norms_are_those_of_transformers() -> None:
    found = norms_in_transformers()
    # Molmo 2 gives its pre-norms this place where its configuration says so.
    assert found.pop("Molmo2DecoderLayer", "input_layernorm") == "input_layernorm"
    assert found == {name: norm for name, norm in POST_ATTENTION_NORMS.items() if name in found}
    assert {"Gemma2DecoderLayer", "Gemma3DecoderLayer", "Glm4DecoderLayer", "Olmo2DecoderLayer"} <= found.keys()
    assert "LlamaDecoderLayer" not in found


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def forward(self, query=None, hidden_states=None, key_value_states=None):
        return self.q_proj(query if query is not None else hidden_states)


def test_calls_that_a_branch_cannot_serve_are_refused() -> None:
    attention = Odd()
    attach(attention, PreskipBranch(8))
    x = torch.randn(1, 2, 8)
    with pytest.raises(PreskipError, match="called with query instead of hidden_states"):
        attention(query=x)
    with pytest.raises(PreskipError, match="Odd runs as cross-attention"):
        attention(hidden_states=x, key_value_states=x)
    assert torch.equal(attention(hidden_states=x), attention.q_proj(x))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
@torch.no_grad()
def test_a_copy_is_independent(name: str, copied: Any) -> None:
    model = zoo.build(name)
    add_branches(model, "residual")
    before = zoo.logits(model, name)
    twin = copied(model)
    assert torch.equal(zoo.logits(twin, name), before)
    for key, parameter in twin.named_parameters():
        if f".{CHILD}." in key:
            parameter.mul_(2)
    assert not torch.equal(zoo.logits(twin, name), before)
    assert torch.equal(zoo.logits(model, name), before)
    for site in find_sites(twin).attentions:
        detach(twin.get_submodule(site.name))
    assert torch.equal(zoo.logits(twin, name), zoo.logits(zoo.build(name), name))
    assert torch.equal(zoo.logits(model, name), before)


def compiled_whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_by_layer(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_by_layer])
@torch.no_grad()
def test_branches_that_come_and_go_after_compiling_are_seen(compiled: Any) -> None:
    twin, model = zoo.build("llama"), zoo.build("llama").requires_grad_(False)
    alone = zoo.logits(twin, "llama")
    add_branches(twin)
    wanted = zoo.logits(twin, "llama")
    call = compiled(model)
    assert torch.equal(zoo.logits(call, "llama"), alone)
    for _ in range(2):
        add_branches(model)
        forget_compiled()
        assert torch.equal(zoo.logits(call, "llama"), wanted)
        for site in find_sites(model).attentions:
            detach(model.get_submodule(site.name))
        assert torch.equal(zoo.logits(call, "llama"), alone)
    torch.compiler.reset()


@torch.no_grad()
def test_a_layer_that_gets_its_first_branch_beside_others_is_compiled_anew() -> None:
    base = zoo.build("llama")
    config = {"init_weights": "paper", "init_std": 0.3, "skip_init_std": 0.3}
    model = get_peft_model(base, PreskipConfig(layers_to_transform=[0], **config)).requires_grad_(False).eval()
    compiled_by_layer(base)
    before = zoo.logits(model, "llama")
    model.add_adapter("second", PreskipConfig(layers_to_transform=[1], **config))
    model.base_model.set_adapter(["default", "second"])
    found = zoo.logits(model, "llama")
    with torch.compiler.set_stance("force_eager"):
        wanted = zoo.logits(model, "llama")
    assert not torch.equal(wanted, before)
    assert torch.equal(found, wanted)
    torch.compiler.reset()

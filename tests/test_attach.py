"""Where a branch sits: values against written-out equations and every family's own attention; sites, refusals."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import equations
import zoo
from preskip import PreskipBranch, PreskipError
from preskip.attach import (
    CHILD,
    POST_ATTENTION_NORMS,
    attach,
    coverage,
    detach,
    find_sites,
    input_width,
    tap_of,
    text_decoder,
)

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
        parent, _, leaf = site.name.rpartition(".")
        branch = PreskipBranch(input_width(attention), **settings)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        attach(attention, branch, tap_of(model.get_submodule(parent), leaf, skip_position))
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
        tap_of(model.model.layers[0], "self_attn", "behind")


@pytest.mark.parametrize("block", POST_ATTENTION_NORMS)
def test_post_attention_norms_are_where_the_table_says(block: str) -> None:
    found = []
    for folder in pkgutil.iter_modules(transformers.models.__path__):
        if block.lower().startswith(folder.name.replace("_", "")):
            module = importlib.import_module(f"transformers.models.{folder.name}.modeling_{folder.name}")
            found += [getattr(module, block)] if hasattr(module, block) else []
    if not found:
        pytest.skip(f"this transformers has no {block}")
    source = inspect.getsource(found[0].forward)
    after_attention = source[source.index("self.self_attn(") :]
    before_sum = after_attention[: after_attention.index(" + ")]
    assert f"self.{POST_ATTENTION_NORMS[block]}(" in before_sum


@pytest.mark.parametrize("name", ["llava", "gemma3_vision"])
def test_of_a_vision_language_model_only_the_text_decoder_is_taken(name: str) -> None:
    model = zoo.build(name)
    decoder = text_decoder(model)
    assert decoder is model.model.language_model
    towers = [key for key, _ in model.named_modules() if key.endswith("self_attn") and "vision" in key]
    assert len(towers) == 2
    assert not {site.name for site in find_sites(model).attentions} & set(towers)


def test_an_encoder_decoder_is_taken_whole() -> None:
    model = zoo.build("bart")
    assert text_decoder(model) is model


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.ModuleDict({"q_proj": nn.Linear(8, 8)}))


class Stack(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(name) for name in names)


def test_blocks_without_attention_are_listed() -> None:
    sites = find_sites(Stack("self_attn", "mamba", "attn", "mixer"))
    assert [(site.name, site.target, site.layer) for site in sites.attentions] == [
        ("layers.0.self_attn", "self_attn", 0),
        ("layers.2.attn", "attn", 2),
    ]
    assert sites.blocks_without == ("layers.1", "layers.3")
    assert sites.layers == [0, 2]


def test_an_unknown_model_is_refused_with_what_was_found() -> None:
    with pytest.raises(PreskipError) as caught:
        find_sites(Stack("token_mixer", "token_mixer"))
    message = str(caught.value)
    assert message.startswith("no self-attention found in Stack (looked for self_attn, self_attention, attention, attn")
    assert "found layers: token_mixer" in message
    assert "target_modules" in message
    with pytest.raises(PreskipError, match="no self-attention found in Linear"):
        find_sites(nn.Linear(2, 2))


def test_coverage_names_what_is_missing_and_what_is_too_much() -> None:
    sites = find_sites(Stack("self_attn", "self_attn", "self_attn"))
    names = [site.name for site in sites.attentions]
    assert coverage(names, sites, [0, 1, 2]) == ""
    assert coverage(names[:1], sites, [0]) == ""
    assert coverage(names[:2], sites, [0, 1, 2]) == "1 of 3 attentions get no branch (layers.2.self_attn)"
    extra = coverage([*names, "tower.layers.0.self_attn"], sites, [0, 1, 2])
    assert extra == "matched outside the chosen layers or twice in one (tower.layers.0.self_attn)"


def test_the_width_comes_from_the_input_projection() -> None:
    for name in zoo.FAMILIES:
        model = zoo.build(name)
        for site in find_sites(model).attentions:
            attention = model.get_submodule(site.name)
            try:
                assert input_width(attention) == zoo.WIDTH, name
            except PreskipError:
                assert input_width(attention, 32) == zoo.WIDTH, name
    unknown = nn.ModuleDict({"mystery": nn.Linear(8, 8)})
    assert input_width(unknown, 8) == 8
    with pytest.raises(PreskipError, match="input width of ModuleDict is unknown"):
        input_width(unknown)


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


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
@torch.no_grad()
def test_a_deep_copy_is_independent(name: str) -> None:
    model = zoo.build(name)
    add_branches(model, "residual")
    before = zoo.logits(model, name)
    twin = copy.deepcopy(model)
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

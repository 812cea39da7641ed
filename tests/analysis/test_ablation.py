"""Switching off one part of one layer, against models written out and against plain passes on every family."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, silu

import zoo
from equations import attention, enriched, heads, linear, norm, rms_norm, rotate
from preskip.analysis.ablation import ablate, ablation_passes, switched_off
from preskip.analysis.branches import live_branches, parts_of
from preskip.data.blocks import Window
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import score_sequences
from preskip.stats import paired_ratio_difference
from tiny_explain import adapted, crossed_llama

WINDOWS = [
    Window(np.random.default_rng(i).integers(8, zoo.VOCABULARY, size).tolist(), 1 + i % 3)
    for i, size in enumerate((9, 12, 7, 12, 10))
]
OWNERS, SIZES = [0, 0, 1, 2, 2], [50, 20, 70, 99]
TEXT = [name for name, family in zoo.FAMILIES.items() if family.causal and family.kind == "text"]
PARTS = ("skip", "enrichment")


def branch_weights(branches):
    return [{part: w.weight.detach() for part, w in b.module.linears("default").items()} for b in branches]


def llama(ids, s, branches, off):
    x = s["model.embed_tokens.weight"][ids]
    for i, b in enumerate(branches):
        p = f"model.layers.{i}"
        plain = rms_norm(x, s[f"{p}.input_layernorm.weight"])
        both = enriched(plain, b)
        read = plain if off == (i, "enrichment") else both
        skip = 0 if off == (i, "skip") else both @ b["skip"].T
        q, k, v = (heads(linear(read, s, f"{p}.self_attn.{n}_proj"), h) for n, h in (("q", 4), ("k", 2), ("v", 2)))
        x = x + linear(attention(rotate(q, 8), rotate(k, 8), v), s, f"{p}.self_attn.o_proj") + skip
        y = rms_norm(x, s[f"{p}.post_attention_layernorm.weight"])
        gate, up = linear(y, s, f"{p}.mlp.gate_proj"), linear(y, s, f"{p}.mlp.up_proj")
        x = x + linear(silu(gate) * up, s, f"{p}.mlp.down_proj")
    return rms_norm(x, s["model.norm.weight"]) @ s["lm_head.weight"].T


def gpt_neox(ids, s, branches, off):
    x = s["gpt_neox.embed_in.weight"][ids]
    for i, b in enumerate(branches):
        p = f"gpt_neox.layers.{i}"
        plain = norm(x, s, f"{p}.input_layernorm")
        both = enriched(plain, b)
        read = plain if off == (i, "enrichment") else both
        skip = 0 if off == (i, "skip") else both @ b["skip"].T
        q, k, v = heads(linear(read, s, f"{p}.attention.query_key_value"), 4).chunk(3, -1)
        out = linear(attention(rotate(q, 2), rotate(k, 2), v), s, f"{p}.attention.dense")
        y = norm(x, s, f"{p}.post_attention_layernorm")
        x = x + out + skip + linear(gelu(linear(y, s, f"{p}.mlp.dense_h_to_4h")), s, f"{p}.mlp.dense_4h_to_h")
    return norm(x, s, "gpt_neox.final_layer_norm") @ s["lm_head.weight"].T


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "equation"), [("llama", llama), ("gpt_neox", gpt_neox)])
@torch.no_grad()
def test_switched_off_is_the_model_written_out_without_it(name, equation, part):
    state, ids = zoo.build(name).state_dict(), zoo.inputs(name)["input_ids"]
    model = adapted(name).get_base_model()
    layers = live_branches(model)
    branches = branch_weights(layers)
    on = zoo.logits(model, name)
    assert zoo.difference(on, equation(ids, state, branches, None)) <= 1e-5
    for index, branch in enumerate(layers):
        with switched_off(branch, part):
            off = zoo.logits(model, name)
        assert zoo.difference(off, equation(ids, state, branches, (index, part))) <= 1e-5
        assert zoo.difference(off, on) > 1e-2
    assert torch.equal(zoo.logits(model, name), on)


@pytest.mark.parametrize("position", ["attention", "residual"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_every_family_and_position(name, position):
    """Without the skip: as with W_skip = 0. Without the enrichment: as the content variant in that layer."""
    model = adapted(name, skip_position=position).get_base_model()
    on = zoo.logits(model, name)
    for branch in live_branches(model):
        with switched_off(branch, "skip"):
            off = zoo.logits(model, name)
        weight = branch.module.linears("default")["skip"].weight
        kept = weight.clone()
        weight.zero_()
        assert zoo.difference(off, zoo.logits(model, name)) <= 1e-6
        weight.copy_(kept)
        with switched_off(branch, "enrichment"):
            off = zoo.logits(model, name)
        settings = branch.module.settings["default"]
        branch.module.settings["default"] = replace(settings, enrich_attention=False)
        assert zoo.difference(off, zoo.logits(model, name)) <= 1e-6
        branch.module.settings["default"] = settings
    assert torch.equal(zoo.logits(model, name), on)


@pytest.mark.parametrize("peer", ["canon-a", "canon", "gated-attention", "value-residual"])
@torch.no_grad()
def test_without_the_enrichment_a_peer_stays_and_reads_what_attention_reads(peer):
    model = crossed_llama(peer)
    on = zoo.logits(model, "llama")
    for branch in live_branches(model):
        with switched_off(branch, "enrichment"):
            off = zoo.logits(model, "llama")
        settings = branch.module.settings
        branch.module.settings = replace(settings, enrich_attention=False)
        assert zoo.difference(off, zoo.logits(model, "llama")) <= 1e-6
        assert zoo.difference(off, on) > 1e-4
        branch.module.settings = settings


@pytest.mark.parametrize(
    "name", [*TEXT, "preskip+canon", "preskip+gated-attention", "preskip+value-residual", "looped"]
)
def test_kept_blocks_change_no_bit(name):
    _, _, peer = name.partition("+")
    model = crossed_llama(peer) if peer else adapted("llama" if name == "looped" else name)
    if name == "looped":
        decoder = model.get_base_model().model
        decoder.layers = zoo.Looped(decoder.layers)
    rows = ablate(model, WINDOWS, OWNERS, SIZES)
    on = [score.nll for score in score_sequences(model, WINDOWS)]
    expected = []
    for branch in live_branches(model):
        for part in PARTS:
            with switched_off(branch, part):
                off = [score.nll for score in score_sequences(model, WINDOWS)]
            expected.append((branch.layer, part, (sum(off) - sum(on)) / (math.log(2) * sum(SIZES[:3]))))
    assert [(row["layer"], row["part"]) for row in rows] == [line[:2] for line in expected]
    assert [row["difference"] for row in rows] == pytest.approx([line[2] for line in expected], abs=1e-12)
    assert all(row["difference"] != 0 for row in rows)


def test_intervals_are_over_documents_and_batches_do_not_matter():
    model = adapted("llama")
    rows = ablate(model, WINDOWS, OWNERS, SIZES)
    on = np.bincount(OWNERS, weights=[score.nll for score in score_sequences(model, WINDOWS)])
    branch, *_ = live_branches(model)
    with switched_off(branch, "skip"):
        off = np.bincount(OWNERS, weights=[score.nll for score in score_sequences(model, WINDOWS)])
    interval = paired_ratio_difference(off, on, SIZES[:3])
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
    ratio = np.array(rows[0]["documents"]["above"]).sum() / np.array(rows[0]["documents"]["below"]).sum()
    assert ratio == pytest.approx(rows[0]["difference"], abs=1e-12)
    steps = []
    small = ablate(model, WINDOWS, OWNERS, SIZES, batch_tokens=24, advance=lambda done, note: steps.append(done))
    assert [row["difference"] for row in small] == pytest.approx([row["difference"] for row in rows], abs=1e-6)
    assert steps == list(range(1, ablation_passes(model, WINDOWS, batch_tokens=24) + 1))
    (only, *_) = ablate(model, WINDOWS, OWNERS, SIZES, parts=["enrichment"])
    assert (only["layer"], only["part"]) == (0, "enrichment")


def test_the_model_is_as_it_was():
    model = adapted("gemma2", skip_position="residual")
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def wiring():
        modules = list(model.modules())
        own = ("forward", "enrich", "content")
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), [n in vars(m) for n in own]) for m in modules]

    before = wiring()
    ablate(model, WINDOWS, OWNERS, SIZES)
    assert wiring() == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def fail(module, args):
        raise ValueError("stopped")

    branch, *_ = live_branches(model)
    handle = branch.attention.register_forward_pre_hook(fail)
    for part in PARTS:
        with (
            pytest.raises(ValueError, match="stopped"),
            switched_off(branch, part),
        ):
            zoo.logits(model, "gemma2")
    handle.remove()
    assert wiring() == before


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["skip", "enrichment"]),
        ({"content_skip": False}, ["enrichment"]),
        ({"preprojection": False}, ["skip"]),
        ({"enrich_attention": False}, ["skip"]),
        ({"enrich_attention": False, "content_skip": False}, ["skip"]),
        ({"skip_rank": 3, "gated": True}, ["skip", "enrichment"]),
    ],
)
def test_arms_have_rows_for_the_parts_they_have(settings, parts):
    model = adapted("llama", layers_to_transform=[1], **settings)
    rows = ablate(model, WINDOWS, OWNERS, SIZES)
    assert [(row["layer"], row["part"]) for row in rows] == [(1, part) for part in parts]
    assert all(abs(row["difference"]) > 1e-4 for row in rows)
    if parts == ["skip"]:  # nothing else was in there
        with model.disable_adapter():
            base = sum(score.nll for score in score_sequences(model, WINDOWS))
        on = sum(score.nll for score in score_sequences(model, WINDOWS))
        assert rows[0]["difference"] == pytest.approx((base - on) / math.log(2) / sum(SIZES[:3]), abs=1e-9)
    with model.disable_adapter():
        assert parts_of(model.get_base_model().model.layers[1].self_attn.preskip) == []


def test_bad_input():
    model = adapted("llama")
    with pytest.raises(PreskipError, match="1 document is too few for an interval: ablate on 2 or more"):
        ablate(model, WINDOWS[:2], [0, 0], SIZES)
    with pytest.raises(PreskipError, match="no layer has an active Preskip branch to switch off"):
        ablate(zoo.build("llama"), WINDOWS, OWNERS, SIZES)
    branch, *_ = live_branches(model)
    with (
        pytest.raises(PreskipError, match="part 'gate' cannot be switched off: choose skip or enrichment"),
        switched_off(branch, "gate"),
    ):
        pass

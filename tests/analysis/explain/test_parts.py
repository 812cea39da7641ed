"""Spectrum against numpy, promoted tokens against matrix products, attention patterns against a softmax by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from equations import enriched, heads, linear, rms_norm, rotate
from preskip.analysis.branches import live_branches, skip_weight
from preskip.analysis.explain.attention import attention_changes, describe
from preskip.analysis.explain.spectrum import spectrum
from preskip.analysis.explain.unembed import promoted_tokens
from tiny_explain import adapted, adapted_llama, crossed_llama
from tiny_text import tiny_tokenizer

TEXT = [name for name, family in zoo.FAMILIES.items() if family.causal and family.kind == "text"]


def test_spectrum_against_numpy():
    weight = torch.randn(90, 90)
    found = spectrum(weight)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found["spectrum"], values[:64], rtol=1e-4)
    shares = values / values.sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert found["stable_rank"] == pytest.approx((weight.norm() ** 2 / values[0] ** 2).item(), rel=1e-4)
    assert spectrum(torch.eye(8))["effective_rank"] == pytest.approx(8)
    assert spectrum(torch.zeros(8, 8)) == {"spectrum": [0.0] * 8, "effective_rank": None, "stable_rank": None}
    assert set(spectrum(None).values()) == {None}


def test_a_low_rank_skip_is_the_product():
    up, down = nn.Linear(3, 8, bias=False), nn.Linear(8, 3, bias=False)
    x = torch.randn(8)
    weight = skip_weight({"skip_up": up, "skip_down": down})
    torch.testing.assert_close(weight @ x, up(down(x)))
    assert spectrum(weight)["effective_rank"] <= 3.001


@torch.no_grad()
def test_promoted_tokens_against_a_matrix_product():
    model, tokenizer = adapted_llama(), tiny_tokenizer()
    state = model.get_base_model().state_dict()
    written = torch.randn(32)
    found = promoted_tokens(model, live_branches(model)[1], written, tokenizer)
    logits = state["lm_head.weight"] @ rms_norm(written, state["model.norm.weight"])
    logits = logits[: len(tokenizer)]
    order = logits.argsort(descending=True).tolist()
    for name, expected in (("promoted", order[:10]), ("demoted", order[::-1][:10])):
        assert [value for _, value in found[name]] == pytest.approx(logits[expected].tolist(), abs=1e-5)
        for (text, _), token in zip(found[name], expected, strict=True):
            assert text in (tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token))


@torch.no_grad()
def test_biases_promote_nothing_and_a_post_norm_is_passed():
    tokenizer = tiny_tokenizer()
    tokenizer_size = type("T", (), {"__len__": lambda self: zoo.VOCABULARY, "decode": lambda self, ids: f"t{ids[0]}"})()
    model = adapted("gpt_neox")
    written = torch.randn(zoo.WIDTH)
    base = model.get_base_model()
    norm = base.gpt_neox.final_layer_norm
    centred = written - written.mean()
    direct = base.embed_out.weight if hasattr(base, "embed_out") else base.lm_head.weight
    logits = direct @ (norm.weight * centred / (centred.pow(2).mean() + norm.eps).sqrt())
    found = promoted_tokens(model, live_branches(model)[0], written, tokenizer_size)
    assert found["promoted"][0] == [f"t{logits.argmax()}", pytest.approx(logits.max().item(), abs=1e-4)]
    assert found["demoted"][0] == [f"t{logits.argmin()}", pytest.approx(logits.min().item(), abs=1e-4)]
    for position in ("attention", "residual"):
        model = adapted("gemma2", skip_position=position)
        base = model.get_base_model()
        vector = written
        if position == "attention":
            vector = rms_norm(vector, 1 + base.model.layers[0].post_attention_layernorm.weight)
        logits = base.lm_head.weight @ rms_norm(vector, 1 + base.model.norm.weight)
        found = promoted_tokens(model, live_branches(model)[0], written, tokenizer_size)
        assert found["promoted"][0][1] == pytest.approx(logits.max().item(), rel=1e-4)
    assert len(tokenizer) > 0


def pattern(x, s, p, scale):
    """Attention weights [H, T, T] of one llama layer that reads x [1, T, d]."""
    q, k = (heads(linear(x, s, f"{p}.{n}_proj"), h) for n, h in (("q", 4), ("k", 2)))
    q, k = rotate(q, 8), rotate(k, 8).repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) * scale)[0]
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("peer", ["canon-a", "canon", "gated-attention", "value-residual"])
@torch.no_grad()
def test_attention_changes_beside_a_peer_are_those_of_two_passes(peer):
    """A pattern depends on this layer and those below, so the whole model without the enrichment says the same."""
    model = crossed_llama(peer)
    ids = np.random.default_rng(4).integers(8, zoo.VOCABULARY, 9).tolist()
    sums = attention_changes(model, live_branches(model), [ids])
    model.set_attn_implementation("eager")

    def described(layer):
        return np.array(describe(model(torch.tensor([ids]), output_attentions=True).attentions[layer]))

    for branch in live_branches(model):
        on, settings = described(branch.layer), branch.module.settings
        branch.module.settings = replace(settings, enrich_attention=False)
        off = described(branch.layer)
        branch.module.settings = settings
        np.testing.assert_allclose(sums[branch.layer, 0], [*(on - off), 8], atol=1e-5)
        assert np.abs(on - off).min() > 1e-4


@torch.no_grad()
def test_attention_changes_against_a_softmax_by_hand():
    model = adapted("llama")
    base = model.get_base_model()
    sequences = [np.random.default_rng(i).integers(8, zoo.VOCABULARY, 9 + i).tolist() for i in range(2)]
    sums = attention_changes(model, live_branches(model), sequences)
    assert base.config._attn_implementation == "sdpa"
    state = base.state_dict()
    for index, branch in enumerate(live_branches(model)):
        inputs = []
        handle = branch.attention.register_forward_pre_hook(
            lambda module, args, kwargs, inputs=inputs: inputs.append(kwargs["hidden_states"]),
            with_kwargs=True,
            prepend=True,
        )
        weights = {part: linear.weight for part, linear in branch.module.linears("default").items()}
        for number, ids in enumerate(sequences):
            base(torch.tensor([ids]))
            x = inputs.pop()
            changes = np.zeros(2)
            for sign, read in ((1, enriched(x, weights)), (-1, x)):
                rows = pattern(read, state, branch.site.name, 1 / math.sqrt(8)).double()
                logs = torch.where(rows > 0, rows.log(), 0.0)
                entropy, sink = -(rows * logs).sum(-1), rows[..., 0]
                changes += sign * np.array([entropy[:, 1:].mean(0).sum(), sink[:, 1:].mean(0).sum()])
            assert sums[index, number, 2] == len(ids) - 1
            np.testing.assert_allclose(sums[index, number, :2], changes, atol=1e-5)
        handle.remove()
    assert np.abs(sums[..., :2]).min() > 1e-3


def test_the_head_reads_one_token_and_is_as_before():
    model = adapted("llama")
    head = model.get_base_model().get_output_embeddings()
    read: list[int] = []
    handle = head.register_forward_hook(lambda module, args, logits: read.append(logits.shape[1]))
    attention_changes(model, live_branches(model), [[9, 10, 11, 12], [9, 10, 11, 12, 13]])
    assert read == [1, 1]
    model(input_ids=torch.tensor([[9, 10, 11, 12]]))
    assert read == [1, 1, 4]
    handle.remove()
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", TEXT)
def test_every_family_tells_its_attention_and_is_left_as_it_was(name):
    model = adapted(name)
    before = zoo.logits(model, name)
    implementation = model.get_base_model().config._attn_implementation
    sums = attention_changes(model, live_branches(model), [[9, 10, 11, 12, 13, 14]])
    assert np.isfinite(sums).all()
    assert np.abs(sums[..., 0]).min() > 0
    assert model.get_base_model().config._attn_implementation == implementation
    assert torch.equal(zoo.logits(model, name), before)


def test_uniform_attention_has_the_entropy_of_its_width():
    rows = torch.tril(torch.ones(5, 5))
    weights = (rows / rows.sum(-1, keepdim=True)).expand(1, 3, 5, 5)
    entropy, sink = describe(weights)
    assert entropy == pytest.approx(sum(math.log(n) for n in range(2, 6)), rel=1e-6)
    assert sink == pytest.approx(sum(1 / n for n in range(2, 6)), rel=1e-6)

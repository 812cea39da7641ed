"""Value residual and value embeddings against attention written out, in outputs and gradients."""

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import preskip.architecture  # noqa: F401
import zoo
from preskip.errors import PreskipError
from preskip.peers.insert import attach_peers, peer_weights
from tiny_model import tiny_llama

IDS = torch.tensor([[10, 11, 12, 13, 14, 15, 16], [30, 31, 1, 33, 34, 35, 36]])


def written_out(model, ids, change):
    """Logits of a Llama whose values `change(layer, v, x, first)` replaces, [B, T, W] each."""
    inner, config = model.model, model.config
    hidden = inner.embed_tokens(ids)
    cos, sin = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    blocked = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    first = None
    for index, layer in enumerate(inner.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        first = v if first is None else first
        v = change(index, v, x, first)
        q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, shared), (v, shared)))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (t.repeat_interleave(heads // shared, dim=1) for t in (k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + blocked).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).flatten(-2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


def gradients(model, logits):
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(model, change):
    """Hooks on the projections add nothing to what `change` says; `change` works on a copy without them."""
    plain = tiny_llama(num_hidden_layers=3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".peers." not in k})
    theirs, ours = written_out(plain, IDS, change), model(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    wanted, found = gradients(plain, theirs), gradients(model, ours)
    assert wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
    return found


def from_scratch(**peers):
    torch.manual_seed(5)
    plain = {k: v for k, v in tiny_llama(num_hidden_layers=3).config.to_dict().items() if k != "model_type"}
    config = AutoConfig.for_model(
        "preskip_llama", **plain, preskip_layers=[], preskip_peers={k.replace("_", "-"): v for k, v in peers.items()}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_from_scratch_values_are_half_their_own_and_half_the_first_layers():
    model = from_scratch(value_residual={})
    assert not peer_weights(model)
    assert_same(model, lambda layer, v, x, first: v if layer == 0 else 0.5 * first + 0.5 * v)


def test_the_two_factors_are_trained_from_identity():
    model = tiny_llama(num_hidden_layers=3)
    before = model(IDS).logits
    attach_peers(model, {"value-residual": {}}, identity=True)
    assert torch.equal(model(IDS).logits, before)
    weights = list(peer_weights(model).values())
    assert [weight.tolist() for weight in weights] == [[0.0, 1.0], [0.0, 1.0]]
    with torch.no_grad():
        weights[0].copy_(torch.tensor([0.3, 0.8]))
        weights[1].copy_(torch.tensor([-0.2, 1.1]))
    own = [weight.detach().clone().requires_grad_() for weight in weights]

    def change(layer, v, x, first):
        return v if layer == 0 else own[layer - 1][0] * first + own[layer - 1][1] * v

    found = assert_same(model, change)
    mine = [gradient for name, gradient in found.items() if ".peers." in name]
    for gradient, weight in zip(mine, own, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-4, rtol=1e-3)


def test_value_embeddings_join_the_values_through_a_gate_per_head():
    model = from_scratch(value_embed={"layers": [0, 2]})
    tables = {i: layer.peers["value_embed"] for i, layer in enumerate(model.model.layers)}
    assert [len(tables[i]) for i in range(3)] == [1, 0, 1]
    made = {i: held["mix"] for i, held in tables.items() if len(held)}
    for held in made.values():
        assert held.table.weight.shape == (400, 16)
        assert held.table.weight.abs().max() <= math.sqrt(3 / 32)
        assert held.table.weight.std().item() == pytest.approx(1 / math.sqrt(32), rel=0.05)
        assert not held.gate.any()
        with torch.no_grad():
            held.gate.normal_()
    copies = {i: (h.table.weight.detach().clone(), h.gate.detach().clone()) for i, h in made.items()}
    own = {i: (table.requires_grad_(), gate.requires_grad_()) for i, (table, gate) in copies.items()}

    def change(layer, v, x, first):
        if layer not in own:
            return v
        table, gate = own[layer]
        heads = [3 / (1 + torch.exp(-(x[..., :12] * gate[h]).sum(-1, keepdim=True))) for h in range(2)]
        return v + torch.cat([heads[h] * table[IDS][..., 8 * h : 8 * h + 8] for h in range(2)], dim=-1)

    found = assert_same(model, change)
    for i, (table, gate) in own.items():
        prefix = f"model.layers.{i}.peers.value_embed.mix"
        torch.testing.assert_close(found[f"{prefix}.table.weight"], table.grad, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found[f"{prefix}.gate"], gate.grad, atol=1e-4, rtol=1e-3)
    with pytest.raises(PreskipError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=model.model.embed_tokens(IDS))
    model.resize_token_embeddings(400)
    with pytest.raises(PreskipError, match="a row per token, which does not grow with the vocabulary"):
        model.resize_token_embeddings(410)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 400


@pytest.mark.parametrize("peers", [{"value_residual": {}}, {"value_embed": {"layers": [0, 2]}}])
def test_generation_with_cache_is_that_without(peers):
    model = from_scratch(**peers)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    found = [model.generate(IDS, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("peers", [{"value-residual": {}}, {"canon": {}}])
def test_checkpointing_gives_the_same_gradients(peers):
    model = tiny_llama(num_hidden_layers=3)
    attach_peers(model, peers)
    wanted = gradients(model.train(), model(IDS, use_cache=False).logits)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, model(IDS, use_cache=False).logits)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    if "value-residual" in peers:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        with pytest.raises(PreskipError, match="give use_reentrant=False"):
            gradients(model, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("peers", [{"value-residual": {}}, {"canon": {}}])
def test_checkpointing_of_several_passes_before_one_backward_gives_the_same_gradients(peers):
    """Their documents end at different places, and a pass without gradients comes last."""
    model = tiny_llama(num_hidden_layers=3)
    attach_peers(model, peers)
    batches = [IDS, torch.tensor([[20, 1, 22, 23, 1], [40, 41, 42, 1, 44]])]

    def found():
        summed = sum(model(ids, use_cache=False).logits.square().mean() for ids in batches)
        with torch.no_grad():
            model(IDS[:1, :3])
        model.zero_grad()
        summed.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    wanted = found()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in found().items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "phi3"])
def test_values_inside_a_joint_projection(family):
    """Where λ = (0, 2), attention's output is doubled before its projection: in a joint one nothing else may change."""
    model = zoo.build(family).eval()
    ids = torch.arange(5, 15)[None]
    before = model(ids).logits
    attach_peers(model, {"value-residual": {}}, identity=True)
    assert torch.equal(model(ids).logits, before)
    seen = []
    outputs = [m for name, m in model.named_modules() if name.endswith(("attention.dense", "attn.c_proj", "o_proj"))]
    handle = outputs[1].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(ids)
    with torch.no_grad():
        for weight in peer_weights(model).values():
            weight.copy_(torch.tensor([0.0, 2.0]))
    model(ids)
    handle.remove()
    torch.testing.assert_close(seen[1], 2 * seen[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_what_cannot_have_them_is_refused():
    with pytest.raises(PreskipError, match="needs two layers or more"):
        attach_peers(tiny_llama(), {"value-residual": {}}, targets=["model.layers.1.self_attn"], identity=True)
    with pytest.raises(PreskipError, match="from scratch only"):
        attach_peers(tiny_llama(), {"value-embed": {"layers": [1]}}, identity=True)
    with pytest.raises(PreskipError, match="not known where FalconAttention makes its values"):
        attach_peers(zoo.build("falcon"), {"value-residual": {}}, identity=True)
    model = tiny_llama(num_hidden_layers=3)
    attach_peers(model, {"value-residual": {}})
    model.model.layers = zoo.Looped(model.model.layers)
    with pytest.raises(PreskipError, match="run several times in a pass"):
        model(IDS)

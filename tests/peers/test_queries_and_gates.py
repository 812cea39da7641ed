"""Nonlinear queries, gated attention and gated branches against transformers' code or equations, with gradients."""

import copy
import math
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

import preskip.architecture  # noqa: F401
import zoo
from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError
from preskip.evaluate.adapters import load_adapter
from preskip.peers.insert import attach_peers, detach_peers, peer_weights, peers_off, save_peers
from tiny_model import tiny_llama

IDS = torch.tensor([[10, 11, 12, 13, 14, 15, 16], [30, 31, 1, 33, 34, 35, 36]])
NEOX_OUTPUT = "gpt_neox.layers.0.attention.dense"


def from_scratch(peers, kind="llama", **fields):
    torch.manual_seed(5)
    plain = {**tiny_llama(num_hidden_layers=3).config.to_dict(), **fields}
    plain = {key: value for key, value in plain.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(f"preskip_{kind}", **{"preskip_layers": [], "preskip_peers": peers, **plain})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def written_out(model, query, x_added, heads_changed=lambda layer, x, y: y):
    """Logits of a Llama: `query(layer, x)` gives x̃ and q [B, T, d], `x_added` what joins attention's output."""
    inner, config = model.model, model.config
    hidden = inner.embed_tokens(IDS)
    cos, sin = inner.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    blocked = torch.full((IDS.shape[1], IDS.shape[1]), -torch.inf).triu(1)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    for index, layer in enumerate(inner.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        read, q, scale = query(index, attention, x)
        k, v = attention.k_proj(read), attention.v_proj(read)
        q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, shared), (v, shared)))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (t.repeat_interleave(heads // shared, dim=1) for t in (k, v))
        weights = (q @ k.transpose(-1, -2) * scale + blocked).softmax(-1)
        y = heads_changed(index, x, (weights @ v).transpose(1, 2))  # [B, T, heads, h]
        hidden = hidden + attention.o_proj(y.flatten(-2)) + x_added(index, x)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


def gradients(logits, weights):
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((logits * factors).sum(), weights)


def assert_same(model, logits):
    """Logits and all gradients of a model with hooks are those of a computation that uses its weights."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    own = model(IDS, use_cache=False).logits
    torch.testing.assert_close(own, logits, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(gradients(own, weights), gradients(logits, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def assert_cache_changes_nothing(model):
    """A prompt, then one token after the other with the cache, against one pass."""
    whole = model(IDS, use_cache=False).logits
    out = model(IDS[:, :4], use_cache=True)
    parts = [out.logits]
    for index in range(4, IDS.shape[1]):
        out = model(IDS[:, index : index + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_nonlinear_queries_are_the_equation_at_the_weights_of_a_matrix():
    model = from_scratch({"nonlinear-q": {}})
    plain = tiny_llama(num_hidden_layers=3)
    d = model.config.hidden_size
    assert model.num_parameters() == plain.num_parameters() + 3 * 2 * d
    held = [layer.peers["nonlinear_q"]["query"] for layer in model.model.layers]
    for made in held:
        assert made.up.std().item() == pytest.approx(0.02, rel=0.1)
        assert made.norm.eq(1).all()
        assert made.norm_out.eq(1).all()
        with torch.no_grad():
            made.up.normal_()
            made.norm.uniform_(0.5, 1.5)
            made.norm_out.uniform_(0.5, 1.5)

    def query(layer, attention, x):
        made = held[layer]
        normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * made.norm
        inner = normed @ made.up.T
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        out = inner @ made.down.T
        centred = out - out.mean(-1, keepdim=True)
        out = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * made.norm_out
        return x, x + out, 0.5 / math.sqrt(attention.head_dim)

    assert_same(model, written_out(model, query, lambda layer, x: 0))
    assert_cache_changes_nothing(model)


def test_nonlinear_queries_need_a_matrix_of_their_own_and_of_the_models_width():
    with pytest.raises(PreskipError, match="in one matrix"):
        attach_peers(zoo.build("gpt2"), {"nonlinear-q": {}})
    with pytest.raises(PreskipError, match="queries of width 64 cannot begin as x̂ of width 32"):
        from_scratch({"nonlinear-q": {}}, head_dim=16, num_attention_heads=4)
    for name in ("nonlinear-q", "gated-attention"):
        with pytest.raises(PreskipError, match="from scratch only"):
            attach_peers(tiny_llama(), {name: {}}, identity=True)
    with pytest.raises(PreskipError, match="on a frozen model only"):
        from_scratch({"gated-branch": {}})


def test_both_are_saved_and_loaded_whole_beside_a_branch_and_train(tmp_path):
    peers = {"nonlinear-q": {}, "gated-attention": {}}
    model = from_scratch(peers, preskip_layers=[0, 2])
    assert not [name for name, _ in model.named_parameters() if "q_proj" in name]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert_cache_changes_nothing(again)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, again):
        each.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    others = dict(again.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad.abs().sum() > 0, name
        torch.testing.assert_close(weight.grad, others[name].grad, atol=1e-6, rtol=1e-4)


def test_where_queries_are_normed_the_scale_stays():
    shape = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    scales = {kind: from_scratch({"nonlinear-q": {}}, kind, **shape).model.layers[0].self_attn.scaling for kind in
              ("qwen3", "llama")}  # fmt: skip
    assert scales == {"qwen3": 8**-0.5, "llama": 0.5 * 8**-0.5}


def test_a_gate_per_head_is_transformers_own_with_one_gate_for_all_channels_of_a_head():
    """Qwen3NextAttention has a gate per channel; its norms have gains of 1 + w, and ours are made to agree."""
    torch.manual_seed(0)
    heads, width, h = 4, 32, 8
    shape = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": h}
    shape |= {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 50}
    theirs = Qwen3NextAttention(Qwen3NextConfig(**shape, attn_implementation="eager"), 0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), attn_implementation="eager").eval()
    attach_peers(model, {"gated-attention": {}})
    ours = model.model.layers[0].self_attn
    gate = model.model.layers[0].peers["gated_attention"]["gate"]
    with torch.no_grad():
        gate.weight.normal_()
        rows = gate.weight[:, None].expand(heads, h, width)
        both = torch.cat((ours.q_proj.weight.unflatten(0, (heads, h)), rows), dim=1)
        theirs.q_proj.weight.copy_(both.flatten(0, 1))
        for name in ("k_proj", "v_proj", "o_proj"):
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight)
        for name in ("q_norm", "k_norm"):
            getattr(ours, name).weight.uniform_(0.5, 1.5)
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight - 1)
    x = torch.randn(2, 6, width)
    turns = torch.randn(1, 6, h)
    positions = (turns.cos(), turns.sin())
    mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mine = ours(hidden_states=inputs[0], position_embeddings=positions, attention_mask=mask)[0]
    wanted = theirs(hidden_states=inputs[1], position_embeddings=positions, attention_mask=mask)[0]
    torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-5)
    factors = torch.randn(mine.shape)
    (mine * factors).sum().backward()
    (wanted * factors).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    queries, gates = theirs.q_proj.weight.grad.unflatten(0, (heads, 2, h)).unbind(1)
    torch.testing.assert_close(ours.q_proj.weight.grad, queries.flatten(0, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gate.weight.grad, gates.sum(1), atol=1e-5, rtol=1e-4)


def test_gates_per_head_from_scratch():
    model = from_scratch({"gated-attention": {}})
    heads, d = model.config.num_attention_heads, model.config.hidden_size
    assert model.num_parameters() == tiny_llama(num_hidden_layers=3).num_parameters() + 3 * heads * d
    weights = list(peer_weights(model).values())
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.15)
    assert_cache_changes_nothing(model)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("kind", "path"), [("gpt2", "transformer.h.0.attn.c_proj"), ("gpt_neox", NEOX_OUTPUT)])
def test_a_gate_of_a_half_halves_what_the_output_projection_reads(kind, path):
    read = []
    for gated in (False, True):
        model = zoo.build(kind).eval()
        if gated:
            attach_peers(model, {"gated-attention": {}})
            for weight in peer_weights(model).values():
                torch.nn.init.zeros_(weight)
        model.get_submodule(path).register_forward_pre_hook(lambda module, args: read.append(args[0]))
        model(IDS)
    torch.testing.assert_close(read[1], 0.5 * read[0])


@pytest.mark.parametrize("enriches", [False, True])
def test_a_gated_branch_starts_at_identity_and_is_the_equation(enriches, tmp_path):
    settings = BranchSettings(enrich_attention=enriches)
    model = tiny_llama(num_hidden_layers=3, attn_implementation="eager")
    d, before = model.config.hidden_size, model(IDS).logits
    peers = {"gated-branch": asdict(settings)}
    attach_peers(model, peers, identity=True)
    assert torch.equal(model(IDS).logits, before)
    held = [layer.peers["gated_branch"]["gated"] for layer in model.model.layers]
    assert held[0].gate(torch.randn(1, 2, d)).flatten().tolist() == pytest.approx([1 / (1 + math.exp(2))] * 2)
    weights = list(peer_weights(model).values())
    assert sum(weight.numel() for weight in weights) == 3 * (settings.cost(d).parameters + d + 1)
    assert held[0].flops_per_token == settings.cost(d).flops_per_token + 2 * d + d * (1 + enriches)
    first = gradients(model(IDS).logits, weights)
    assert all(grad.abs().max() > 0 for (name, _), grad in zip(peer_weights(model).items(), first, strict=True)
               if name.endswith("skip.weight"))  # fmt: skip
    with torch.no_grad():
        for weight in weights:
            weight.normal_(0, 0.2)

    def parts(layer, x):
        made = held[layer]
        g = 1 / (1 + torch.exp(-(x * made.weight).sum(-1, keepdim=True) - made.bias))
        inner = x @ made.branch.up.weight.T
        feature = (inner / (1 + torch.exp(-inner))) @ made.branch.down.weight.T
        enriched = x + g * feature if enriches else x + feature
        return enriched, g * (enriched @ made.branch.skip.weight.T)

    def query(layer, attention, x):
        read = parts(layer, x)[0] if enriches else x
        return read, attention.q_proj(read), 1 / math.sqrt(attention.head_dim)

    assert_same(model, written_out(model, query, lambda layer, x: parts(layer, x)[1]))
    assert_cache_changes_nothing(model)
    changed = model(IDS).logits
    assert not torch.equal(changed, before)
    with torch.no_grad():
        for made in held:
            made.bias.fill_(-200.0)  # closed: σ is 0 in float32
    assert torch.equal(model(IDS).logits, before)
    with torch.no_grad():
        for made in held:
            made.bias.fill_(1.0)
    save_peers(model, tmp_path, peers)
    again = load_adapter(tiny_llama(num_hidden_layers=3, attn_implementation="eager"), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with peers_off(model):
        assert torch.equal(model(IDS).logits, before)
    detach_peers(model)
    assert torch.equal(model(IDS).logits, before)

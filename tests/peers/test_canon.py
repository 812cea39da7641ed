"""Canon layers against torch's own convolution, and what they may not mix: documents, padding, later tokens."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import preskip.architecture  # noqa: F401
import zoo
from preskip.errors import PreskipError
from preskip.kv_cache import cache_name
from preskip.peers.canon import CausalMix, _Mix, causal_mix
from preskip.peers.insert import attach_peers, detach_peers, load_peers, peer_weights, save_peers
from preskip.peers.tokens import Tokens
from preskip.train.frozen import train_frozen
from preskip.train.settings import TrainingSettings
from tiny_model import tiny_llama

END = 1  # of tiny_llama's documents


def mixing(name="canon", start=0.3):
    """A tiny Llama whose Canon layers do something."""
    model = tiny_llama()
    attach_peers(model, {name: {}}, identity=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in peer_weights(model).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * start)
    return model


def test_outputs_and_gradients_are_those_of_a_convolution():
    """nn.Conv1d in groups of one channel, padded on the left, its kernel in the other order, beside its input."""
    torch.manual_seed(0)
    tokens = Tokens(tiny_llama().config)
    ids = torch.arange(5, 5 + 22).reshape(2, 11)
    tokens.begin(nn.Module(), (ids,), {"use_cache": False})
    ours = CausalMix(6, tokens, "m", identity=False)
    reference = nn.Conv1d(6, 6, 4, groups=6, bias=False, padding=3)
    with torch.no_grad():
        reference.weight.copy_(ours.weight.flip(0).t()[:, None])
    inputs = [torch.randn(2, 11, 6).requires_grad_() for _ in range(1)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    mine = ours(inputs[0])
    theirs = inputs[1] + reference(inputs[1].transpose(1, 2))[..., :11].transpose(1, 2)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(mine)
    mine.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad[:, 0].t().flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_autograds_at_documents_borders_and_in_mixed_dtypes(dtype):
    """The backward pass that is written out, against autograd's of the formula, to which it is held to second order."""
    torch.manual_seed(0)
    kept = [(torch.rand(2, 7, 1) > 0.4).to(dtype) for _ in range(3)]
    weight = torch.randn(4, 5, requires_grad=True)
    whole, upstream = torch.randn(2, 10, 5).to(dtype).requires_grad_(), torch.randn(2, 7, 5)
    exact = (whole.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    ours = _Mix.apply(whole, weight, *kept)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, causal_mix(whole, weight, *kept))
    mine = torch.autograd.grad(ours, (whole, weight), upstream)
    theirs = torch.autograd.grad(causal_mix(*exact, *kept), exact, upstream.double())
    assert [found.dtype for found in mine] == [dtype, torch.float32]
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype))
    assert torch.autograd.gradcheck(lambda *inputs: _Mix.apply(*inputs, *kept), exact)
    assert torch.autograd.gradgradcheck(lambda *inputs: _Mix.apply(*inputs, *kept), exact)


def test_compiled_it_is_the_same():
    """The gradients too: a compiled backward pass reads what reaches it by strides."""
    model, ids = mixing(), torch.arange(5, 17).reshape(2, 6)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        output = run(ids, labels=ids, use_cache=False)
        gradients = torch.autograd.grad(output.loss, [*peer_weights(model).values()])
        found.append((output.logits, gradients))
    torch.testing.assert_close(*found)


def test_gradients_of_torch_func_are_the_same():
    model, ids = mixing(), torch.arange(5, 17).reshape(2, 6)
    weights = peer_weights(model)
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = torch.func.grad(
        lambda given: functional_call(model, given, (ids,), {"labels": ids, "use_cache": False}).loss
    )({name: weight.detach() for name, weight in model.named_parameters()})
    torch.testing.assert_close(
        {name: found[name] for name in weights}, {name: weight.grad for name, weight in weights.items()}
    )


def test_the_start_is_torchs_for_a_convolution():
    torch.manual_seed(0)
    weight = CausalMix(4096, Tokens(tiny_llama().config), "m", identity=False).weight
    torch.manual_seed(0)
    reference = nn.Conv1d(4096, 4096, 4, groups=4096, bias=False).weight
    for found in (weight, reference):
        assert found.abs().max() <= 0.5
        assert found.std().item() == pytest.approx(12**-0.5, rel=0.02)


@pytest.mark.parametrize("name", ["canon-a", "canon"])
def test_packed_documents_are_as_if_each_were_alone(name):
    """Each document ends with the end token. Attention sees the block as one, so it is kept apart by a mask."""
    model = mixing(name)
    first, second = torch.arange(10, 17), torch.arange(20, 29)
    first[-1] = second[-1] = END
    packed = torch.cat((first, second))[None]
    seen = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        for ids in (packed, first[None], second[None]):
            model(ids)
    whole, *parts = seen
    assert torch.equal(whole[:, :7], parts[0])
    torch.testing.assert_close(whole[:, 7:], parts[1])
    handle.remove()


@pytest.mark.parametrize("name", ["canon-a", "canon"])
def test_position_ids_that_start_again_start_a_document(name):
    """transformers keeps such documents apart in attention, too: every logit is that of the document alone."""
    model = mixing(name)
    parts = [torch.arange(10, 16)[None], torch.arange(30, 41)[None]]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with torch.no_grad():
        packed = model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_mixed(side):
    model = mixing()
    ids, padding = torch.arange(10, 19)[None], torch.full((1, 4), 77)
    left = side == "left"
    padded = torch.cat((padding, ids) if left else (ids, padding), dim=1)
    mask = torch.ones_like(padded)
    where = slice(4, None) if left else slice(0, 9)
    mask[:, : 4 if left else 0] = 0
    if not left:
        mask[:, 9:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, where]
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)
        by_place = model.model(padded, mask, positions).last_hidden_state
        torch.testing.assert_close(model.lm_head(by_place)[:, where], found)
        other = torch.where(mask == 0, 55, padded)
        assert torch.equal(found, model(other, attention_mask=mask, position_ids=positions).logits[:, where])


def test_no_token_depends_on_a_later_one():
    model = mixing()
    ids = torch.arange(10, 22)[None]
    other = ids.clone()
    other[:, 8:] = 50
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :8], model(other).logits[:, :8])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_cache_is_that_without(beams):
    """Left-padded rows, one with an end token inside; beams are put in another order, and their tails with them."""
    model = mixing(start=0.8)
    ids = torch.tensor([[77, 77, 11, 12, 13, 14], [21, 22, 1, 24, 25, 26]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = [model.generate(ids, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)
    plain = tiny_llama().generate(ids, attention_mask=mask, **options)
    assert not torch.equal(plain, found[0]), "the layers do nothing"


def test_a_text_read_in_parts_has_the_same_logits():
    model = mixing()
    ids = torch.tensor([[11, 12, 13, END, 15, 16, 17, 18, 19, 20]])
    with torch.no_grad():
        whole = model(ids).logits
        for cuts in ([4, 6], [1, 1, 1, 1, 6], [2, 1, 7], [5, 5]):
            cache, found = None, []
            for part in ids.split(cuts, dim=1):
                output = model(part, **{cache_name(): cache}, use_cache=True)
                cache = output[cache_name()]
                found.append(output.logits)
            torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)
            with pytest.raises(PreskipError, match="cannot be cut back"):
                cache.crop(-1)


def test_a_cache_without_the_last_tokens_is_refused():
    model, ids = mixing(), torch.arange(10, 16)[None]
    with torch.no_grad():
        cache = tiny_llama()(ids, use_cache=True)[cache_name()]
        for name in {cache_name(), "past_key_values"}:
            with pytest.raises(PreskipError, match="the cache lacks the last tokens"):
                model.model(ids, **{name: cache})


def test_layers_that_run_twice_in_a_pass_have_no_cache_of_their_tokens():
    model, ids = mixing(), torch.arange(10, 16)[None]
    model.model.layers = zoo.Looped(model.model.layers)
    with torch.no_grad():
        filled = model(ids, use_cache=True)
        with pytest.raises(PreskipError, match="the cache lacks the last tokens"):
            model(ids, **{cache_name(): filled[cache_name()]})


def test_generation_that_cuts_the_cache_back_or_prepares_masks_is_refused():
    model, ids = mixing(), torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    # transformers asks the cache itself since 5.24.
    with pytest.raises((PreskipError, ValueError), match=r"cannot be cut back|that can be cropped"):
        model.generate(ids, prompt_lookup_num_tokens=2, **options)
    with pytest.raises(PreskipError, match="leave static caches and prepared masks out"):
        model.generate(ids, attention_mask=(ids != 11).long(), cache_implementation="static", **options)


def test_decoding_with_a_static_cache_is_that_without():
    """`generate` prepares a mask for such a cache, and is refused."""
    model, ids = mixing(), torch.arange(5, 25)[None]
    expected = model(ids, use_cache=False).logits
    cache = {cache_name(): StaticCache(config=model.config, max_cache_len=40)}
    with torch.no_grad():
        found = [model(ids[:, :15], use_cache=True, **cache).logits]
        found += [model(ids[:, [place]], use_cache=True, **cache).logits for place in range(15, 20)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    with pytest.raises(PreskipError, match="leave static caches and prepared masks out"):
        model.generate(ids, cache_implementation="static", max_new_tokens=4, pad_token_id=0)


def test_a_mask_that_does_not_show_padding_is_refused():
    model, ids = mixing(), torch.arange(10, 16)[None]
    with pytest.raises(PreskipError, match=r"needs the attention mask as \[batch, tokens\]"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "phi3"])
def test_at_identity_nothing_changes_and_taking_it_out_leaves_no_trace(family):
    model = zoo.build(family).eval()
    ids = torch.arange(5, 15)[None]
    before, keys = model(ids).logits, list(model.state_dict())
    attach_peers(model, {"canon": {}}, identity=True)
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, before)
    model(ids).logits.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in peer_weights(model).values())
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        detach_peers(each)
        assert list(each.state_dict()) == keys
        assert not [m for m in each.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert torch.equal(each(ids).logits, before)


def test_saved_peers_load_again(tmp_path):
    model, ids = mixing(), torch.arange(10, 20)[None]
    wanted = model(ids).logits
    save_peers(model, tmp_path, {"canon": {}})
    fresh = tiny_llama()
    load_peers(fresh, tmp_path)
    assert torch.equal(fresh(ids).logits, wanted)
    with pytest.raises(PreskipError, match="has peers in its blocks already"):
        load_peers(fresh, tmp_path)
    assert torch.equal(fresh(ids).logits, wanted)
    with pytest.raises(PreskipError, match="does not fit this model"):
        load_peers(tiny_llama(hidden_size=64), tmp_path)


def test_a_model_from_scratch_saves_and_loads(tmp_path):
    plain = tiny_llama().config.to_dict()
    config = AutoConfig.for_model(
        "preskip_llama", **{k: v for k, v in plain.items() if k != "model_type"}, preskip_layers=[],
        preskip_peers={"canon": {}},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(10, 20)[None]
    wanted = model(ids).logits
    assert all(weight.std() > 0.2 for weight in peer_weights(model).values()), "the paper's start, not zero"
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)
    with pytest.raises(PreskipError, match="there is no peer 'canon-z': choose from canon-a, canon"):
        AutoConfig.for_model("preskip_llama", preskip_peers={"canon-z": {}})


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """What a second call reads of the first one's checkpoint is what the first one has trained."""
    blocks = np.random.default_rng(0).integers(2, 400, (8, 16)).astype(np.int32)
    settings = TrainingSettings(steps=3, batch_size=4, micro_batch_size=2, learning_rate=1e-2, seed=1, save_steps=1)
    trained = []
    for _ in range(2):
        model = tiny_llama()
        for weight in model.parameters():
            weight.requires_grad_(False)
        attach_peers(model, {"canon": {}}, identity=True)
        rows = train_frozen(
            model, blocks, settings, arm="canon", checkpoints=tmp_path / "checkpoints", log=tmp_path / "train.jsonl"
        )
        trained.append({name: weight.detach().clone() for name, weight in peer_weights(model).items()})
    assert len(rows) == 3
    assert all(torch.equal(trained[0][name], weight) and weight.any() for name, weight in trained[1].items())

"""Sizes and cosines per token against models written out, against depth profiles on every family, and in any batch."""

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, silu

import zoo
from equations import attention, enriched, heads, linear, norm, rms_norm, rotate
from preskip.analysis.branches import live_branches
from preskip.analysis.depth import depth_profile
from preskip.analysis.explain.forward import MEASURES, Chunk, Recorder, measure
from preskip.analysis.explain.sums import SIZES
from preskip.errors import PreskipError
from tiny_explain import adapted, crossed_llama

TEXT = [name for name, family in zoo.FAMILIES.items() if family.causal and family.kind == "text"]
IDS = [np.random.default_rng(i).integers(8, zoo.VOCABULARY, size).tolist() for i, size in enumerate((9, 12, 7, 12))]


def measured(model, ids=IDS, batch_tokens=40, **options):
    recorder = Recorder(live_branches(model))
    chunks = (Chunk(index, 0, own, own[1:], index > 0) for index, own in enumerate(ids))
    with recorder.recording():
        rows = list(measure(model, recorder, chunks, batch_tokens=batch_tokens, **options))
    assert [row.chunk.owner for row in rows] == list(range(len(ids)))
    return [row.values for row in rows], [row.nll for row in rows], recorder


def llama(ids, s, branches):
    """x̂, x̃, skip, attention and MLP outputs of each layer, and the logits."""
    x, seen = s["model.embed_tokens.weight"][ids], []
    for i, b in enumerate(branches):
        p = f"model.layers.{i}"
        plain = rms_norm(x, s[f"{p}.input_layernorm.weight"])
        xt = enriched(plain, b)
        q, k, v = (heads(linear(xt, s, f"{p}.self_attn.{n}_proj"), h) for n, h in (("q", 4), ("k", 2), ("v", 2)))
        out = linear(attention(rotate(q, 8), rotate(k, 8), v), s, f"{p}.self_attn.o_proj")
        skip = xt @ b["skip"].T
        x = x + out + skip
        y = rms_norm(x, s[f"{p}.post_attention_layernorm.weight"])
        mlp = linear(
            silu(linear(y, s, f"{p}.mlp.gate_proj")) * linear(y, s, f"{p}.mlp.up_proj"), s, f"{p}.mlp.down_proj"
        )
        x = x + mlp
        seen.append((plain, xt, skip, out, mlp))
    return seen, rms_norm(x, s["model.norm.weight"]) @ s["lm_head.weight"].T


def gpt_neox(ids, s, branches):
    x, seen = s["gpt_neox.embed_in.weight"][ids], []
    for i, b in enumerate(branches):
        p = f"gpt_neox.layers.{i}"
        plain = norm(x, s, f"{p}.input_layernorm")
        xt = enriched(plain, b)
        q, k, v = heads(linear(xt, s, f"{p}.attention.query_key_value"), 4).chunk(3, -1)
        out = linear(attention(rotate(q, 2), rotate(k, 2), v), s, f"{p}.attention.dense")
        skip = xt @ b["skip"].T
        y = norm(x, s, f"{p}.post_attention_layernorm")
        mlp = linear(gelu(linear(y, s, f"{p}.mlp.dense_h_to_4h")), s, f"{p}.mlp.dense_4h_to_h")
        x = x + out + skip + mlp
        seen.append((plain, xt, skip, out, mlp))
    return seen, norm(x, s, "gpt_neox.final_layer_norm") @ s["lm_head.weight"].T


@pytest.mark.parametrize(("name", "equation"), [("llama", llama), ("gpt_neox", gpt_neox)])
@torch.no_grad()
def test_against_the_model_written_out(name, equation):
    state = zoo.build(name).state_dict()
    model = adapted(name)
    branches = [
        {part: w.weight for part, w in branch.module.linears("default").items()} for branch in live_branches(model)
    ]
    values, nll, recorder = measured(model)
    total = np.zeros((2, zoo.WIDTH))
    for index, ids in enumerate(IDS):
        seen, logits = equation(torch.tensor([ids]), state, branches)
        cosine = torch.nn.functional.cosine_similarity
        for layer, (plain, xt, skip, out, mlp) in enumerate(seen):
            expected = {
                "skip": skip.norm(dim=-1),
                "attention": out.norm(dim=-1),
                "change": (xt - plain).norm(dim=-1),
                "input": plain.norm(dim=-1),
                "attention_cosine": cosine(skip, out, dim=-1),
                "mlp_cosine": cosine(skip, mlp, dim=-1),
            }
            assert set(expected) == set(MEASURES)
            for measure_name, value in expected.items():
                np.testing.assert_allclose(values[index][measure_name][layer], value[0], atol=2e-5, rtol=1e-4)
            if index > 0:
                total[layer] += skip[0].sum(0).numpy()
        wanted = logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(nll[index], -wanted, atol=1e-5)
    assert recorder.counted == sum(map(len, IDS[1:]))
    np.testing.assert_allclose(torch.stack(recorder.written), total, atol=1e-4)


@pytest.mark.parametrize("position", ["attention", "residual"])
@pytest.mark.parametrize("name", TEXT)
def test_every_family_as_its_depth_profile(name, position):
    model = adapted(name, skip_position=position)
    values, _, _ = measured(model)
    layers = range(len(zoo.FAMILIES[name].layers))
    for row, depth in zip(layers, depth_profile(model.get_base_model(), IDS), strict=True):
        for size, (above, below) in SIZES.items():
            ratio = sum(v[above][row].sum() for v in values) / sum(v[below][row].sum() for v in values)
            assert ratio == pytest.approx(depth[size], rel=1e-4)
    has_mlp = name != "nemotron_h"  # whose MLPs are blocks of their own
    measures = [measure for measure in MEASURES if has_mlp or measure != "mlp_cosine"]
    assert all(np.isfinite(value[measure]).all() for value in values for measure in measures)
    assert all(np.isfinite(value["mlp_cosine"]).all() == has_mlp for value in values)
    assert all(np.abs(value["mlp_cosine"]).max() > 1e-3 for value in values if has_mlp)


@pytest.mark.parametrize("peer", ["canon-a", "canon"])
@torch.no_grad()
def test_the_input_is_what_canon_gives(peer):
    model = crossed_llama(peer)
    values, _, _ = measured(model, IDS[:1])
    norms = []
    for block in model.model.layers:
        mix = block.peers[peer.replace("-", "_")]["a"]
        mix.register_forward_hook(lambda module, args, output: norms.append(output[0].norm(dim=-1)))
    model(torch.tensor(IDS[:1]))
    np.testing.assert_allclose(values[0]["input"], torch.stack(norms), rtol=1e-4)
    for row, depth in enumerate(depth_profile(model, IDS[:1])):
        ratio = values[0]["change"][row].sum() / values[0]["input"][row].sum()
        assert ratio == pytest.approx(depth["enrichment"], rel=1e-4)


@torch.no_grad()
def test_blooms_mlp_is_without_the_residual():
    model = adapted("bloom")
    base = model.get_base_model()
    block = base.transformer.h[0]
    found = {}
    block.mlp.register_forward_hook(lambda module, args, output: found.update(sum=output, residual=args[1]))
    branch = live_branches(model)[0]
    branch.module.linears("default")["skip"].register_forward_hook(
        lambda module, args, output: found.update(skip=output)
    )
    values, _, _ = measured(model, IDS[:1])
    expected = torch.nn.functional.cosine_similarity(found["skip"], found["sum"] - found["residual"], dim=-1)
    np.testing.assert_allclose(values[0]["mlp_cosine"][0], expected[0], atol=1e-5)


def test_batches_change_nothing_and_hooks_go_away():
    model = adapted("llama")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    one, nll_one, first = measured(model, batch_tokens=1)
    many, nll_many, second = measured(model, batch_tokens=1000)
    for a, b in zip(one, many, strict=True):
        for name in MEASURES:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(nll_one), np.concatenate(nll_many), atol=1e-5)
    np.testing.assert_allclose(torch.stack(first.written), torch.stack(second.written), rtol=1e-5)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"content_skip": False}, {"skip", "attention_cosine", "mlp_cosine"}),
        ({"preprojection": False}, {"change"}),
        ({"enrich_attention": False}, {"change"}),
        ({"enrich_attention": False, "content_skip": False}, {"change"}),
        ({"skip_rank": 3, "gated": True}, set()),
    ],
)
def test_parts_that_an_arm_lacks_are_nan(settings, absent):
    model = adapted("llama", **settings)
    values, _, _ = measured(model)
    assert {name for name in MEASURES if np.isnan(values[0][name]).any()} == absent
    depth = depth_profile(model.get_base_model(), IDS)[1]
    if "skip" not in absent:
        ratio = sum(v["skip"][1].sum() for v in values) / sum(v["attention"][1].sum() for v in values)
        assert ratio == pytest.approx(depth["skip_to_attention"], rel=1e-4)


def test_a_loss_that_is_not_finite_is_an_error():
    model = adapted("llama")
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0] = torch.inf
    with pytest.raises(PreskipError, match="NaN or infinite: try --dtype float32"):
        measured(model)


def test_layers_that_run_several_times_in_a_pass_are_refused():
    model = adapted("llama")
    decoder = model.get_base_model().model
    decoder.layers = zoo.Looped(decoder.layers)
    with pytest.raises(PreskipError, match="layer 0 runs several times in a pass"):
        measured(model)


def test_memory_holds_one_batch_at_a_time():
    """Live tensors while the thousandth text is read are no more than at the tenth, and texts are taken as needed."""
    import gc

    model = adapted("llama")
    recorder = Recorder(live_branches(model))
    taken, live = [], []

    def chunks():
        for index in range(1000):
            taken.append(index)
            yield Chunk(index, 0, IDS[index % 4], IDS[index % 4][1:], True)

    with recorder.recording():
        for row in measure(model, recorder, chunks(), batch_tokens=24):
            assert len(taken) <= row.chunk.owner + 4
            if row.chunk.owner in (11, 499, 999):
                del row
                gc.collect()
                live.append(sum(1 for item in gc.get_objects() if isinstance(item, torch.Tensor)))
    # What other tests of this process left behind may go meanwhile.
    assert max(live) - live[0] <= 4

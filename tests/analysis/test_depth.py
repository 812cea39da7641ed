import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import zoo
from preskip import PreskipConfig, bake
from preskip.analysis.depth import depth_profile, text_profile
from preskip.data.blocks import Window
from preskip.data.corpus import Document
from preskip.evaluate.texts import TextSet
from preskip.stats import bootstrap_ratio
from tiny_explain import crossed_llama
from tiny_model import tiny_llama


def adapted(**settings):
    model = get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper", **settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.get_base_model()


def test_profile_equals_an_independent_computation():
    model, ids = adapted(), [5, 6, 7, 8]
    rows = depth_profile(model, [ids])
    block = model.model.layers[0]
    branch = block.self_attn.preskip
    up, down, skip = (getattr(branch, part)["default"].weight for part in ("up", "down", "skip"))
    with torch.no_grad():
        x = block.input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
        feature = torch.nn.functional.silu(x @ up.T) @ down.T
        enriched = x + feature
        with_skip = {}
        hook = block.self_attn.register_forward_hook(lambda m, a, o: with_skip.update(out=o[0]))
        model(input_ids=torch.tensor([ids]))
        hook.remove()
        skip_output = enriched @ skip.T
        attention = with_skip["out"] - skip_output
    assert rows[0]["layer"] == 0
    assert rows[0]["skip_norm"] == pytest.approx(skip.norm().item(), rel=1e-5)
    assert rows[0]["up_norm"] == pytest.approx(up.norm().item(), rel=1e-5)
    assert rows[0]["down_norm"] == pytest.approx(down.norm().item(), rel=1e-5)
    enrichment = (feature.norm(dim=-1).sum() / x.norm(dim=-1).sum()).item()
    assert rows[0]["enrichment"] == pytest.approx(enrichment, rel=1e-4)
    ratio = (skip_output.norm(dim=-1).sum() / attention.norm(dim=-1).sum()).item()
    assert rows[0]["skip_to_attention"] == pytest.approx(ratio, rel=1e-4)
    assert len(rows) == 2


@pytest.mark.parametrize("peer", ["canon-a", "canon"])
def test_enrichment_is_of_what_canon_gives(peer):
    model, ids = crossed_llama(peer), [5, 6, 7, 8]
    rows = depth_profile(model, [ids])
    seen = {}
    for index, block in enumerate(model.model.layers):
        modules = {"x": block.peers[peer.replace("-", "_")]["a"], "feature": block.self_attn.preskip.down}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda m, a, out, key=(index, name): seen.update({key: out.norm(dim=-1).sum()})
            )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    expected = [(seen[index, "feature"] / seen[index, "x"]).item() for index in range(3)]
    assert [row["enrichment"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_a_text_is_profiled_over_its_groups():
    """Eight of ten documents, five of each group; those of a group are summed before they are drawn."""
    documents = [Document(f"{place}", "", "long" if place < 5 else "short") for place in range(10)]
    windows = [Window([3, 4 + place, 5, 6 + place], 1) for place in range(10)]
    text = TextSet(
        name="made", documents=documents, windows=windows, owners=list(range(10)), context_length=8, stride=8
    )
    model = adapted()
    (row, _) = text_profile(model, text)
    assert len(row["documents"]["enrichment"]["above"]) == 2
    used = [0, 5, 1, 6, 2, 7, 3, 8]
    (alone, _) = depth_profile(model, [windows[place].input_ids[:-1] for place in used], owners=used)
    tops = alone["documents"]["enrichment"]["above"]  # by document, in their order
    assert row["documents"]["enrichment"]["above"] == pytest.approx([sum(tops[:4]), sum(tops[4:])])
    assert row["enrichment"] == pytest.approx(alone["enrichment"])


def test_the_first_window_of_a_document_is_read():
    documents = [Document(name, "", name) for name in "ab"]
    windows = [Window([3, 4, 5], 1), Window([6, 7, 8, 9], 1), Window([10, 11, 12], 1)]
    text = TextSet(name="made", documents=documents, windows=windows, owners=[0, 0, 1], context_length=8, stride=8)
    model = adapted()
    (row, _) = text_profile(model, text)
    assert row == depth_profile(model, [[3, 4], [10, 11]], owners=[0, 1])[0]
    assert row["enrichment_low"] < row["enrichment"] < row["enrichment_high"]  # two documents give an interval


def test_profile_leaves_the_model_as_it_was():
    model = adapted().train()
    attention = model.model.layers[0].self_attn
    hooks = [dict(attention._forward_hooks), dict(attention._forward_pre_hooks)]
    depth_profile(model, [[3, 4, 5]])
    assert "enrich" not in vars(attention.preskip)
    assert [dict(attention._forward_hooks), dict(attention._forward_pre_hooks)] == hooks
    assert model.training


def test_variants():
    (first, _) = depth_profile(adapted(content_skip=False), [[3, 4, 5]])
    assert first["skip_norm"] == 0.0
    assert first["skip_to_attention"] is None
    (first, _) = depth_profile(adapted(skip_rank=3), [])
    assert first["enrichment"] is None
    assert first["skip_norm"] > 0
    assert [row["layer"] for row in depth_profile(adapted(layers_to_transform=[1]), [])] == [1]


@pytest.mark.parametrize(("name", "position"), [("gemma2", "attention"), ("gemma2", "residual"), ("bert", "attention")])
def test_the_skip_is_compared_with_what_it_is_added_to(name, position):
    """Attention's own output, or behind a tap the tap's: its norm (Gemma 2), its output projection (BERT)."""
    model = get_peft_model(zoo.build(name), PreskipConfig(skip_position=position))
    zoo.randomise(model)
    model = model.get_base_model()
    ids = zoo.inputs(name)["input_ids"][:1]
    rows = depth_profile(model, ids.tolist())
    path = zoo.FAMILIES[name].attention[0].format(0)
    layer = model.get_submodule(path).preskip
    seen = {}
    target = layer.tap if layer.tap is not None else model.get_submodule(path)
    with torch.no_grad():
        handles = [
            target.register_forward_hook(lambda m, a, o: seen.update(joined=o[0] if isinstance(o, tuple) else o)),
            model.get_submodule(path).register_forward_pre_hook(
                lambda m, a, k: seen.update(xt=a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
        ]
        model(input_ids=ids)
        skip = seen["xt"] @ layer.skip["default"].weight.T
    for handle in handles:
        handle.remove()
    assert (target is not model.get_submodule(path)) == (position == "residual" or name == "bert")
    attention = seen["joined"] - skip
    ratio = (skip.norm(dim=-1).sum() / attention.norm(dim=-1).sum()).item()
    assert rows[0]["skip_to_attention"] == pytest.approx(ratio, rel=1e-4)


def test_intervals_over_documents():
    model = adapted()
    texts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18]]
    row = depth_profile(model, texts, owners=[4, 4, 9, 2])[1]
    plain = depth_profile(model, texts)[1]
    assert set(plain) == {
        "layer", "up_norm", "down_norm", "skip_norm", "skip_to_attention", "enrichment"
    }  # fmt: skip
    assert {key: row[key] for key in plain} == plain
    singles = [depth_profile(model, [text], owners=[0])[1] for text in texts]
    for size in ("skip_to_attention", "enrichment"):
        above, below = row["documents"][size]["above"], row["documents"][size]["below"]
        expected = [single["documents"][size]["above"][0] for single in singles]
        assert above == pytest.approx([expected[3], expected[0] + expected[1], expected[2]])  # by document, 2 4 9
        interval = bootstrap_ratio(above, below)
        assert (row[size], row[f"{size}_low"], row[f"{size}_high"]) == pytest.approx(
            (interval.value, interval.low, interval.high)
        )
        assert singles[0][f"{size}_low"] is None  # one document


def test_a_layer_that_runs_twice_in_a_pass_has_the_sums_over_both():
    model, texts = adapted(), [[5, 6, 7, 8], [9, 10, 11]]
    model.model.layers = zoo.Looped(model.model.layers)
    found = {"before": [], "after": []}
    attention = model.model.layers[1].self_attn
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: found[name].append(kwargs["hidden_states"]),
            with_kwargs=True,
            prepend=name == "before",
        )
        for name in found
    ]
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    above = [(b - a).norm(dim=-1).sum().item() for a, b in zip(*found.values(), strict=True)]
    below = [a.norm(dim=-1).sum().item() for a in found["before"]]
    assert len(above) == 4
    row = depth_profile(model, texts, owners=[0, 1])[1]
    assert row["enrichment"] == pytest.approx(sum(above) / sum(below), rel=1e-5)
    assert row["documents"]["enrichment"]["above"] == pytest.approx(
        [above[0] + above[1], above[2] + above[3]], rel=1e-5
    )


def test_attention_that_gives_nothing_does_not_blow_up_the_ratio():
    model = adapted()
    block = model.model.layers[0].self_attn
    first = depth_profile(model, [[5, 6, 7, 8]])[0]["skip_to_attention"]

    def first_token_empty(module, args, output):
        output = output.clone()
        output[:, 0] = 0
        return output

    handle = block.o_proj.register_forward_hook(first_token_empty)
    assert depth_profile(model, [[5, 6, 7, 8]])[0]["skip_to_attention"] < 3 * first
    handle.remove()
    with torch.no_grad():
        block.o_proj.weight.zero_()
    row = depth_profile(model, [[5, 6], [7, 8]], owners=[0, 1])[0]
    assert (row["skip_to_attention"], row["skip_to_attention_low"]) == (None, None)
    assert "skip_to_attention" not in row["documents"]


def test_a_model_with_branches_of_its_own_has_the_profile_of_the_adapter_it_was_baked_from(tmp_path):
    model = get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper"))
    zoo.randomise(model)
    bake(model, tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    texts = [[5, 6, 7, 8], [9, 10, 11]]
    rows = depth_profile(baked, texts, owners=[0, 1])
    assert rows == depth_profile(model.get_base_model(), texts, owners=[0, 1])
    assert rows[0]["skip_to_attention"] > 0
    assert depth_profile(tiny_llama(), texts) == []


@pytest.mark.parametrize("skip_rank", [None, 3])
def test_int8_branches_have_the_profile_of_the_unquantised(tmp_path, skip_rank):
    model = get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper", skip_rank=skip_rank))
    zoo.randomise(model)
    bake(model, tmp_path / "int8", quantize="int8")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    texts = [[5, 6, 7, 8], [9, 10, 11]]
    for row, wanted in zip(depth_profile(baked, texts), depth_profile(model, texts), strict=True):
        assert row == pytest.approx(wanted, rel=0.02)

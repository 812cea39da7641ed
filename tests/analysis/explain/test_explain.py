"""The whole of explain: consistent with its parts, the same for adapter and baked checkpoint, honest where empty."""

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo
from preskip import bake
from preskip.analysis.ablation import ablate, switched_off
from preskip.analysis.branches import live_branches
from preskip.analysis.depth import depth_profile
from preskip.analysis.explain import Extent, Text, explain
from preskip.analysis.explain.classes import CLASSES
from preskip.analysis.explain.sums import interval, widened
from preskip.analysis.explain.texts import given_texts
from preskip.data.corpus import Document
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import document_windows, score_sequences
from preskip.stats import bootstrap_ratio
from tiny_explain import adapted, adapted_llama, crossed_llama, texts
from tiny_model import tiny_llama
from tiny_text import tiny_tokenizer

CONTEXT = 48
EXTENT = Extent(context_length=CONTEXT, ablation_documents=3, ablation_words=12, attention_documents=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, its texts, what explain says of them, and the rows of tokens.parquet."""
    model = adapted_llama()
    path = tmp_path_factory.mktemp("explain") / "tokens.parquet"
    read = texts(6, given=True)
    found = explain(model, tokenizer, read, EXTENT, tokens=path)
    return model, read, found, pq.read_table(path).to_pylist()


def windows_of(text, tokenizer):
    sequence = [0, *tokenizer(text.text, add_special_tokens=False)["input_ids"]]
    return [sequence[i : i + CONTEXT] for i in range(0, len(sequence), CONTEXT)]


def hooked(model, ids):
    """‖skip‖, ‖attention‖, ‖x̃ - x̂‖ and ‖x̂‖ of each layer and token, from hooks of the tests' own."""
    base, rows = model.get_base_model(), []
    for layer in base.model.layers:
        seen, handles = {}, []
        weights = {part: linear.weight for part, linear in layer.self_attn.preskip.linears("default").items()}
        handles.append(layer.input_layernorm.register_forward_hook(lambda m, a, out, seen=seen: seen.update(x=out[0])))
        handles.append(
            layer.self_attn.o_proj.register_forward_hook(lambda m, a, out, seen=seen: seen.update(attention=out[0]))
        )
        base(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        x = seen["x"]
        change = torch.nn.functional.silu(x @ weights["up"].T) @ weights["down"].T
        skip = (x + change) @ weights["skip"].T
        rows.append(torch.stack([v.norm(dim=-1) for v in (skip, seen["attention"], change, x)]))
    return torch.stack(rows).numpy()  # [layers, 4, tokens]


@torch.no_grad()
def test_rows_and_map_against_hooks(place, tokenizer):
    model, read, found, rows = place
    by_document = defaultdict(list)
    for row in rows:
        by_document[row["document"]].append(row)
    assert [text["id"] for text in found["texts"]] == [text.id for text in read] == list(by_document)
    shown = {document["id"]: document for document in found["documents"]}
    for text in read:
        own = by_document[text.id]
        parts = [hooked(model, ids) for ids in windows_of(text, tokenizer)]
        norms = np.concatenate(parts, axis=2)[:, :, 1:]  # without the start token
        np.testing.assert_allclose(np.array([row["bypass"] for row in own]).T, norms[:, 0] / norms[:, 1], rtol=1e-4)
        np.testing.assert_allclose(np.array([row["enrichment"] for row in own]).T, norms[:, 2] / norms[:, 3], rtol=1e-4)
        np.testing.assert_allclose(shown[text.id]["bypass"], norms[:, 0] / norms[:, 1], rtol=1e-3)
        np.testing.assert_allclose(shown[text.id]["enrichment"], norms[:, 2] / norms[:, 3], rtol=1e-3)
        assert "".join(row["token"] for row in own) == "".join(shown[text.id]["tokens"]) == text.text
        assert [row["position"] for row in own] == list(range(len(own)))
        ids = tokenizer(text.text, add_special_tokens=False)["input_ids"]
        assert [row["token_id"] for row in own] == ids
        repeats = [ids[i] in ids[max(0, (i + 1) // CONTEXT * CONTEXT - 1) : i] for i in range(len(ids))]
        assert [row["repeat"] for row in own] == repeats


def test_nats_are_those_of_scoring(place, tokenizer):
    """The same windows as evaluation cuts, except that the last token of one is not read again by the next."""
    model, read, _, rows = place
    documents = [Document(text.id, text.text, text.id) for text in read]
    long = [document for document in documents if len(tokenizer(document.text)["input_ids"]) < CONTEXT - 1]
    for document in long:
        windows, _ = document_windows([document], tokenizer, context_length=CONTEXT, stride=CONTEXT)
        nll = sum(score.nll for score in score_sequences(model, windows))
        assert sum(row["nll"] for row in rows if row["document"] == document.id) == pytest.approx(nll, rel=1e-5)
    assert long
    assert all(row["nll"] > 0 for row in rows)


def test_layers_are_as_the_depth_profile(place, tokenizer):
    model, read, found, _ = place
    sequences, owners = [], []
    for index, text in enumerate(read):
        if text.set == "held-out":
            own = windows_of(text, tokenizer)
            sequences += own
            owners += [index] * len(own)
    for row, depth in zip(
        found["layers"], depth_profile(model.get_base_model(), sequences, owners=owners), strict=True
    ):
        for size in ("skip_to_attention", "enrichment"):
            expected = {"value": depth[size], "low": depth[f"{size}_low"], "high": depth[f"{size}_high"]}
            assert row[size] == pytest.approx(expected, rel=1e-3)
        wide = row["skip_to_attention_wide"]
        assert wide["confidence"] == pytest.approx(1 - 0.05 / 3)
        assert wide["low"] < row["skip_to_attention"]["low"]
        assert wide["high"] > row["skip_to_attention"]["high"]
        assert [row[norm] for norm in ("layer", "up_norm", "down_norm", "skip_norm")] == pytest.approx(
            [depth[norm] for norm in ("layer", "up_norm", "down_norm", "skip_norm")]
        )


@torch.no_grad()
def test_classes_against_sums_and_a_bootstrap_by_hand(place, tokenizer):
    model, read, found, rows = place
    labels = {
        "kind": lambda row: row["kind"],
        "case": lambda row: row["case"],
        "word": lambda row: row["word"],
        "repeat": lambda row: "repeated" if row["repeat"] else "first occurrence",
        "frequency": lambda row: next(
            (
                n
                for n, limit in zip(CLASSES["frequency"], (1e-2, 1e-3, 1e-4), strict=False)
                if row["frequency"] >= limit
            ),
            "rarer",
        ),
    }
    heldout = [text for text in read if text.set == "held-out"]
    norms = {
        text.id: np.concatenate([hooked(model, ids) for ids in windows_of(text, tokenizer)], axis=2)[:, :, 1:]
        for text in heldout
    }
    checked = set()
    for entry in found["classes"]:
        if entry["dimension"] == "position":
            continue
        sums, count = [], 0
        for text in heldout:
            own = [row for row in rows if row["document"] == text.id]
            chosen = [labels[entry["dimension"]](row) == entry["class"] for row in own]
            if any(chosen):
                sums.append(norms[text.id][:, :, chosen].sum(2))
            count += sum(chosen)
        assert entry["tokens"] == count
        table = np.stack(sums)  # [documents, layers, 4]
        np.testing.assert_allclose(entry["by_layer"], table[:, :, 0].sum(0) / table[:, :, 1].sum(0), rtol=1e-4)
        if len(table) < 2:
            assert entry["skip_to_attention"] is None
            continue
        for size, above, below in (("skip_to_attention", 0, 1), ("enrichment", 2, 3)):
            tops, bottoms = table[:, :, above].sum(1), table[:, :, below].sum(1)
            expected = bootstrap_ratio(tops, bottoms)
            assert entry[size]["value"] == pytest.approx(tops.sum() / bottoms.sum(), rel=1e-4)
            assert entry[size]["low"] == pytest.approx(expected.low, rel=1e-3)
            assert entry[size]["high"] == pytest.approx(expected.high, rel=1e-3)
        level = 1 - 0.05 / len(found["classes"])
        wide = bootstrap_ratio(table[:, :, 0].sum(1), table[:, :, 1].sum(1), confidence=level)
        expected = {"value": wide.value, "low": wide.low, "high": wide.high, "confidence": level}
        assert entry["skip_to_attention_wide"] == pytest.approx(expected, rel=1e-3)
        checked.add(entry["dimension"])
    assert checked == set(labels)


def test_an_interval_is_near_the_plain_bootstrap():
    random = np.random.default_rng(0)
    below = random.uniform(50, 60, 40)
    above = below * random.normal(0.4, 0.05, 40)
    found = interval([*above, np.nan], [*below, 0.0])
    draws = random.integers(40, size=(4000, 40))
    low, high = np.quantile(above[draws].sum(1) / below[draws].sum(1), [0.025, 0.975])
    assert found["value"] == pytest.approx(above.sum() / below.sum())
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert interval(above[:1], below[:1]) is None
    assert interval([np.nan, np.nan], [1.0, 1.0]) is None


def test_widened_intervals_hold_all_at_once():
    """Of 20 ratios that are all alike: all widened intervals hold the truth in 95 % of samples, plain ones do not."""
    random, count, samples = np.random.default_rng(1), 20, 60
    held = {"plain": 0, "wide": 0}
    for _ in range(samples):
        above = random.normal(0.4, 0.05, (count, 40))
        plain = [interval(row, np.ones(40)) for row in above]
        wide = [widened(row, np.ones(40), count) for row in above]
        held["plain"] += all(found["low"] <= 0.4 <= found["high"] for found in plain)
        held["wide"] += all(found["low"] <= 0.4 <= found["high"] for found in wide)
    assert wide[0]["confidence"] == pytest.approx(0.9975)
    assert held["plain"] / samples < 0.6
    assert held["wide"] / samples > 0.85


def test_ablation_is_the_ablation_of_the_first_documents(place, tokenizer):
    model, read, found, _ = place
    documents = [
        Document(text.id, " ".join(text.text.split(" ")[:12]), text.id) for text in read if text.set == "held-out"
    ][:3]
    windows, owners = document_windows(documents, tokenizer, context_length=CONTEXT, stride=CONTEXT)
    sizes = [len(document.text.encode()) for document in documents]
    for row in ablate(model, windows, owners, sizes, parts=("skip", "enrichment", "both")):
        expected = {"value": row["difference"], "low": row["low"], "high": row["high"]}
        assert found["layers"][row["layer"]]["ablation"][row["part"]] == pytest.approx(expected, abs=1e-9)
    # Both: the two switches together, by hand.
    branch = live_branches(model)[1]
    on = sum(score.nll for score in score_sequences(model, windows))
    with (
        switched_off(branch, "skip"),
        switched_off(branch, "enrichment"),
    ):
        off = sum(score.nll for score in score_sequences(model, windows))
    assert found["layers"][1]["ablation"]["both"]["value"] == pytest.approx(
        (off - on) / np.log(2) / sum(sizes), abs=1e-8
    )


def test_a_baked_checkpoint_says_the_same(place, tokenizer, tmp_path):
    model, read, found, _ = place
    bake(model, tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    again = explain(baked, tokenizer, read, EXTENT)
    assert json.dumps({**again, "timings": 0}) == json.dumps({**found, "timings": 0})


def test_int8_branches_have_the_weights_of_the_unquantised(place, tokenizer, tmp_path):
    model, read, found, _ = place
    bake(model, tmp_path / "int8", quantize="int8")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    again = explain(baked, tokenizer, read, EXTENT)
    for layer, wanted in zip(again["layers"], found["layers"], strict=True):
        for name in ("up_norm", "down_norm", "skip_norm", "effective_rank", "stable_rank"):
            assert layer[name] == pytest.approx(wanted[name], rel=0.02), name
        assert layer["spectrum"] == pytest.approx(wanted["spectrum"], abs=0.02 * wanted["spectrum"][0])


def test_a_baked_checkpoint_with_the_skip_behind_a_norm(tokenizer, tmp_path):
    model = adapted("gemma2", skip_position="residual", layers_to_transform=[1])
    bake(model, tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    (ours,), (theirs,) = live_branches(model), live_branches(baked)
    assert (ours.layer, ours.site.name, ours.parts) == (theirs.layer, theirs.site.name, theirs.parts)
    assert theirs.tap is baked.model.layers[1].post_attention_layernorm
    on = zoo.logits(baked, "gemma2")
    for part in ("skip", "enrichment"):
        with switched_off(ours, part), switched_off(theirs, part):
            assert torch.equal(zoo.logits(model, "gemma2"), zoo.logits(baked, "gemma2"))
            assert zoo.difference(zoo.logits(baked, "gemma2"), on) > 1e-3


def test_numbers_are_finite_and_the_model_is_as_it_was(place, tokenizer):
    model, read, found, _ = place
    json.dumps(found, allow_nan=False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        explain(model, tokenizer, read[:3], EXTENT)
        assert torch.equal(model(ids).logits, before)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    assert all(len(layer["promoted"]) == len(layer["demoted"]) == 10 for layer in found["layers"])
    assert found["method"]["statistics"] == "held-out"


@pytest.mark.parametrize(
    ("settings", "skip", "enrichment"),
    [
        ({"content_skip": False}, False, True),
        ({"preprojection": False}, True, False),
        ({"enrich_attention": False, "content_skip": False}, True, False),
        ({"enrich_attention": False}, True, False),
    ],
)
def test_arms_without_a_part_have_null_there(settings, skip, enrichment, tokenizer, tmp_path):
    found = explain(adapted_llama(**settings), tokenizer, texts(3), EXTENT, tokens=tmp_path / "tokens.parquet")
    rows = pq.read_table(tmp_path / "tokens.parquet").to_pylist()
    json.dumps(found, allow_nan=False)
    layer, entry, document = found["layers"][0], found["classes"][0], found["documents"][0]
    assert [layer["skip_to_attention"] is not None, layer["enrichment"] is not None] == [skip, enrichment]
    assert [entry["skip_to_attention"] is not None, entry["enrichment"] is not None] == [skip, enrichment]
    assert [document["bypass"] is not None, document["enrichment"] is not None] == [skip, enrichment]
    assert [rows[0]["bypass"] is not None, rows[0]["enrichment"] is not None] == [skip, enrichment]
    assert [bool(entry["by_layer"]), bool(layer["promoted"])] == [skip, skip]
    assert [layer["alignment"]["mlp"] is not None, layer["entropy_change"] is not None] == [skip, enrichment]
    assert [layer["ablation"][part] is not None for part in ("skip", "enrichment", "both")] == [skip, enrichment, False]
    assert found["method"]["attention_documents"] == (3 if enrichment else 0)
    assert (layer["skip_norm"] is not None) == settings.get("content_skip", True)
    assert (layer["up_norm"] is not None) == settings.get("preprojection", True)


@pytest.mark.parametrize(
    ("peer", "settings"),
    [
        ("canon", {}),
        ("gated-attention", {}),
        ("nonlinear-q", {}),
        ("value-residual", {}),
        ("value-embed", {"layers": [0]}),
    ],
)
def test_a_branch_crossed_with_a_peer_has_every_entry(peer, settings, tokenizer):
    found = explain(crossed_llama(peer, **settings), tokenizer, texts(3), EXTENT)
    json.dumps(found, allow_nan=False)
    for layer in found["layers"]:
        assert all(layer[key] for key in ("skip_to_attention", "enrichment", "entropy_change", "sink_change"))
        assert all(layer["ablation"][part] for part in ("skip", "enrichment", "both"))


def test_texts_are_streamed_and_the_map_is_cut(tokenizer):
    """Texts that are made as they are asked for, many of them; the map stays within its tokens."""

    class Made:
        made = 0

        def __iter__(self):
            for index in range(150):
                Made.made += 1
                yield Text(f"d{index}", "made", f"The {index} ships met.")

    model = adapted_llama()
    found = explain(model, tokenizer, Made(), Extent(context_length=16, ablation_documents=0, shown_tokens=50))
    assert len(found["texts"]) == 150
    assert sum(len(document["tokens"]) for document in found["documents"]) == 50
    assert [text["shown"] for text in found["texts"]] == [i < len(found["documents"]) for i in range(150)]
    assert all(layer["ablation"] is None for layer in found["layers"])
    none = explain(model, tokenizer, texts(2), Extent(ablation_documents=0, attention_documents=0, shown_tokens=0))
    assert none["documents"] == []
    assert none["layers"][0]["entropy_change"] is None


def test_given_texts_alone_count_where_there_are_no_others(tokenizer):
    given = [Text(text.id, text.title, text.text, "given") for text in texts(3)]
    found = explain(adapted_llama(), tokenizer, given, EXTENT)
    assert found["method"]["statistics"] == "given"
    assert found["layers"][0]["skip_to_attention"]["value"] > 0


@pytest.mark.parametrize("length", [255, 256, 5000])
def test_a_given_text_may_be_longer_than_a_name_of_a_file(length):
    value = ("word " * length)[: length - 1] + "."
    assert [text.text for text in given_texts([value])] == [value]


def test_texts_of_one_group_count_as_one(tokenizer):
    model, own = adapted_llama(), texts(4)
    grouped = [replace(text, group=group) for text, group in zip(own, "aabb", strict=True)]
    apart, together = (explain(model, tokenizer, some, EXTENT)["layers"][0] for some in (own, grouped))
    for key in ("skip_to_attention", "entropy_change"):
        assert together[key]["value"] == pytest.approx(apart[key]["value"])
        assert together[key]["low"] != apart[key]["low"]
    assert together["ablation"]["skip"]["value"] == pytest.approx(apart["ablation"]["skip"]["value"])
    alone = explain(model, tokenizer, [replace(text, group="a") for text in own], EXTENT)["layers"][0]
    assert alone["skip_to_attention"] is alone["entropy_change"] is alone["ablation"] is None


def test_bad_input(tokenizer):
    model = adapted_llama()
    with pytest.raises(PreskipError, match=r"text 'short' has 1 token: 2 or more are needed"):
        explain(model, tokenizer, [Text("a", "short", "a")], EXTENT)
    with pytest.raises(PreskipError, match="there is no text to read"):
        explain(model, tokenizer, [], EXTENT)
    with pytest.raises(PreskipError, match="no layer has an active Preskip branch"):
        explain(tiny_llama(), tokenizer, texts(2), EXTENT)
    with pytest.raises(PreskipError, match="--context-length 1 is not possible"):
        Extent(context_length=1)
    with pytest.raises(PreskipError, match="--ablation-documents 1: an interval takes 2 or more"):
        Extent(ablation_documents=1)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(PreskipError, match="2 Preskip adapters are active"):
        explain(model, tokenizer, texts(2), EXTENT)

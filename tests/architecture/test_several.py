"""Several adapters of one base in one checkpoint: each row as with its adapter alone, the base's weights held once."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import zoo
from preskip import PreskipConfig, PreskipError, bake

SETTINGS = {"first": {}, "second": {"gated": True, "expansion": 0.5}, "third": {"enrich_attention": False}}


def adapted(family="llama", **settings):
    """A model with three adapters of different make, and the logits with each of them alone."""
    model = get_peft_model(zoo.build(family), PreskipConfig(**settings), adapter_name="first")
    for name in ("second", "third"):
        model.add_adapter(name, PreskipConfig(**{**SETTINGS[name], **settings}))
    alone = {}
    for seed, name in enumerate(SETTINGS):
        model.set_adapter(name)
        zoo.randomise(model, seed=seed)
    for name in SETTINGS:
        model.set_adapter(name)
        alone[name] = zoo.logits(model.eval(), family, batch=4)
    return model, alone


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    model, alone = adapted()
    place = bake(model, tmp_path_factory.mktemp("several") / "baked", adapter=list(SETTINGS), base_name="base")
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(), alone, place


@torch.no_grad()
def test_each_row_is_as_with_its_adapter_alone(baked):
    model, alone, _ = baked
    values = zoo.inputs("llama", batch=4)
    for name in SETTINGS:
        assert torch.equal(model(**values, adapter_names=[name]).logits, alone[name])
    names = ["third", "first", "second", "first"]
    mixed = model(**values, adapter_names=names).logits
    for row, name in enumerate(names):
        assert zoo.difference(mixed[row], alone[name][row]) < 1e-5
    assert torch.equal(model(**values).logits, alone["first"])
    assert zoo.difference(alone["first"], alone["second"]) > 0.1
    base = model(**values, adapter_names=["__base__"]).logits
    assert torch.equal(base, zoo.logits(zoo.build("llama"), "llama", batch=4))


@torch.no_grad()
def test_generation_picks_per_prompt(baked):
    model, _, _ = baked
    ids = zoo.inputs("llama", batch=3)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    mixed = model.generate(ids, adapter_names=["second", "third", "first"], **options)
    for row, name in enumerate(("second", "third", "first")):
        assert torch.equal(mixed[row], model.generate(ids[row : row + 1], adapter_names=[name], **options)[0])
    assert not torch.equal(mixed[1], model.generate(ids[1:2], adapter_names=["first"], **options)[0])
    twice = model.generate(ids[:2], adapter_names=["second", "third"], num_return_sequences=2, num_beams=2, **options)
    alone = model.generate(ids[1:2], adapter_names=["third"], num_return_sequences=2, num_beams=2, **options)
    assert torch.equal(twice[2:], alone)


def test_too_few_names_are_refused(baked):
    model, _, _ = baked
    ids = zoo.inputs("llama", batch=4)["input_ids"]
    two = {"adapter_names": ["first", "second"]}
    for call in (lambda: model(input_ids=ids, **two), lambda: model.generate(ids, max_new_tokens=1, **two)):
        with pytest.raises(PreskipError, match="2 adapter names do not fit a batch of 4 rows: give one name per row"):
            call()


def test_the_bases_weights_are_held_once(baked):
    model, _, place = baked
    base = sum(p.numel() for p in zoo.build("llama").parameters())
    branches = sum(p.numel() for name, p in model.named_parameters() if ".preskip." in name)
    assert sum(p.numel() for p in model.parameters()) == base + branches
    settings = PreskipConfig().branch_settings()
    assert model.config.preskip_adapters["first"]["expansion"] == settings.expansion
    assert "model.layers.0.self_attn.preskip.second.gate.weight" in dict(model.named_parameters())
    assert "first, second, third" in (place / "README.md").read_text()


def test_what_cannot_lie_side_by_side_is_refused(baked, tmp_path):
    model, _, _ = baked
    with pytest.raises(PreskipError, match=r"give one name per row, out of first, second, third, __base__"):
        model(**zoo.inputs("llama"), adapter_names=["fourth"])
    other = get_peft_model(zoo.build("llama"), PreskipConfig(), adapter_name="first")
    other.add_adapter("part", PreskipConfig(layers_to_transform=[1]))
    with pytest.raises(PreskipError, match="'first' and 'part' do not sit at the same layers"):
        bake(other, tmp_path / "out", adapter=["first", "part"])
    assert not (tmp_path / "out").exists()
    one = AutoModelForCausalLM.from_pretrained(bake(other, tmp_path / "one", adapter="first"), dtype=torch.float32)
    with pytest.raises(PreskipError, match="has one adapter alone"):
        one(**zoo.inputs("llama"), adapter_names=["first"])


def test_training_with_names_is_refused_as_by_peft(baked):
    model, alone, _ = baked
    values = zoo.inputs("llama", batch=4)
    model.train()
    try:
        for call in (model, model.generate):
            with pytest.raises(PreskipError, match=r"^adapter_names is for inference: call model\.eval\(\) first$"):
                call(**values, adapter_names=["second"])
        model(**values, labels=values["input_ids"]).loss.backward()
    finally:
        model.eval()
        model.zero_grad()
    with torch.no_grad():
        assert torch.equal(model(**values, adapter_names=["second"]).logits, alone["second"])


@torch.no_grad()
def test_behind_a_norm_too(tmp_path):
    model, alone = adapted("gemma2", skip_position="residual")
    place = bake(model, tmp_path / "baked", adapter=["second", "first"])
    baked = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    mixed = baked(**zoo.inputs("gemma2", batch=4), adapter_names=["first", "second", "second", "first"]).logits
    for row, name in enumerate(("first", "second", "second", "first")):
        assert zoo.difference(mixed[row], alone[name][row]) < 1e-5

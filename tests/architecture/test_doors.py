"""The ways a baked model is run: pipeline, every kind of generation, export. Each gives what plain generation gives."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

import zoo
from preskip.architecture import architecture
from tiny_text import tiny_tokenizer

IDS = torch.arange(20, 30)[None]
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def tiny(base_type="llama", family="llama", **fields):
    config = architecture(base_type).config(**{**zoo.FAMILIES[family].settings, **fields})
    made = architecture(base_type).causal_lm(config)
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    zoo.randomise(made, std=0.2)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens by hand: one whole forward pass per token, no cache."""
    ids = IDS
    for _ in range(OPTIONS["max_new_tokens"]):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    base = zoo.build("llama")
    assert not torch.equal(ids, base.generate(IDS, **OPTIONS))
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_cache(model, expected, cache):
    assert torch.equal(model.generate(IDS, cache_implementation=cache, **OPTIONS), expected)


def test_assisted_generation_keeps_the_models_own_tokens(model, expected):
    assert torch.equal(model.generate(IDS, assistant_model=zoo.build("llama"), **OPTIONS), expected)
    assert torch.equal(model.generate(IDS, prompt_lookup_num_tokens=3, **OPTIONS), expected)


def test_a_batch_of_prompts_of_different_length(expected):
    """Continuous batching: all prompts lie in one row, the branch acts on each token alone."""
    model = tiny(attn_implementation="sdpa")
    prompts = [IDS[0].tolist(), IDS[0, :4].tolist(), IDS[0, 3:].tolist()]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
    answers = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=sizes)
    found = [answer.generated_tokens for answer in answers.values()]
    wanted = [model.generate(torch.tensor([p]), **OPTIONS)[0, len(p) :].tolist() for p in prompts]
    assert sorted(found) == sorted(wanted)
    assert expected[0, len(prompts[0]) :].tolist() in found


def test_the_pipeline(tmp_path):
    model = tiny(vocab_size=400)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made = pipeline("text-generation", model=str(tmp_path), dtype=torch.float32)
    assert made.model.config.architectures == ["PreskipLlamaForCausalLM"]
    (answer,) = made("the people", return_full_text=False, **OPTIONS)
    ids = made.tokenizer("the people", return_tensors="pt").input_ids
    out = model.generate(ids, **OPTIONS)[0, ids.shape[1] :]
    assert answer["generated_text"] == made.tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["attention", "residual"])
def test_compiled_in_one_graph(position):
    model = tiny("gemma3_text", "gemma3", preskip_skip_position=position)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.allclose(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, atol=1e-5)


class Scores(torch.nn.Module):
    """Token ids [B, T] to logits [B, T, V]: what an exported model computes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("position", ["attention", "residual"])
def test_exported_it_scores_the_same(position):
    """torch.export, with the length left open."""
    model = tiny("gemma3_text", "gemma3", preskip_skip_position=position)
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Scores(model), (IDS,), dynamic_shapes=({1: length},), strict=False)
        longer = torch.arange(8, 40)[None]
        assert zoo.difference(program.module()(longer), model(longer).logits) < 1e-5


@pytest.mark.slow
def test_onnx_scores_the_same(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        torch.onnx.export(
            Scores(model), (IDS,), tmp_path / "model.onnx", dynamo=True, input_names=["input_ids"], verbose=False
        )
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input_ids": IDS.numpy()})
    difference = zoo.difference(torch.from_numpy(found), model(IDS).logits)
    print(f"ONNX: largest difference of a logit {difference:.2g}")
    assert difference < 1e-4

"""`LiveModel` answers lm-eval's requests as lm-eval's own Hugging Face backend does, request by request."""

import importlib
import sys

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from preskip import PreskipConfig
from preskip.errors import PreskipError
from preskip.evaluate.harness import LiveModel, RequestEncoder, model_context_length
from tiny_model import tiny_llama
from tiny_text import PROSE, tiny_tokenizer

CONTEXT_LENGTH = 48
PAIRS = [
    ("The committee met on", " Monday"),
    ("The committee met on", " Tuesday to discuss the harbor."),  # the same context, several tokens
    ("The committee met on ", "Monday"),  # its space belongs to the continuation
    ("", "Ships had waited there"),  # an empty context: the start token
    ("", "<s>Ships had"),  # the start token written out
    ("<s>Ships had", " waited"),
    (PROSE, " The end."),  # far longer than the context: cut on the left
    ("x", PROSE[:40]),
    ("farmers paid in", " grain"),
    ("farmers paid in", " groin"),
]
TEXTS = ["Short.", PROSE, PROSE[:130], ""]


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=0, metadata=("t", i, 1))
        for i, argument in enumerate(arguments)
    ]


def both(model, tokenizer, **options):
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT_LENGTH, batch_size=3, **options)
    return LiveModel(model, tokenizer, context_length=CONTEXT_LENGTH, **options), theirs


def adapted(name):
    base = tiny_llama(max_position_embeddings=64)
    if name == "base":
        return base
    config = {
        "preskip": PreskipConfig(init_weights="paper", init_std=0.3, skip_init_std=0.3),
        "lora": LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[name]
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("name", ["base", "preskip", "lora", "prompt"])
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_tokenizer(lead=True), tiny_tokenizer(bos=False)])
def test_log_likelihoods_equal_those_of_lm_eval(name, tokenizer):
    ours, theirs = both(adapted(name), tokenizer)
    asked = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    for mine, other in zip(ours.loglikelihood(asked, disable_tqdm=True), expected, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=2e-4)
        assert mine[1] == other[1]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("lead", [True, False])
def test_rolling_log_likelihoods_equal_those_of_lm_eval(add_bos_token, lead):
    ours, theirs = both(adapted("base"), tiny_tokenizer(lead=lead), add_bos_token=add_bos_token)
    # lm-eval doubles a start token that the tokenizer adds by itself; without it there is one.
    theirs.add_bos_token = False if lead else add_bos_token
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert len(ours.tok_encode(PROSE)) > 3 * CONTEXT_LENGTH
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("text", [PROSE[:60], "<s>" + PROSE[:60]])
def test_the_start_token_stands_once_wherever_it_comes_from(lead, text):
    tokenizer = tiny_tokenizer(lead=lead)
    encoder = RequestEncoder(tokenizer, CONTEXT_LENGTH)
    expected = [0, *tokenizer(PROSE[:60], add_special_tokens=False)["input_ids"]]
    ((rolling,),) = encoder.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert (list(rolling.input_ids), rolling.scored_from) == (expected, 1)
    pairs = [("", text), (text, " x"), ("<s>", PROSE[:60])]
    for window in encoder.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True):
        assert window.input_ids[: len(expected)].count(0) == (0 if window.input_ids[0] else 1)
        assert list(window.input_ids[:2]) != [0, 0]


@pytest.mark.parametrize("pairs", [[(" ", "Ships had")], [(" ", "Ships had"), ("\n ", "x"), (PROSE[:90], " The end.")]])
@pytest.mark.parametrize("lead", [True, False])
def test_a_blank_context_is_an_empty_one_with_its_space_scored(lead, pairs):
    """Alone and in a batch; lm-eval's own backend has no answer where the tokenizer adds no start token."""
    model = LiveModel(adapted("base"), tiny_tokenizer(lead=lead), context_length=CONTEXT_LENGTH)
    moved = [("", context + text) if context.isspace() else (context, text) for context, text in pairs]
    found, expected = (
        model.loglikelihood(requests("loglikelihood", each), disable_tqdm=True) for each in (pairs, moved)
    )
    for mine, other in zip(found, expected, strict=True):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])
        assert mine[0] < -1


@pytest.mark.parametrize("lead", [True, False])
def test_texts_generated_in_a_batch_are_those_generated_one_by_one(lead):
    # lm-eval's backend asks the first prompt of a batch alone whether start tokens are written out.
    model, tokenizer = adapted("preskip"), tiny_tokenizer(lead=lead)
    prompts = ["<s>The committee met on", "Ships", PROSE, "<s>farmers paid in grain and", "x", ""]
    asked = requests("generate_until", [(prompt, {"until": ["."], "max_gen_toks": 6}) for prompt in prompts])
    one_by_one, in_batches = (
        LiveModel(model, tokenizer, context_length=CONTEXT_LENGTH, batch_size=size) for size in (1, 4)
    )
    texts = one_by_one.generate_until(asked, disable_tqdm=True)
    assert in_batches.generate_until(asked, disable_tqdm=True) == texts
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT_LENGTH, batch_size=1)
    assert texts[:-1] == theirs.generate_until(asked[:-1], disable_tqdm=True)


def test_prefix_tuning_is_scored_with_its_prefix():
    model, tokenizer = adapted("prefix"), tiny_tokenizer()
    asked = requests("loglikelihood", PAIRS[:2])
    with_prefix = LiveModel(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    alone = [LiveModel(model, tokenizer).loglikelihood([one], disable_tqdm=True)[0] for one in asked]
    without = LiveModel(tiny_llama(), tokenizer).loglikelihood(asked, disable_tqdm=True)
    for mine, single, other in zip(with_prefix, alone, without, strict=True):
        assert mine[0] == pytest.approx(single[0], abs=1e-4)
        assert abs(mine[0] - other[0]) > 1e-2


def test_generation_is_that_of_lm_eval():
    ours, theirs = both(adapted("preskip"), tiny_tokenizer())
    asked = requests("generate_until", [(pair[0], {"until": ["."], "max_gen_toks": 5}) for pair in PAIRS[:3]])
    texts = ours.generate_until(asked, disable_tqdm=True)
    assert texts == theirs.generate_until(asked, disable_tqdm=True)
    assert any(texts)


def test_context_length_is_the_models_then_the_tokenizers_then_2048():
    tokenizer = tiny_tokenizer()
    assert model_context_length(tiny_llama(max_position_embeddings=64), tokenizer) == 64
    assert model_context_length(None, tokenizer) == 2048
    tokenizer.model_max_length = 99
    assert model_context_length(None, tokenizer) == 99
    assert LiveModel(tiny_llama(), tokenizer).max_length == 256


def test_what_cannot_be_scored_is_refused():
    ours = LiveModel(tiny_llama(), tiny_tokenizer(), context_length=8)
    with pytest.raises(PreskipError, match="empty continuation"):
        ours.loglikelihood(requests("loglikelihood", [("context", "")]), disable_tqdm=True)
    with pytest.raises(PreskipError, match="exceeds the context length 8"):
        ours.loglikelihood(requests("loglikelihood", [("context", PROSE)]), disable_tqdm=True)
    with pytest.raises(PreskipError, match="neither start nor end token"):
        LiveModel(tiny_llama(), tiny_tokenizer(bos=False, eos=False))


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "preskip.evaluate.harness")
    with pytest.raises(PreskipError, match=r"lm-eval is not installed: pip install 'preskip\[eval\]'"):
        importlib.import_module("preskip.evaluate.harness")

import math
import tracemalloc
from array import array

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

import zoo
from preskip.data.blocks import Window
from preskip.data.corpus import Document
from preskip.data.last_word import LastWordItem, build_items
from preskip.errors import DivergedError, PreskipError
from preskip.evaluate.likelihood import (
    batches,
    check_causal,
    document_records,
    document_windows,
    last_word_records,
    last_word_windows,
    score_sequences,
    token_scores,
)
from preskip.evaluate.sharing import plain_rows
from preskip.evaluate.texts import prepare_texts, score_texts
from tiny_model import tiny_llama
from tiny_text import PROSE, tiny_tokenizer

WINDOWS = [Window(list(range(5, 5 + length)), scored_from) for length, scored_from in ((9, 1), (4, 3), (30, 7), (9, 8))]


def naive(model, window: Window) -> tuple[float, bool]:
    """One sequence alone, all logits, log-softmax in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([window.input_ids])).logits[0].double()
    log_probabilities = logits.log_softmax(-1)
    scored = range(window.scored_from, len(window.input_ids))
    nll = -sum(log_probabilities[i - 1, window.input_ids[i]].item() for i in scored)
    return nll, all(logits[i - 1].argmax().item() == window.input_ids[i] for i in scored)


def gemma2() -> Gemma2ForCausalLM:
    """Has a soft cap behind its output head, which scoring must keep."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.05,
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny_llama, gemma2])
@pytest.mark.parametrize("batch_tokens", [1, 24, 2048])
def test_scores_equal_one_by_one_whatever_the_batch(make, batch_tokens):
    model = make()
    scores = score_sequences(model, WINDOWS, batch_tokens=batch_tokens)
    for window, score in zip(WINDOWS, scores, strict=True):
        nll, greedy = naive(model, window)
        assert score.nll == pytest.approx(nll, abs=1e-4)
        assert score.tokens == len(window.input_ids) - window.scored_from
        assert score.greedy == greedy


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon_alibi", "gpt_neo", "mixtral", "gemma3", "deepseek_v3"])
def test_padding_is_never_seen_although_nothing_masks_it(name):
    model = zoo.build(name).eval()
    windows = [Window([3 + (i * 7 + length) % 5 for i in range(length)], 1) for length in (14, 9, 3)]
    together = score_sequences(model, windows)
    for window, score in zip(windows, together, strict=True):
        assert score.nll == pytest.approx(naive(model, window)[0], abs=2e-5)


def test_greedy_is_the_argmax():
    model = tiny_llama()
    start = [7, 8, 9]
    with torch.no_grad():
        best = model(input_ids=torch.tensor([start])).logits[0, -1].argmax().item()
    right, wrong = score_sequences(model, [Window([*start, best], 3), Window([*start, (best + 1) % 400], 3)])
    assert right.greedy
    assert not wrong.greedy
    assert right.nll < wrong.nll


def test_sequences_that_differ_in_the_last_token_share_a_row():
    model = tiny_llama()
    windows = [Window([5, 6, 7, token], scored_from) for token, scored_from in ((8, 3), (9, 2), (10, 3), (8, 1))]
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores = score_sequences(model, windows)
    hook.remove()
    assert rows == [1]
    for window, score in zip(windows, scores, strict=True):
        nll, greedy = naive(model, window)
        assert score.nll == pytest.approx(nll, abs=1e-5)
        assert (score.greedy, score.tokens) == (greedy, len(window.input_ids) - window.scored_from)


def test_long_batches_are_scored_in_parts():
    """More rows of logits than are taken at once for the loss."""
    model = tiny_llama(max_position_embeddings=700)
    window = Window([5 + i % 300 for i in range(650)], 1)
    (score,) = score_sequences(model, [window])
    assert score.nll == pytest.approx(naive(model, window)[0], rel=1e-5)
    assert score.tokens == 649


@pytest.mark.parametrize("vocabulary", [3, 2_000_000])
def test_rows_are_scored_whatever_their_width(vocabulary):
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    targets = torch.tensor([best[0], 0, best[2], 1, best[4]])
    nll, greedy = token_scores(logits, targets)
    expected = logits.double().logsumexp(-1) - logits.double()[range(5), targets]
    assert nll.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert greedy.tolist() == (targets == best).tolist()


def test_head_hook_is_removed_and_mode_restored():
    model = tiny_llama().train()
    score_sequences(model, WINDOWS[:1])
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_nan_is_a_failure():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(PreskipError, match="NaN"):
        score_sequences(model, WINDOWS[:1])


@pytest.mark.parametrize(("context_length", "stride"), [(200, 200), (16, 16), (16, 5)])
def test_document_records_score_every_token_once(context_length, stride):
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    documents = [Document("a", PROSE[:300], "a"), Document("b", PROSE[300:420], "b")]
    windows, owners = document_windows(documents, tokenizer, context_length=context_length, stride=stride)
    records = document_records("texts", documents, owners, score_sequences(model, windows), tokenizer)
    for document, record in zip(documents, records, strict=True):
        assert record["tokens"] == len(tokenizer(document.text)["input_ids"])
        assert record["bytes"] == len(document.text.encode())
        assert record["words"] == len(document.text.split())
    if context_length == 200:
        ids = [tokenizer.bos_token_id, *tokenizer(documents[1].text)["input_ids"]]
        assert records[1]["nll"] == pytest.approx(naive(model, Window(ids, 1))[0], abs=1e-3)
    # A random model of 400 tokens is near the uniform distribution.
    assert records[0]["nll"] / records[0]["tokens"] == pytest.approx(math.log(400), rel=0.1)


def test_what_is_kept_of_a_token_is_small():
    """Of a list of its own, each of its tokens alone would take 40 bytes."""
    tokenizer = tiny_tokenizer()
    texts = [" ".join(f"{word} {number}" for word in (PROSE * 5).split()) for number in range(20)]  # no two rows alike
    documents = [Document(f"d{number}", text, f"d{number}") for number, text in enumerate(texts)]
    document_windows(documents[:1], tokenizer, context_length=512, stride=512)  # what the first call alone loads
    tracemalloc.start()
    windows, _ = document_windows(documents, tokenizer, context_length=512, stride=512)
    kept, _ = tracemalloc.get_traced_memory()
    tokens = sum(len(window.input_ids) for window in windows)
    assert kept < 6 * tokens
    tracemalloc.reset_peak()
    rows = plain_rows({index: array("i", window.input_ids[:-1]) for index, window in enumerate(windows)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, rows)) == tokens - len(windows)
    assert peak - kept < 28 * tokens


def test_documents_of_a_group_are_a_cluster():
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    documents = [Document(name, PROSE[:40], group) for name, group in (("a1", "a"), ("b", "b"), ("a2", "a"))]
    windows, owners = document_windows(documents, tokenizer, context_length=64, stride=64)
    records = document_records("texts", documents, owners, score_sequences(model, windows), tokenizer)
    assert [record.get("cluster") for record in records] == ["a", None, "a"]
    described = prepare_texts("texts", documents, tokenizer, context_length=64).describe(
        tokenizer, domain="in", title="texts", source="here", sha256=None
    )
    assert (described["documents"], described["clusters"]) == (3, 2)


def test_last_word_records():
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    items = [LastWordItem("a#1", "a", "a", "The ships waited for the", "harbor")]
    items, windows, left = last_word_windows(items, tokenizer)
    assert left == []
    assert tokenizer.decode(windows[0].input_ids[windows[0].scored_from :]) == " harbor"
    (record,) = last_word_records("words", items, score_sequences(model, windows))
    nll, greedy = naive(model, windows[0])
    assert record["scores"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert record["scores"]["acc"] == greedy
    assert (record["set"], record["id"], record["cluster"], record["target"]) == ("words", "a#1", "a", "harbor")


def test_last_words_of_one_group_of_documents_are_a_cluster():
    documents = [Document(name, PROSE.replace("harbor", name), "book") for name in ("village", "station")]
    items, windows, _ = last_word_windows(build_items(documents), tiny_tokenizer())
    records = last_word_records("words", items, score_sequences(tiny_llama(), windows))
    assert {record["id"].partition("#")[0] for record in records} == {"village", "station"}
    assert {record["cluster"] for record in records} == {"book"}


def test_an_item_beyond_the_context_is_named_and_the_others_are_kept():
    items = [LastWordItem("a#1", "a", "a", "The ships waited for the", "harbor")]
    items += [LastWordItem("b#1", "b", "b", "a " * 90, "b")]
    kept, windows, left = last_word_windows(items, tiny_tokenizer(), 40)
    assert [item.id for item in kept] == ["a#1"]
    assert len(windows) == 1
    assert left[0].startswith("last-word item b#1: ")
    assert left[0].endswith("tokens exceed the context of 40")


def test_an_item_may_fill_the_context():
    """The last token is predicted, not read."""
    items = [LastWordItem("a#1", "a", "a", "The ships waited for the", "harbor")]
    _, (window,), _ = last_word_windows(items, tiny_tokenizer())
    read = len(window.input_ids) - 1
    assert last_word_windows(items, tiny_tokenizer(), read) == (items, [window], [])
    assert last_word_windows(items, tiny_tokenizer(), read - 1)[0] == []


def test_batches_hold_as_many_padded_tokens_as_they_may():
    assert list(batches([3, 3, 3, 7, 1], 6, length=int)) == [[3, 3], [3], [7], [1]]


def test_a_document_that_is_not_finite_is_named_and_the_others_are_kept(capsys):
    """One embedding is NaN: the document that holds its token has no score, the other has the same as without it."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    documents = [Document("a", "The ships waited.", "a"), Document("b", "The ships waited. Q now.", "b")]
    (clean,) = score_texts(model, [prepare_texts("t", documents[:1], tokenizer, context_length=64)], tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("Q")["input_ids"][0]] = float("nan")
    text = prepare_texts("t", documents, tokenizer, context_length=64)
    with pytest.raises(DivergedError):
        score_texts(model, [text], tokenizer)
    good, bad = score_texts(model, [text], tokenizer, keep_failed=True)
    assert good["nll"] == pytest.approx(clean["nll"], rel=1e-6)
    assert (bad["nll"], bad["failed"]) == (None, "its log-likelihood is NaN or infinite: try --dtype float32")
    assert "t: 'b' left out: its log-likelihood is NaN" in capsys.readouterr().err


def test_a_vocabulary_of_a_few_tokens_can_be_checked():
    for size in (3, 4, 10):
        check_causal(tiny_llama(vocab_size=size))


def test_a_window_may_fill_the_whole_context():
    """The token predicted last is not read: 8 positions score 8 tokens behind the start token."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=8)).eval()
    window = Window(list(range(5, 14)), 1)
    (score,) = score_sequences(model, [window])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([window.input_ids[:-1]]), labels=None).logits[0].log_softmax(-1)
    assert score.nll == pytest.approx(-sum(expected[i, window.input_ids[i + 1]].item() for i in range(8)), abs=1e-4)


def test_a_model_that_sees_later_tokens_is_refused():
    settings = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    check_causal(tiny_llama())
    check_causal(tiny_llama().to(torch.bfloat16))
    check_causal(BertLMHeadModel(BertConfig(**settings, intermediate_size=64, is_decoder=True)).eval())
    with pytest.raises(PreskipError, match="sees later tokens"):
        check_causal(BertLMHeadModel(BertConfig(**settings, intermediate_size=64)).eval())

"""Models and tokenizers as people have them: scored right, or refused before anything starts."""

import json
import math

import pytest
import torch
from transformers import ByT5Tokenizer, CTRLTokenizer

from commands import preskip
from preskip.data.blocks import check_rows, heldout_windows, scored_size
from preskip.data.corpus import Document
from preskip.data.last_word import LastWordItem, encode_item
from preskip.errors import PreskipError
from tiny_model import save_tiny_llama, tiny_llama, write_corpus
from tiny_text import tiny_tokenizer

PROBE = ["--arms", "none,preskip", "--steps", 2, "--batch-size", 2, "--seq-len", 16, "--context-length", 32]
PROBE += ["--eval-documents", 2, "--eval-words", 20, "--device", "cpu", "--dtype", "float32", "--out", "run", "--json"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_corpus(tmp_path / "corpus.jsonl")


def evaluated(folder, corpus, capsys, *more):
    assert (
        preskip("eval", folder, "--corpus", corpus, "--context-length", 64, "--dtype", "float32", "--json", *more) == 0
    )
    return json.loads(capsys.readouterr().out)


def ctrl(folder):
    """CTRL's word pieces, with no special token at all."""
    pieces = ["<unk>", "th@@", "e", "the", "ships", "ship@@", "s", "waited", "har@@", "bor"]
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
    merges = ["t h", "th e</w>", "s h", "sh i", "shi p", "ship s</w>", "h a", "ha r"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<unk>")


def test_bytes_as_tokens(corpus, tmp_path, capsys):
    """ByT5 has no offsets: the probe makes its items, and bits per byte are those of the likelihood by hand."""
    folder = tmp_path / "byt5"
    model = tiny_llama(vocab_size=384, eos_token_id=1, bos_token_id=None, max_position_embeddings=1024)
    model.save_pretrained(folder)
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder)
    text = "naïve ships 文"
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text + "."}) + "\n")
    found = evaluated(folder, tmp_path / "two.jsonl", capsys)["metrics"]["two"]["bits_per_byte"]["value"]
    nats = 0.0
    for raw in (text.encode(), (text + ".").encode()):
        ids = [1, *(byte + 3 for byte in raw)]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(scores[place, ids[place + 1]].item() for place in range(len(raw)))
    assert found == pytest.approx(nats / math.log(2) / (2 * len(text.encode()) + 1), rel=1e-5)
    context, target = encode_item(LastWordItem("a#1", "a", "a", "the naïve", "文"), tokenizer)
    assert bytes(byte - 3 for byte in context + target).decode() == "the naïve 文"
    assert bytes(byte - 3 for byte in target).decode() == " 文"
    assert preskip("probe", folder, "--corpus", corpus, *PROBE, "--last-word-items", 2) == 0
    assert json.loads(capsys.readouterr().out)["sets"]["last_word"]["items"] == 2


def test_a_tokenizer_without_offsets_and_special_tokens(tmp_path):
    """Its first token cannot be scored: its characters are taken off the bytes."""
    tokenizer = ctrl(tmp_path)
    document = Document("a", "the ships", "a")
    (window,) = heldout_windows(document, tokenizer, 16, 16)
    assert len(window.input_ids) - window.scored_from == 1
    assert scored_size(document, tokenizer).bytes == len(" ships")
    context, target = encode_item(LastWordItem("a#1", "a", "a", "the", "ships"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(context + target) == ["the", "ships"]
    assert tokenizer.convert_ids_to_tokens(target) == ["ships"]


def test_a_token_without_an_embedding_is_named_before_anything_starts(corpus, tmp_path, capsys):
    folder = save_tiny_llama(tmp_path / "model", vocab_size=300)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    highest = max(tokenizer.get_vocab().values())
    for command in (["eval", folder, "--json"], ["probe", folder, *PROBE], ["audit", folder, "--lambada", 0, "--json"]):
        assert preskip(*command, "--corpus", corpus) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert f"'<new>' has id {highest} and the model has 300 embeddings for the {highest + 1} tokens" in error
    assert not (tmp_path / "run").exists()
    check_rows(highest + 1, tokenizer)
    check_rows(9999, tokenizer)  # more rows than tokens
    with pytest.raises(PreskipError, match="<new>"):
        check_rows(highest, tokenizer)


def test_a_vocabulary_below_eighteen(tmp_path, capsys, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    words = {"</s>": 0, "ship": 1, "sea": 2, "wind": 3, "<unk>": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_llama(vocab_size=5, eos_token_id=0).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained("model")
    lines = [" ".join(["ship sea wind"] * (8 + n)) for n in range(12)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    assert preskip("probe", tmp_path / "model", "--corpus", "c.jsonl", *PROBE, "--last-word-items", 0) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["arms"]["preskip"]["metrics"]["c"]["bits_per_byte"]["value"] > 0
    assert results["kv_cache"]["base_bytes"] == results["kv_cache"]["arm_bytes"] > 0
    assert "notes" not in results


def test_no_spaces_no_word_perplexity(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_llama(tmp_path / "model")
    texts = [f"第{n}條河流載著小船經過老磨坊，農夫在橋邊數著羊群。" * 20 for n in range(8)]
    (tmp_path / "zh.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert list(evaluated(folder, "zh.jsonl", capsys)["metrics"]["zh"]) == ["bits_per_byte"]
    assert preskip("probe", folder, "--corpus", "zh.jsonl", *PROBE, "--last-word-items", 0) == 0
    results = json.loads(capsys.readouterr().out)
    described = results["sets"]["zh"]
    assert described["notes"] == ["no word perplexity: no spaces stand between the words of 2 of its documents"]
    assert described["bytes"] == 2 * (19 * 3 + 1)  # --eval-words cuts by characters: 19 of three bytes and a digit


def test_a_document_without_tokens_is_named_and_the_others_are_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer(bos=False, eos=False).save_pretrained(folder)
    texts = ["The ships waited.", "T", "Nobody knew when."]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text, "id": text}) for text in texts))
    results = evaluated(folder, "c.jsonl", capsys)
    assert results["sets"]["c"]["documents"] == 2
    assert results["notes"] == ["c: 'T' left out: the tokenizer gives no token to score"]

"""The paper's own scoring, held against a computation written out item by item, and its rows from files and the Hub."""

import json
import math
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from preskip.data.corpus import Document
from preskip.data.local import data_directory
from preskip.errors import PreskipError
from preskip.evaluate.paper import (
    COLUMNS,
    PaperData,
    Question,
    encode_paper_items,
    load_paper_data,
    paper_columns,
    paper_scores,
)
from preskip.stats import compare
from tiny_model import tiny_llama
from tiny_text import PROSE, tiny_tokenizer

SENTENCES = [part.strip() + "." for part in PROSE.replace("\n\n", " ").split(". ") if len(part.split()) > 3]
SOURCE = {"title": "tiny", "source": "made up", "sha256": None}


def tiny_data(**changes) -> PaperData:
    questions = [
        Question(SENTENCES[i], (SENTENCES[i + 1], SENTENCES[i + 2], "The ships.", "A new tax."), i % 4)
        for i in range(8)
    ]
    paragraphs = [f" {SENTENCES[i]} {SENTENCES[i + 1]} \n" for i in range(4)]
    wikitext = ["", " = Harbor = \n", paragraphs[0], " short line \n", paragraphs[1]]
    wikitext += [" = Council = \n", *paragraphs[2:]]
    fields = {
        "lambada": [sentence.rstrip(".") for sentence in SENTENCES],
        "hellaswag": questions,
        "arc_easy": questions[:3],
        "wikitext": wikitext,
        "sources": dict.fromkeys(COLUMNS, SOURCE),
    }
    return PaperData(**{**fields, **changes})


def log_probabilities(model, ids):
    """Natural log-probabilities [T, V] after each token of one unpadded sequence."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def written_out(model, tokenizer, data, length=512):
    """The four columns in the plainest way: one sequence at a time, LAMBADA token by token."""

    def encode(text):
        return tokenizer(text)["input_ids"]

    right = []
    for text in data.lambada:
        context, word = text.rsplit(" ", 1)
        ids, target = encode(context), tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        right.append(1.0)
        for token in target:
            if log_probabilities(model, ids)[-1].argmax() != token:
                right[-1] = 0.0
                break
            ids = [*ids, token]
    columns = {"paper:lambada": sum(right) / len(right)}
    for name, questions in (("hellaswag", data.hellaswag), ("arc_easy", data.arc_easy)):
        hits = 0
        for question in questions:
            start, best, chosen = len(encode(question.context)), -math.inf, None
            for index, ending in enumerate(question.endings):
                ids = encode(question.context + " " + ending)[:length]
                logs = log_probabilities(model, ids)
                total = sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids)))
                if total / (len(ids) - start) > best:
                    best, chosen = total / (len(ids) - start), index
            hits += chosen == question.gold
        columns[f"paper:{name}"] = hits / len(questions)
    losses = []
    for text in data.wikitext:
        ids = encode(text)[:length]
        if len(text.strip()) >= 50 and len(ids) >= 10:
            losses.append(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item())
    columns["paper:wikitext"] = math.exp(sum(losses) / len(losses))
    return columns


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learnt the prose by heart, so that some items are right and some wrong."""
    torch.manual_seed(0)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([tokenizer(PROSE)["input_ids"]])
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), tokenizer


@pytest.mark.parametrize("length", [512, 12])
def test_columns_are_those_of_a_written_out_computation(trained, length):
    model, tokenizer = trained
    data = tiny_data(lambada=[text for text in tiny_data().lambada if len(tokenizer(text)["input_ids"]) < length])
    if length == 12:  # contexts that leave something to score after the cut
        short = [Question("The council", question.endings, question.gold) for question in data.hellaswag]
        data = tiny_data(hellaswag=short, arc_easy=short[:3], lambada=["The committee met", "Farmers paid it in grain"])
    columns = paper_columns(paper_scores(model, encode_paper_items(data, tokenizer, context_length=length)))
    expected = written_out(model, tokenizer, data, length)
    assert list(columns) == list(COLUMNS)
    for name, value in expected.items():
        assert columns[name] == pytest.approx(value, rel=1e-4), name
    if length == 512:
        assert 0 < expected["paper:lambada"] < 1  # or the comparison would show little
        assert expected["paper:wikitext"] < 100


def test_scores_do_not_depend_on_the_batch(trained):
    model, tokenizer = trained
    items = encode_paper_items(tiny_data(), tokenizer)
    one, many = paper_scores(model, items, batch_tokens=1), paper_scores(model, items, batch_tokens=4096)
    for first, second in zip(one, many, strict=True):
        assert first["scores"] == pytest.approx(second["scores"], rel=1e-4)


def test_records_are_items_that_pair_and_give_the_columns(trained):
    model, tokenizer = trained
    items = encode_paper_items(tiny_data(), tokenizer)
    records, other = paper_scores(model, items), paper_scores(tiny_llama(), items)
    columns, other_columns = paper_columns(records), paper_columns(other)
    assert {record["kind"] for record in records} == {"item"}
    assert {name: value["items"] for name, value in items.sets.items()} == {
        "paper:lambada": len(SENTENCES),
        "paper:hellaswag": 8,
        "paper:arc_easy": 3,
        "paper:wikitext": 4,
    }
    stored = json.loads(json.dumps([*records, {"set": "heldout", "kind": "document", "id": "x", "nll": 1.0}]))
    assert paper_columns(stored) == columns
    entries = {(entry["set"], entry["metric"]): entry for entry in compare(records, other)}
    ratio = columns["paper:wikitext"] / other_columns["paper:wikitext"]
    assert entries["paper:wikitext", "nll"]["difference"] == pytest.approx(math.log(ratio))
    assert entries["paper:wikitext", "nll"]["clusters"] == 2  # articles
    gain = columns["paper:lambada"] - other_columns["paper:lambada"]
    assert entries["paper:lambada", "acc"]["difference"] == pytest.approx(gain)


def test_the_first_of_equal_endings_wins():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    twice = [Question(SENTENCES[0], (SENTENCES[1], SENTENCES[1]), gold) for gold in (0, 1)]
    records = paper_scores(model, encode_paper_items(tiny_data(hellaswag=twice), tokenizer))
    found = {record["id"]: record["scores"]["acc"] for record in records if record["set"] == "paper:hellaswag"}
    assert found == {"hellaswag#0": 1.0, "hellaswag#1": 0.0}


def test_items_of_nan_are_named_and_the_columns_are_of_the_others():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    items = encode_paper_items(tiny_data(), tokenizer)
    whole = paper_scores(model, items)
    read = [{token for window in (items.windows[n],) for token in window.input_ids[:-1]} for n in range(len(SENTENCES))]
    token = next(token for token in sorted(read[0]) if sum(token in ids for ids in read) == 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    records = paper_scores(model, items)
    assert records[0]["failed"] == "its log-likelihood is NaN or infinite: try --dtype float32"
    kept = [
        old["scores"]["acc"]
        for old, new in zip(whole, records, strict=True)
        if new["set"] == "paper:lambada" and "failed" not in new
    ]
    assert 0 < len(kept) < len(SENTENCES)
    assert paper_columns(records)["paper:lambada"] == pytest.approx(sum(kept) / len(kept))


def test_what_cannot_be_scored_is_left_out():
    tokenizer = tiny_tokenizer()
    long = Question(" ".join(SENTENCES), ("The end.", "No end."), 0)
    data = tiny_data(
        lambada=["word", SENTENCES[0], " ".join(SENTENCES)],
        hellaswag=[long, *tiny_data().hellaswag[:1], Question("", ("One.", "Two."), 0)],
    )
    items = encode_paper_items(data, tokenizer, context_length=100)
    ids = [item.id for item in items.items if item.set in ("paper:lambada", "paper:hellaswag")]
    assert ids == ["lambada_openai#1", "hellaswag#1"]
    assert max(len(window.input_ids) for window in items.windows) <= 100


def test_a_set_without_items_is_an_error():
    with pytest.raises(PreskipError, match="paper:wikitext: none of its rows can be scored"):
        encode_paper_items(tiny_data(wikitext=[" = Harbor = \n"]), tiny_tokenizer())


def test_one_article_gives_no_clusters():
    data = tiny_data(wikitext=tiny_data().wikitext[:5])
    items = encode_paper_items(data, tiny_tokenizer())
    assert {item.cluster for item in items.items} == {None}


def write_rows(folder, name, rows):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_come_from_the_data_directory(tmp_path):
    write_rows(tmp_path, "lambada/lambada_openai_test.jsonl", [{"text": text} for text in SENTENCES])
    write_rows(
        tmp_path,
        "hellaswag/hellaswag_val_1000_olmes.jsonl",
        [{"ind": 7, "query": "Sailing: The wind fell.", "choices": ["a", " b", "c", "d"], "gold": 2}],
    )
    row = {"id": "q", "question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    write_rows(tmp_path, "arc_easy/arc_easy_validation.jsonl", [row])
    write_rows(tmp_path, "arc_easy/arc_easy_test.jsonl", [{**row, "question": "From the test set?"}])
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/wiki.valid.tokens").write_text(" \n = Harbor = \n \n Ships <unk> waited . \n")
    data = load_paper_data(tmp_path, items=2, rows=4)
    assert list(data.lambada) == SENTENCES[:2]
    assert data.hellaswag == [Question("The wind fell.", ("a", "b", "c", "d"), 2)]
    assert data.arc_easy == [Question("Why?", ("x", "y"), 1)]
    assert list(data.wikitext) == [" \n", " = Harbor = \n", " \n", " Ships <unk> waited . \n"]
    assert data.sources["paper:wikitext"]["title"] == "WikiText validation with <unk>"
    assert data.sources["paper:lambada"]["source"] == "lambada/lambada_openai_test.jsonl"
    (tmp_path / "wikitext2/wiki.valid.raw").write_text("raw text")
    assert load_paper_data(tmp_path).sources["paper:wikitext"]["title"] == "WikiText validation"
    (tmp_path / "wikitext2/wiki.valid.raw").write_bytes(b"\xef\xbb\xbfraw text\r\nmore")
    assert list(load_paper_data(tmp_path).wikitext) == ["raw text\n", "more\n"]
    (tmp_path / "wikitext2/wiki.valid.raw").write_bytes(b"caf\xe9")
    with pytest.raises(PreskipError, match=r"wiki.valid.raw is not UTF-8 \(byte 3\): convert it"):
        load_paper_data(tmp_path)


HUB = {
    ("EleutherAI/lambada_openai", "en", "test"): {"text": "In my palm is a stone"},
    ("Rowan/hellaswag", None, "validation"): {"ctx": "He rows", "ctx_a": "-", "endings": ["off.", "on."], "label": "1"},
    ("allenai/ai2_arc", "ARC-Easy", "validation"): {
        "question": "Why?",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    },
    ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation"): {"text": " = Harbor = \n"},
}


def test_rows_come_from_the_hub_where_there_is_no_directory(monkeypatch, tmp_path):
    def load_dataset(name, config, *, split, streaming):
        assert streaming
        return islice(iter(lambda: HUB[name, config, split], None), 1000)  # more than may be read

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load_paper_data(tmp_path)
    assert (len(data.lambada), len(data.hellaswag), len(data.arc_easy), len(data.wikitext)) == (500, 500, 500, 300)
    assert data.hellaswag[0] == Question("He rows", ("off.", "on."), 1)
    assert data.arc_easy[0] == Question("Why?", ("x", "y", "z"), 2)
    assert data.sources["paper:wikitext"]["source"] == (
        "Hugging Face data set Salesforce/wikitext (wikitext-103-raw-v1), split validation"
    )


def test_no_rows_at_all_is_one_line(monkeypatch, tmp_path):
    def load_dataset(*args, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(PreskipError, match=r"^LAMBADA, OpenAI version is neither .*no network.*give --data-dir$"):
        load_paper_data(tmp_path)


def test_pythia_path_on_real_text():
    """A tiny random GPT-NeoX with Pythia's tokenizer: nothing of it is scored at another place or cut elsewhere."""
    directory = data_directory()
    if directory is None or not (directory / "pythia/20B_tokenizer.json").is_file():
        pytest.skip("no data directory with Pythia's tokenizer (PRESKIP_DATA)")
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "pythia/20B_tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        rotary_pct=0.25,
    )
    model = GPTNeoXForCausalLM(config).eval()
    data = load_paper_data(directory, items=6, rows=12)
    columns = paper_columns(paper_scores(model, encode_paper_items(data, tokenizer)))
    expected = written_out(model, tokenizer, data)
    for name in COLUMNS:
        assert columns[name] == pytest.approx(expected[name], rel=1e-4), name
    assert columns["paper:wikitext"] == pytest.approx(50304, rel=0.3)  # a random model knows nothing


def test_what_is_scored_is_no_development_text():
    paragraph = "A paragraph of fifty characters or more, scored by the paper's protocol."
    heading = " = = History = = "
    documents = [
        Document("a", f"{heading}\n {paragraph} \nMore.", "a"),
        Document("b", f"{heading}\nOther text.", "b"),  # headings are shared by many pages
    ]
    data = PaperData(lambada=[], hellaswag=[], arc_easy=[], wikitext=[f" {paragraph} \n", f"{heading}\n"], sources={})
    assert [document.id for document in data.without_scored(documents)] == ["b"]

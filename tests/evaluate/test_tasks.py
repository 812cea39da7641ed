"""lm-eval tasks as records: against lm-eval's own evaluator and backend on the same data."""

import functools
import importlib.util
import json
import linecache
import math
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.config.task import TaskConfig
from lm_eval.models.huggingface import HFLM

from local_data import SENTENCES, write_local_data
from preskip.data.local import data_directory, load_local
from preskip.errors import PreskipError
from preskip.evaluate.task_loading import _task_manager
from preskip.evaluate.task_preparing import _prompt_sha256
from preskip.evaluate.task_settings import TaskSettings
from preskip.evaluate.tasks import TaskSuite
from preskip.stats import compare_arms
from tiny_model import tiny_llama
from tiny_text import tiny_tokenizer

TASKS = ["lambada_openai", "wikitext", "arc_easy", "hellaswag"]
CONTEXT_LENGTH = 32
REAL = data_directory()
# What the task definitions name; the reference reads the same rows from there.
HUB = {"EleutherAI/lambada_openai": "lambada_openai", "EleutherAI/wikitext_document_level": "wikitext"}
HUB |= {"allenai/ai2_arc": "arc_easy", "Rowan/hellaswag": "hellaswag"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_local_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture(scope="module")
def manager():
    return _task_manager(None, None, defaults=True)  # as the code under test: the index is built once


@pytest.fixture
def hub(data, monkeypatch):
    """The Hub, with the rows of the local data as its data sets."""

    def load_dataset(path, name=None, **options):
        splits = dict(load_local(HUB[path], data).splits)
        splits.setdefault("train", next(iter(splits.values())))
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)


def reference(model, tokenizer, manager, samples=None):
    """lm-eval's own evaluator with its own backend, all of its definitions untouched."""
    backend = HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT_LENGTH, batch_size=2)
    return lm_eval.simple_evaluate(backend, tasks=TASKS, task_manager=manager, samples=samples, bootstrap_iters=0)


@pytest.mark.parametrize("limit", [None, 3])
def test_records_and_metrics_equal_those_of_lm_eval(data, model, manager, hub, limit):
    tokenizer = tiny_tokenizer()
    suite = TaskSuite(TASKS, tokenizer, data_dir=data, limit=limit, context_length=CONTEXT_LENGTH, seed=7)
    records, metrics, _ = suite.evaluate(model)
    facts = {task: {**own, "metrics": metrics[task]} for task, own in suite.facts.items()}
    totals = {task: facts[task]["of"] for task in TASKS}
    drawn = {
        task: sorted(np.random.default_rng(7).choice(total, size=limit, replace=False).tolist())
        if limit and limit < total
        else list(range(total))
        for task, total in totals.items()
    }
    expected = reference(model, tokenizer, manager, drawn)
    for task in TASKS:
        rows = [record for record in records if record["set"] == task]
        samples = sorted(expected["samples"][task], key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == drawn[task]
        assert (
            facts[task]["items"] == len(rows) == len(samples) == (min(limit, totals[task]) if limit else totals[task])
        )
        assert facts[task]["version"] == expected["versions"][task]
        for row, sample in zip(rows, samples, strict=True):
            if task == "wikitext":
                log_likelihood, words = sample["word_perplexity"]
                assert row["nll"] == pytest.approx(-log_likelihood, abs=1e-3)
                assert (row["words"], row["bytes"]) == (words, sample["bits_per_byte"][1])
                continue
            log_likelihoods = [answer[0] for answer in sample["filtered_resps"]]
            gold = sample["target"] if task in ("arc_easy", "hellaswag") else 0
            assert row["scores"]["nll"] == pytest.approx(-log_likelihoods[gold], abs=1e-4)
            for name in ("acc", "acc_norm"):
                assert row["scores"].get(name) == sample.get(name)
        # What lm-eval aggregates, by its evaluator, by us, and recomputed from the records.
        theirs = {key.removesuffix(",none"): value for key, value in expected["results"][task].items()}
        for name, value in facts[task]["metrics"].items():
            assert value == pytest.approx(theirs[name], rel=1e-4)
        if task == "wikitext":
            nll = sum(row["nll"] for row in rows)
            again = {
                "word_perplexity": math.exp(nll / sum(row["words"] for row in rows)),
                "bits_per_byte": nll / math.log(2) / sum(row["bytes"] for row in rows),
            }
        else:
            again = {
                name: np.mean([row["scores"][name] for row in rows]) for name in ("acc", "acc_norm") if name in theirs
            }
        if task == "lambada_openai":
            again["perplexity"] = math.exp(np.mean([row["scores"]["nll"] for row in rows]))
        for name, value in again.items():
            assert facts[task]["metrics"][name] == pytest.approx(value, rel=1e-9)


def test_without_local_files_the_hub_is_asked(model, hub, tmp_path):
    tokenizer = tiny_tokenizer()
    suite = TaskSuite(["lambada_openai"], tokenizer, data_dir=tmp_path)
    assert suite.sets["lambada_openai"]["source"] == "Hugging Face data set EleutherAI/lambada_openai (default)"
    assert len(suite.score(model)) == len(SENTENCES)


def test_prompt_hash_is_the_same_from_hub_and_local_files(data, hub, tmp_path):
    local, remote = (
        TaskSuite(["hellaswag", "arc_easy"], tiny_tokenizer(), data_dir=place) for place in (data, tmp_path)
    )
    for task in ("hellaswag", "arc_easy"):
        assert local.facts[task]["prompt_sha256"] == remote.facts[task]["prompt_sha256"]
    assert local.facts["hellaswag"]["prompt_sha256"] != local.facts["arc_easy"]["prompt_sha256"]


def test_prompt_hash_of_a_task_with_functions_is_the_same_in_every_process(data, tmp_path, monkeypatch):
    """lm-eval loads a task's functions anew in each; hellaswag has one in a field of a field, too."""
    code = "def process_docs(dataset, start=0):\n    return dataset\n"
    (tmp_path / "own.py").write_text(code)

    def task():
        spec = importlib.util.spec_from_file_location("own", tmp_path / "own.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        own = module.process_docs
        config = TaskConfig(task="own", process_docs=own, doc_to_text=functools.partial(own, start=start))
        config.fewshot_config = {"process_docs": own}
        return SimpleNamespace(config=config, get_config=lambda name: getattr(config, name))

    start = 1
    first, second = task(), task()
    assert first.config.process_docs is not second.config.process_docs
    start = 2
    hashes = [_prompt_sha256(one, None, TaskSettings(), 1234) for one in (first, second, task())]
    assert hashes[0] == hashes[1] != hashes[2]
    (tmp_path / "own.py").write_text(code.replace("return dataset", "return dataset.shuffle()"))
    linecache.checkcache()
    start = 1
    assert _prompt_sha256(task(), None, TaskSettings(), 1234) != hashes[0]


def test_one_suite_scores_many_models_alike(data):
    suite = TaskSuite(TASKS, tiny_tokenizer(), data_dir=data, limit=4, context_length=CONTEXT_LENGTH)
    first, second = tiny_llama(), tiny_llama(intermediate_size=48)
    once = suite.score(first)
    other = suite.score(second)
    assert suite.score(first) == once
    assert [(row["set"], row["id"]) for row in other] == [(row["set"], row["id"]) for row in once]
    assert other != once
    assert len({(row["set"], row["id"]) for row in once}) == len(once)


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_scores_do_not_depend_on_the_batch(data, model, batch_tokens):
    suite = TaskSuite(TASKS, tiny_tokenizer(), data_dir=data, context_length=CONTEXT_LENGTH)
    done = []
    rows = suite.score(model, batch_tokens=batch_tokens, advance=lambda count, note: done.append(count))
    assert done[-1] == suite.size
    for row, alone in zip(rows, suite.score(model, batch_tokens=200), strict=True):
        if row["kind"] == "document":
            assert row["nll"] == pytest.approx(alone["nll"], abs=1e-4)
        else:
            assert row["scores"] == pytest.approx(alone["scores"], abs=2e-5)


def test_ids_are_the_datas_own_where_it_has_some(data, model):
    rows = TaskSuite(TASKS, tiny_tokenizer(), data_dir=data, context_length=CONTEXT_LENGTH).score(model)
    ids = {task: [row["id"] for row in rows if row["set"] == task] for task in TASKS}
    assert ids["lambada_openai"][:2] == ["lambada_openai#0", "lambada_openai#1"]
    assert ids["wikitext"] == ["First page", "Second ( page )"]
    assert ids["arc_easy"][1] == "q1"
    assert ids["hellaswag"][2] == "102"


def test_the_sample_is_random_seeded_and_the_same_for_all(data):
    def ids(seed, limit=4):
        suite = TaskSuite(["arc_easy"], tiny_tokenizer(), data_dir=data, limit=limit, seed=seed)
        return [row["id"] for row in suite.score(tiny_llama())]

    assert ids(0) == ids(0)
    assert len({tuple(ids(seed)) for seed in range(4)}) > 1
    assert any(ids(seed) != [f"q{i}" for i in range(4)] for seed in range(4))
    assert len(ids(0, limit=99)) == len(SENTENCES)


def test_sets_describe_what_is_scored(data, model):
    suite = TaskSuite(["wikitext", "lambada_openai"], tiny_tokenizer(), data_dir=data, context_length=CONTEXT_LENGTH)
    wikitext, lambada = suite.sets["wikitext"], suite.sets["lambada_openai"]
    rows = suite.score(model)
    pages = [row for row in rows if row["set"] == "wikitext"]
    for size in ("tokens", "bytes", "words"):
        assert wikitext[size] == sum(page[size] for page in pages)
    assert (wikitext["kind"], wikitext["primary"], wikitext["documents"]) == ("document", "bits_per_byte", 2)
    assert (wikitext["context_length"], wikitext["stride"]) == (CONTEXT_LENGTH, CONTEXT_LENGTH)
    assert (lambada["kind"], lambada["primary"], lambada["items"]) == ("item", "acc", len(SENTENCES))
    assert lambada["source"] == "lambada/lambada_openai_test.jsonl"
    json.dumps(suite.sets, allow_nan=False)


@pytest.mark.skipif(REAL is None, reason="the data directory is not there (PRESKIP_DATA)")
def test_real_sets_are_lm_evals_requests():
    suite = TaskSuite(["lambada_openai", "arc_easy", "hellaswag"], tiny_tokenizer(), data_dir=REAL, limit=50)
    context, target = suite.requests("lambada_openai")[0].args
    assert target.startswith(" ")
    assert len(target.split()) == 1
    assert not context.endswith(" ")
    assert all(request.args[0].startswith("Question: ") for request in suite.requests("arc_easy"))
    assert len(suite.requests("hellaswag")) == 200
    assert suite.facts["arc_easy"]["of"] == 2376


def test_bad_tasks_are_one_clear_line(data, monkeypatch, tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(PreskipError, match=r"unknown task 'lambada_opena': did you mean .*lambada_openai"):
        TaskSuite(["lambada_opena"], tokenizer, data_dir=data)
    with pytest.raises(
        PreskipError,
        match=r"data of task piqa are neither in the data directory nor .* give --data-dir",
    ):
        TaskSuite(["piqa"], tokenizer, data_dir=data)
    with pytest.raises(PreskipError, match="no task"):
        TaskSuite([], tokenizer, data_dir=data)
    with pytest.raises(PreskipError, match="limit of 0 items"):
        TaskSuite(["piqa"], tokenizer, data_dir=data, limit=0)


def test_a_generative_task(model, monkeypatch):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(8)]
    rows[1]["answer"] = "#### x"
    dataset = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows)}
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda **_: dataset)
    seen = []

    def generate(self, requests, disable_tqdm=False):
        seen.extend(requests)
        return [f"The answer is {2 * request.doc_id}.\n#### {2 * request.doc_id}" for request in requests]

    monkeypatch.setattr("preskip.evaluate.harness.LiveModel.generate_until", generate)
    suite = TaskSuite(["gsm8k"], tiny_tokenizer())
    records, metrics, _ = suite.evaluate(model)
    assert len(seen) == 8
    key = "exact_match,strict-match"
    assert [record["scores"][key] for record in records] == [1.0, 0.0, *6 * [1.0]]
    assert metrics["gsm8k"][key] == pytest.approx(7 / 8)
    assert suite.sets["gsm8k"]["primary"] in records[0]["scores"]  # one of its filters': what the family declares


def test_the_direction_of_a_score_is_what_lm_eval_says(data, model, monkeypatch):
    directions = {"acc": True, "bias": False, "perplexity": False}
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.higher_is_better", lambda task: {**directions, "x": None})
    suite = TaskSuite(["lambada_openai"], tiny_tokenizer(), data_dir=data)
    described = suite.sets["lambada_openai"]
    assert described["higher_is_better"] == directions
    task = suite._tasks[0].task
    monkeypatch.setattr(task, "process_results", lambda doc, answers: {"acc": 1.0, "bias": 0.25})
    records = suite.score(model)
    assert all({"acc": 1.0, "bias": 0.25}.items() <= record["scores"].items() for record in records)
    less = [{**record, "scores": {"bias": 0.2 - 0.01 * (i % 2)}} for i, record in enumerate(records)]
    (entry,) = compare_arms({"none": records, "arm": less}, {}, suite.sets)
    assert (entry["metric"], entry["verdict"]) == ("bias", "better")

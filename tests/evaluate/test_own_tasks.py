"""Own task files, groups, few-shot examples, chats and generation: per item what `lm_eval.simple_evaluate` gives."""

import json
import re
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_results_filenames, get_sample_results_filenames, make_table

from own_tasks import SENTENCES, write_own_tasks
from preskip.errors import PreskipError
from preskip.evaluate.lm_eval_files import write_lm_eval_files
from preskip.evaluate.task_names import check_tasks
from preskip.evaluate.task_settings import TaskSettings
from preskip.evaluate.tasks import TaskSuite
from preskip.experiment.preflight import check_inputs
from preskip.stats import compare_arms
from tiny_model import tiny_llama
from tiny_text import tiny_tokenizer

TASKS = ["own_group", "own_sums", "own_pages"]
CHAT = (
    "<s>{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_own_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture
def manager_is_unused(monkeypatch):
    def used(*args, **options):
        raise AssertionError("lm-eval's index takes half a minute")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", used)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


def close(mine, theirs):
    """Whether samples are equal, numbers up to rounding."""
    if isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    if isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (float, np.floating)):
        return mine == pytest.approx(theirs, abs=5e-4, rel=1e-4)
    return mine == theirs


CASES = {
    "plain": {},
    "examples": {"num_fewshot": 2},
    "chat": {"num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Answer in one word."},
    "one turn": {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": False},
    "instruction": {"system_instruction": "Answer in one word.", "gen_kwargs": "max_gen_toks=3"},
    "sampled": {"gen_kwargs": "do_sample=True,temperature=0.8,max_gen_toks=6"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lead", [False, True])
def test_samples_and_groups_equal_those_of_simple_evaluate(folder, model, case, lead):
    given, tokenizer = CASES[case], tiny_tokenizer(lead=lead)
    if "apply_chat_template" in given:
        tokenizer.chat_template = NO_SYSTEM if lead else CHAT
    settings = TaskSettings(include_path=str(folder), **given)
    # lm-eval's backend doubles the start token of rolling texts where the tokenizer adds one by itself.
    tasks = [task for task in TASKS if not (lead and task == "own_pages")]
    suite = TaskSuite(tasks, tokenizer, settings=settings, context_length=256)
    records, metrics, mine = suite.evaluate(model, batch_size=4, bootstrap_iters=100)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, max_length=256, batch_size=4),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=100,
        **{"fewshot_as_multiturn": settings.multiturn, **given},
    )
    for task, samples in theirs["samples"].items():
        assert close(mine["samples"][task], samples), task
    for key in ("results", "groups", "group_subtasks", "n-shot", "versions", "higher_is_better", "n-samples"):
        assert close(mine[key], theirs[key]), key
    assert metrics["own_group"]["acc"] == pytest.approx(theirs["groups"]["own_group"]["acc,none"])
    own = [record for record in records if record["set"] == "own_sums"]
    keys = [f"exact_match,{name}" for name in ("whole", "flexible")]
    by_filter = [[record["scores"][key] for record in own] for key in keys]
    samples = theirs["samples"]["own_sums"]
    assert by_filter == [
        [one["exact_match"] for one in samples if one["filter"] == name] for name in ("whole", "flexible")
    ]
    first = mine["samples"]["own_small"][0]["arguments"][0][0]
    is_left_out = lead and case == "chat"
    assert ("Answer in one word." in first) is ("system_instruction" in given and not is_left_out)
    note = "the chat template takes no system message: left out"
    assert [entry.get("notes") for entry in suite.sets.values()] == [[note] if is_left_out else None] * len(suite.sets)
    assert first.count("[user]") == (0 if "apply_chat_template" not in given else 3 if case == "chat" else 1)


def test_drawn_examples_of_an_item_depend_on_the_sample(folder):
    tokenizer = tiny_tokenizer()

    def prompts(limit, **given):
        settings = TaskSettings(include_path=str(folder), **given)
        suite = TaskSuite(["own_large"], tokenizer, limit=limit, settings=settings)
        found = {str(one.doc): one.args[0] for one in suite.requests("own_large")}
        return suite.facts["own_large"]["examples_drawn"], found

    is_drawn, few = prompts(3, num_fewshot=2)
    _, every = prompts(None, num_fewshot=2)
    assert is_drawn
    assert any(few[name] != every[name] for name in few)
    is_drawn, few = prompts(3)
    _, every = prompts(None)
    assert not is_drawn
    assert all(few[name] == every[name] for name in few)


def test_settings_are_part_of_the_prompts_checksum(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT

    def checksum(seeds=(0, 1, 1, 1234), **given):
        settings = TaskSettings(include_path=str(folder), **given)
        return TaskSuite(["own_small"], tokenizer, settings=settings, seeds=seeds).facts["own_small"]["prompt_sha256"]

    found = [
        checksum(),
        checksum(num_fewshot=2),
        checksum(num_fewshot=2, seeds=(0, 1, 1, 5)),
        checksum(system_instruction="Be short."),
        checksum(apply_chat_template=True),
        checksum(num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=False),
    ]
    assert len(set(found)) == len(found)
    assert checksum(seeds=(0, 1, 1, 5)) == found[0]  # without examples nothing is drawn


def test_random_generators_are_left_as_they_were(folder, model):
    settings = TaskSettings(include_path=str(folder), **CASES["sampled"])
    state = torch.get_rng_state()
    suites = [
        TaskSuite(["own_sums"], tiny_tokenizer(), settings=settings, seeds=(0, 1, seed, 1234)) for seed in (3, 3, 4)
    ]
    texts = [[one["resps"] for one in suite.evaluate(model).lm_eval["samples"]["own_sums"]] for suite in suites]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_files_are_those_that_lm_evals_tools_open(folder, model, tmp_path):
    settings = TaskSettings(include_path=str(folder))
    suite = TaskSuite(TASKS, tiny_tokenizer(), settings=settings, limit=2)
    results = suite.evaluate(model, bootstrap_iters=100).lm_eval
    expected = {task: len(rows) for task, rows in results["samples"].items()}
    about = {"batch_size": 8, "random_seed": 0}
    write_lm_eval_files(
        tmp_path / "out", results, tiny_tokenizer(), model="owner/tiny", adapter=None, settings=settings, about=about
    )
    (made,) = (tmp_path / "out").iterdir()
    assert made.name == "owner__tiny"
    names = [str(path) for path in made.iterdir()]
    (record,) = get_results_filenames(names)
    stored = json.loads(Path(record).read_text())
    assert stored["model_name"] == "owner/tiny"
    assert stored["groups"]["own_group"]["acc,none"] == pytest.approx(results["groups"]["own_group"]["acc,none"])
    assert set(stored["task_hashes"]) == set(expected)
    assert "own_group" in make_table(stored, "groups")
    samples = get_sample_results_filenames(names)
    assert len(samples) == len(expected)
    for task, rows in expected.items():
        (file,) = (name for name in samples if f"samples_{task}_" in name)
        read = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "c"))
        assert len(read) == rows
        assert {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "doc_hash"} <= set(read.features)


def test_own_tasks_go_before_lm_evals_and_paths_are_tasks(folder, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    text = (folder / "own_small.yaml").read_text()
    (own / "lambada.yaml").write_text(text.replace("task: own_small", "task: lambada_openai"))
    suite = TaskSuite(["lambada_openai"], tiny_tokenizer(), settings=TaskSettings(include_path=str(own)))
    assert suite.facts["lambada_openai"]["items"] == 3
    assert suite.sets["lambada_openai"]["source"] == "Hugging Face data set json"


def test_what_cannot_be_done_is_one_line(folder, tmp_path, model):
    tokenizer = tiny_tokenizer()

    def suite(*tasks, **given):
        return TaskSuite(list(tasks), tokenizer, settings=TaskSettings(**{"include_path": str(folder), **given}))

    with pytest.raises(PreskipError, match=r"--include-path .*/nowhere: no such folder"):
        suite("own_small", include_path=str(tmp_path / "nowhere"))
    with pytest.raises(PreskipError, match="no chat template: leave out --apply-chat-template"):
        suite("own_small", apply_chat_template=True)
    with pytest.raises(PreskipError, match="--num-fewshot -1 is not possible: it must be at least 0"):
        suite("own_small", num_fewshot=-1)
    with pytest.raises(PreskipError, match=r"task own_small: its prompts cannot be made .* --num-fewshot"):
        suite("own_small", num_fewshot=100)
    with pytest.raises(PreskipError, match="--fewshot-as-multiturn needs --apply-chat-template"):
        suite("own_small", fewshot_as_multiturn=True)
    settings = TaskSettings(include_path=str(folder), gen_kwargs="max_gen_toks=300")
    long = TaskSuite(["own_sums"], tokenizer, settings=settings, context_length=64)
    with pytest.raises(PreskipError, match=r"lm-eval cannot generate: .*\(300\)"):
        long.evaluate(model)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "t.yaml").write_text((folder / "own_small.yaml").read_text().replace("{{question}}", "{{question.x()}}"))
    with pytest.raises(PreskipError, match=r"task own_small of .*/broken cannot be loaded \(UndefinedError.*mend its"):
        suite("own_small", include_path=str(broken))


BAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/bad.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text.strip() and context}}}}"
doc_to_target: "{{{{text.split('|')[-1]}}}}"
target_delimiter: ""
metric_list: {metrics}
"""


def test_empty_over_long_and_failing_items_are_named_and_the_rest_is_kept(tmp_path, model, monkeypatch):
    """The figures are those of the same task without the bad items."""
    fine = ["a|the ships waited", "b|the wind was calm", "c|nobody knew"]
    texts = [fine[0], "d|", fine[1], "e|" + "ships waited in the harbor " * 20, None, fine[2]]
    metrics = {
        "items": ("loglikelihood", "[{metric: acc}, {metric: perplexity}]"),
        "pages": ("loglikelihood_rolling", "[{metric: word_perplexity}, {metric: bits_per_byte}]"),
    }
    found = {}
    for place, content in {"odd": texts, "fine": fine}.items():
        folder = tmp_path / place
        folder.mkdir()
        rows = [{"text": text, "context": "Once", "id": f"item {(text or 'null')[0]}"} for text in content]
        (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, (kind, own) in metrics.items():
            (folder / f"{name}.yaml").write_text(BAD.format(name=name, folder=folder, kind=kind, metrics=own))
        settings = TaskSettings(include_path=str(folder))
        suite = TaskSuite(["items", "pages"], tiny_tokenizer(), settings=settings, context_length=64)
        found[place] = suite, *suite.evaluate(model)
    (odd, records, values, _), (_, expected, right, _) = found["odd"], found["fine"]
    names = [record["id"] for record in records if record["set"] == "items"]
    assert names == ["item a", "item b", "item c"]
    d, e, n = odd.sets["items"]["notes"]
    assert d == "'item d' left out: an empty continuation cannot be scored: ('Once', '')"
    assert re.fullmatch(r"'item e' left out: a continuation of \d+ tokens exceeds the context length 64: raise it", e)
    assert n.startswith("'item n' left out: its prompt cannot be made (")
    assert [note.split(":")[0] for note in odd.sets["pages"]["notes"]] == ["'item d' left out", "'item n' left out"]
    assert odd.sets["items"]["items"] == 3
    mine, theirs = ([one for one in part if one["set"] == "items"] for part in (records, expected))
    assert close(mine, theirs)
    assert close(values["items"], right["items"])
    long = next(one for one in records if one["id"] == "item e")
    assert long["set"] == "pages"  # a text may be longer than a window
    # What fails as it is scored is named in its record, and lm-eval's figures are of the rest.
    task = odd._tasks[0].task
    process = task.process_results
    monkeypatch.setattr(
        task, "process_results", lambda doc, answers: process(doc, answers) if "b|" not in doc["text"] else {}["x"]
    )
    records, values, _ = odd.evaluate(model)
    failed = [record for record in records if "failed" in record]
    assert [(one["id"], one["scores"], one["failed"]) for one in failed] == [
        ("item b", {}, "the task cannot score its answer (KeyError: 'x')")
    ]
    kept = [one["scores"]["nll"] for one in records if one["set"] == "items" and "failed" not in one]
    assert values["items"]["perplexity"] == pytest.approx(np.exp(np.mean(kept)), rel=1e-6)


def test_a_task_of_which_nothing_can_be_scored_is_refused(tmp_path, folder):
    (tmp_path / "bad.jsonl").write_text('{"text": "a|", "context": "x"}\n')
    (tmp_path / "items.yaml").write_text(
        BAD.format(name="items", folder=tmp_path, kind="loglikelihood", metrics="[{metric: acc}]")
    )
    with pytest.raises(PreskipError, match="task items: no item can be scored: an empty continuation"):
        TaskSuite(["items"], tiny_tokenizer(), settings=TaskSettings(include_path=str(tmp_path)))


def test_an_item_without_context_and_target_is_named(tmp_path, model):
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a|Ships", "b|", "c|x")))
    for name, context in {"empty": "", "blank": " "}.items():
        task = BAD.format(name=name, folder=tmp_path, kind="loglikelihood", metrics="[{metric: acc}]")
        (tmp_path / f"{name}.yaml").write_text(task.replace('"{{text.strip() and context}}"', f'"{context}"'))
    settings = TaskSettings(include_path=str(tmp_path))
    suite = TaskSuite(["empty", "blank"], tiny_tokenizer(), settings=settings, context_length=64)
    assert suite.sets["empty"]["notes"] == ["'empty#1' left out: an empty continuation cannot be scored: ('', '')"]
    records = suite.score(model)
    assert [one["id"] for one in records] == ["empty#0", "empty#2", "blank#0", "blank#1", "blank#2"]
    windows = {prepared.name: [window for (window,) in prepared.windows] for prepared in suite._tasks}
    assert {window.scored_from for own in windows.values() for window in own} == {1}
    assert {window.input_ids[0] for own in windows.values() for window in own} == {tiny_tokenizer().bos_token_id}


def test_an_item_of_nan_is_named_and_dropped_in_pairs(folder):
    """Of a model that fails on one token, the items with it fail; the others are as those of the whole model."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    suite = TaskSuite(["own_group", "own_pages"], tokenizer, settings=TaskSettings(include_path=str(folder)))
    whole = suite.score(model)
    others = " ".join(["Question: Answer: no yes perhaps so", *SENTENCES[:1], *SENTENCES[2:]])
    token = min(set(tokenizer(SENTENCES[1])["input_ids"][:-1]) - set(tokenizer(others)["input_ids"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    records, values, _ = suite.evaluate(model)
    failed = {(one["set"], one["id"]) for one in records if "failed" in one}
    assert failed == {(s, f"{s}#{i}") for s, i in (("own_small", 1), ("own_large", 0), ("own_pages", 1))}
    kept = [one for one in records if "failed" not in one]
    assert close(kept, [one for one in whole if (one["set"], one["id"]) not in failed])
    kept = [one["scores"]["acc"] for one in records if one["set"] == "own_small" and "failed" not in one]
    assert values["own_small"]["acc"] == pytest.approx(np.mean(kept))
    pages = [one for one in records if one["set"] == "own_pages" and "failed" not in one]
    bits = sum(one["nll"] for one in pages) / sum(one["bytes"] for one in pages) / np.log(2)
    assert values["own_pages"]["bits_per_byte"] == pytest.approx(bits)
    entries = compare_arms({"none": whole, "arm": records}, {}, suite.sets)
    assert {entry["set"]: entry["units"] for entry in entries} == {"own_small": 2, "own_large": 6, "own_pages": 8}


def test_unknown_tasks_are_found_without_the_index(folder, manager_is_unused):
    own = str(folder)
    check_tasks(["own_small", "own_group", "mmlu", "ai2_arc", str(folder / "own_sums.yaml")], own)
    with pytest.raises(PreskipError, match=r"unknown task 'own_smal': did you mean own_small"):
        check_tasks(["own_small", "own_smal"], own)
    with pytest.raises(PreskipError, match=r"unknown task 'lambada_opena': did you mean .*lambada_openai"):
        TaskSuite(["lambada_opena"], tiny_tokenizer())
    with pytest.raises(PreskipError, match=r"unknown task 'own_small': "):
        check_inputs(tasks=["own_small"])  # without the folder

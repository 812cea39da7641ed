"""Common beginnings are read once, and the scores are those of one row per sequence."""

import math
import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import zoo
from preskip import PreskipConfig
from preskip.data.blocks import Window
from preskip.evaluate.likelihood import score_sequences
from preskip.evaluate.sharing import plain_rows, reach, shared_rows
from tiny_model import tiny_llama

# Whose layers mix tokens by attention alone, with a mask and positions from outside.
SHARING = {
    *("gpt_neox", "gpt_neox_sequential", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt"),
    *("opt_post_norm", "phi", "phi3", "falcon", "falcon_new", "gptj", "stablelm", "stablelm_parallel", "olmo2"),
    *("smollm3", "mixtral", "gpt_oss", "glm4", "cohere", "deepseek_v3", "gpt_neo", "gemma3n", "gemma4"),
}
OTHERS = ["bloom", "falcon_alibi", "qwen3_next", "lfm2", "falcon_h1", "jamba", "recurrent_gemma"]


def questions(number: int, *, examples: int = 0, seed: int = 0) -> list[Window]:
    """Questions of four choices each: a common beginning of `examples` tokens, a question, choices of 1 to 5 tokens."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 120) for _ in range(count)]

    shots, windows = tokens(examples), []
    for _ in range(number):
        context = [*shots, *tokens(draw.randrange(8, 13))]
        windows += [Window(context + tokens(draw.randrange(1, 6)), len(context)) for _ in range(4)]
    draw.shuffle(windows)
    return windows


def one_by_one(model, windows):
    """Each sequence alone, log-softmax in float64."""
    expected = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window.input_ids])).logits[0].double()
        scored = range(window.scored_from - len(window.input_ids), 0)
        logits = logits[[column - 1 for column in scored]]
        targets = torch.tensor(window.input_ids[window.scored_from :])
        nll = -logits.log_softmax(-1)[range(len(targets)), targets].sum().item()
        expected.append((nll, bool((logits.argmax(-1) == targets).all())))
    return expected


def read_tokens(model, windows, **options):
    """The scores, and how many tokens the model read."""
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scores = score_sequences(model, windows, **options)
    hook.remove()
    return scores, sum(sizes)


def assert_scores(scores, expected, rel=1e-5):
    for score, (nll, greedy) in zip(scores, expected, strict=True):
        assert score.nll == pytest.approx(nll, rel=rel)
        assert score.greedy == greedy


def windowed(name: str, window: int):
    names = dict.fromkeys(("mistral", "gemma2", "gemma3", "gpt_oss", "gemma3n", "gemma4"), "sliding_window")
    names["gpt_neo"] = "window_size"
    return zoo.build(name, **({names[name]: window} if name in names else {}))


@pytest.mark.parametrize("name", sorted(SHARING) + OTHERS)
def test_scores_of_every_family_are_those_of_the_sequences_alone(name):
    model, windows = windowed(name, 64), questions(8)
    scores, tokens = read_tokens(model, windows)
    assert_scores(scores, one_by_one(model, windows), rel=2e-5)
    apart = sum(map(len, plain_rows({index: window.input_ids[:-1] for index, window in enumerate(windows)})))
    assert tokens < 0.75 * apart if name in SHARING else tokens >= apart


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_neo"])
def test_beyond_a_window_nothing_is_shared(name):
    model, windows = windowed(name, 8), questions(4)
    scores, tokens = read_tokens(model, windows)
    assert reach(model) == 8
    assert tokens >= sum(map(len, plain_rows({index: window.input_ids[:-1] for index, window in enumerate(windows)})))
    assert_scores(scores, one_by_one(model, windows), rel=2e-5)


def test_a_row_holds_each_beginning_once_and_every_sequence_along_a_path():
    windows = questions(5, examples=30)
    reads = {index: window.input_ids[:-1] for index, window in enumerate(windows)}
    (row,) = shared_rows(reads, limit=10**6, reach=10**6, width=10**9)
    beginnings = {tuple(read[:end]) for read in reads.values() for end in range(1, len(read) + 1)}
    assert len(row) == len(beginnings)
    assert sorted(row.paths) == sorted(reads)
    for index, path in row.paths.items():
        assert [row.ids[column] for column in path] == reads[index]
        assert [row.positions[column] for column in path] == list(range(len(path)))
        assert list(path) == sorted(path)


def test_a_sequence_that_another_begins_with_lies_in_its_row_without_a_mask():
    reads = {0: [1, 2, 3], 1: [1, 2], 2: [1], 3: [2, 4], 4: [1, 2], 5: [2]}
    rows = shared_rows(reads, limit=8, reach=8, width=8)
    assert sorted((list(row.ids), sorted(row.paths)) for row in rows) == [([1, 2, 3], [0, 1, 2, 4]), ([2, 4], [3, 5])]
    assert [(row.branches, row.shared) for row in rows] == 2 * [(False, True)]
    assert sorted(sorted(row.paths) for row in plain_rows(reads)) == [[0], [1, 4], [2], [3], [5]]
    assert not any(row.shared for row in plain_rows(reads))


@pytest.mark.parametrize(("batch_tokens", "longest"), [(1, 60), (64, 64 + 32), (128, 128), (4096, 4096)])
def test_rows_are_bounded_and_the_batch_does_not_matter(batch_tokens, longest):
    """A common beginning of 40 tokens: longer than the batch, or shared by many questions."""
    model, windows = tiny_llama(), questions(12, examples=40)
    expected = one_by_one(model, windows)
    sizes = []
    model.register_forward_pre_hook(lambda m, a, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    assert_scores(score_sequences(model, windows, batch_tokens=batch_tokens), expected)
    assert max(sizes) <= longest
    if batch_tokens >= 64:
        assert sum(sizes) < 0.5 * sum(len(window.input_ids) for window in windows)


def test_progress_reaches_the_end_where_one_row_holds_all():
    windows, done = questions(1), []
    score_sequences(tiny_llama(), windows, advance=lambda count, note: done.append(count))
    assert done[-1] == 4


def test_two_sequences_do_not_join_for_the_sake_of_a_start_token():
    reads = {index: [1, *range(10 * index, 10 * index + 80)] for index in range(2, 5)}
    assert len(shared_rows(reads, limit=512, reach=512, width=576)) == 3
    reads = {index: [*range(60), *range(100 * index, 100 * index + 20)] for index in range(2, 5)}
    assert [len(row) for row in shared_rows(reads, limit=512, reach=512, width=576)] == [120]


@pytest.mark.parametrize("config", ["preskip", "lora", "prompt"])
def test_adapters_share_but_for_virtual_tokens(config):
    configs = {
        "preskip": PreskipConfig(init_weights="paper", init_std=0.3, skip_init_std=0.3),
        "lora": LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    model, windows = get_peft_model(tiny_llama(), configs[config]).eval(), questions(8)
    done = []
    scores, tokens = read_tokens(model, windows, advance=lambda count, note: done.append(count))
    with torch.no_grad():
        for window, score in zip(windows, scores, strict=True):
            alone = score_sequences(model, [window])[0]
            assert score.nll == pytest.approx(alone.nll, rel=1e-5)
    assert (tokens < 0.75 * sum(len(window.input_ids) - 1 for window in windows)) == (config != "prompt")
    assert done == sorted(done)
    assert done[-1] == len(windows)


def test_what_is_not_finite_spoils_no_neighbour():
    """Neither in a row that branches nor in one whose tokens stand behind those of a shorter sequence."""
    model, windows, bad = tiny_llama(), questions(8), 399
    windows[5].input_ids[-1:] = [bad, 7]
    windows += [Window([*range(50, 60), 5, 6, bad, 7], 10), Window([*range(50, 60), 5, 6], 10)]
    expected = one_by_one(model, windows)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    done = []
    scores = score_sequences(model, windows, keep_failed=True, advance=lambda count, note: done.append(count))
    assert [index for index, score in enumerate(scores) if math.isnan(score.nll)] == [5, 32]
    assert_scores(
        *zip(*(pair for pair in zip(scores, expected, strict=False) if not math.isnan(pair[0].nll)), strict=False)
    )
    assert done == sorted(done)
    assert done[-1] == len(windows)


@pytest.mark.parametrize("fault", ["deaf", "refuses", "positions"])
def test_a_model_that_makes_something_else_of_the_mask_reads_rows_of_one_sequence(fault):
    model, windows = zoo.build("gpt2"), questions(8)
    expected = one_by_one(model, windows)

    def ignore(module, args, kwargs):
        if kwargs.get("attention_mask") is not None:
            if fault == "refuses":
                raise IndexError("too many indices")
            kwargs.pop({"deaf": "attention_mask", "positions": "position_ids"}[fault])
        return args, kwargs

    model.register_forward_pre_hook(ignore, with_kwargs=True)
    assert_scores(score_sequences(model, windows), expected)


def test_half_precision_shares_too():
    model, windows = tiny_llama().to(torch.bfloat16), questions(8)
    scores, tokens = read_tokens(model, windows)
    assert tokens < 0.75 * sum(len(window.input_ids) - 1 for window in windows)
    for score, (nll, _) in zip(scores, one_by_one(model, windows), strict=True):
        assert score.nll == pytest.approx(nll, rel=1e-2)

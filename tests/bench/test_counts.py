"""What is counted, against torch's own counter, real caches and files; never a time."""

from dataclasses import replace
from itertools import count as numbers
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from preskip import BranchSettings, PreskipConfig
from preskip.architecture.shapes import shape_config
from preskip.arms import ARMS, ArmContext, attention_paths, branch_parameters
from preskip.bench import counts as counting
from preskip.bench.counts import Counts, Limits, bytes_moved, count, flops, measure_limits
from preskip.bench.models import Row, sharing
from preskip.bench.observe import observe
from preskip.bench.runners import Runner, cache_bytes, new_cache
from preskip.bench.settings import CHEAP, Work
from preskip.casting import forget
from preskip.optimizing import copies

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
CPU = torch.device("cpu")


def base(model_type="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


def adapted(**options):
    return get_peft_model(base(**options), PreskipConfig()).eval()


def runner(model, work):
    row = Row(
        name="adapter" if hasattr(model, "peft_config") else "base",
        model=model,
        forward=model,
        kind="adapter",
        held_against="base",
    )
    ids = torch.randint(96, (work.batch, work.tokens + work.new_tokens))
    made = Runner(row, work, ids)
    made.before()
    return made


@pytest.mark.parametrize(
    "work",
    [
        Work(kind="prefill", batch=2, tokens=16),
        Work(kind="scoring", batch=2, tokens=16),
        Work(kind="decode", batch=2, tokens=15, new_tokens=1, cache="dynamic"),
        Work(kind="training", batch=2, tokens=16),
    ],
    ids=lambda work: work.kind,
)
@pytest.mark.parametrize("make", [base, adapted])
def test_flops_are_those_that_torch_counts(make, work):
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(work.kind == "training" and ("preskip" in name or (make is base and "q_proj" in name)))
    counted = runner(model, work)
    with FlopCounterMode(display=False) as counter:
        counted.run()
    counts = count(model, torch.float32)
    found = counter.get_total_flops()
    expected = flops(counts, work)
    if work.kind != "decode":  # torch's eager attention multiplies masked entries, too
        masked = work.batch * work.tokens * (work.tokens - 1) // 2 * 4 * counts.attention_width
        expected += masked * (3 if work.kind == "training" else 1)
    # Rotary frequencies; in training also what lies below the first trained weight, and needs no backward pass.
    assert found == pytest.approx(expected, rel=0.15 if work.kind == "training" else 0.01)


@pytest.mark.parametrize(
    ("work", "multiplied", "moved"),
    [
        # Four tokens see 10 entries; the output head is computed for the last one alone.
        (Work(kind="prefill", batch=2, tokens=4), 2 * 8 * 1000 + 2 * 2 * 200 + 4 * 2 * 10 * 6, 5000 + 2 * 4 * 10 * 2),
        (Work(kind="scoring", batch=2, tokens=4), 2 * 8 * 1200 + 4 * 2 * 10 * 6, 5000),
        # Three steps see 5, 6 and 7 entries.
        (
            Work(kind="decode", batch=2, tokens=4, new_tokens=3, cache="dynamic"),
            2 * (2 * 1200 + 4 * 6 * 6),
            5000 + 2 * 6 * 10 * 2,
        ),
        # Backward through every matrix, through the trained ones once more, and twice through attention.
        (Work(kind="training", batch=2, tokens=4), 2 * 2 * 8 * 1200 + 2 * 8 * 300 + 3 * 4 * 2 * 10 * 6, 2 * 5000),
    ],
    ids=["prefill", "scoring", "decode", "training"],
)
def test_flops_and_bytes_written_out(work, multiplied, moved):
    counts = Counts(
        body=1000, head=200, trainable=300, weight_bytes=5000, body_bytes=4000, cache_width=10, attention_width=6
    )
    assert flops(counts, work) == multiplied
    assert bytes_moved(counts, work, 2) == moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_weights_as_they_are_multiplied(dtype):
    plain, model = base(dtype=dtype), adapted(dtype=dtype)
    size = dtype.itemsize
    weights = sum(p.numel() for p in plain.parameters())
    branch = 3 * BranchSettings().cost(64).parameters
    assert count(plain, dtype).weight_bytes == weights * size
    assert count(model, dtype).weight_bytes == (weights + branch) * size  # the fp32 masters are not what is read
    assert count(model, dtype).body - count(plain, dtype).body == branch
    work = Work(kind="decode", batch=3, tokens=20, new_tokens=1, cache="dynamic")
    cache = 3 * 21 * 2 * 3 * 2 * 16 * size  # rows, tokens, K and V, layers, heads, width
    assert bytes_moved(count(plain, dtype), work, size) == weights * size + cache


@pytest.mark.parametrize(
    ("work", "visited"),
    [
        (Work(kind="decode", batch=1, tokens=20, new_tokens=1, cache="dynamic"), 2),
        (Work(kind="decode", batch=2, tokens=20, new_tokens=1, cache="dynamic"), 4),
        (Work(kind="decode", batch=8, tokens=20, new_tokens=1, cache="dynamic"), 5),
        (Work(kind="prefill", batch=1, tokens=2), 4),
        (Work(kind="scoring", batch=2, tokens=4), 5),
        (Work(kind="training", batch=1, tokens=2), 8),
    ],
    ids=lambda value: f"{value.kind}-{value.batch}" if isinstance(value, Work) else None,
)
def test_of_a_mixture_all_experts_are_read_that_the_tokens_visit(work, visited):
    """Two of five experts per token, and in training twice."""
    counts = count(base("mixtral", num_local_experts=5, num_experts_per_tok=2), torch.float32)
    expert = 3 * 3 * 64 * 96 * 4  # layers, matrices
    assert counts.expert_bytes == 2 * expert
    rest = replace(counts, weight_bytes=counts.weight_bytes - 2 * expert, expert_bytes=0)
    assert bytes_moved(counts, work, 4) - bytes_moved(rest, work, 4) == visited * expert
    twice = counts.scaled(2.0)
    assert twice.expert_bytes == 4 * expert
    assert twice.expert_sets == 2.5


@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized"])
@pytest.mark.parametrize("make", [base, adapted])
def test_cache_bytes_are_read_off_the_cache(kind, make):
    model = make(dtype=torch.bfloat16)
    cache = new_cache(kind, model, 24)
    with torch.no_grad():
        model(input_ids=torch.zeros(2, 24, dtype=torch.long), past_key_values=cache, use_cache=True)
    numbers = 2 * 24 * 2 * 3 * 2 * 16
    assert cache_bytes(cache) - numbers * (1 if kind == "quantized" else 2) == (3 * 2 * 4 if kind == "quantized" else 0)


def test_counts_scale_to_more_layers():
    three, six = count(base(), torch.float32), count(base(num_hidden_layers=6), torch.float32)
    scaled = three.scaled(2.0)
    assert (scaled.body, scaled.head, scaled.cache_width) == (six.body, six.head, six.cache_width)
    assert scaled.attention_width == six.attention_width
    assert scaled.weight_bytes == six.weight_bytes + 64 * 4  # the last norm, which is there once


def test_the_limit_is_the_longer_of_both():
    limits = Limits(flops_per_second=100.0, bytes_per_second=10.0)
    assert limits.seconds(1000.0, 10.0) == 10.0
    assert limits.seconds(10.0, 1000.0) == 100.0
    measured = measure_limits(CPU, torch.float32, seconds=0.01, size=64)
    assert measured.flops_per_second > 0
    assert measured.bytes_per_second > 0


def test_a_copy_moves_every_byte_twice(monkeypatch):
    """With a clock that goes on by a second whenever it is read, a copy takes one."""
    clock = numbers()
    monkeypatch.setattr(counting.time, "perf_counter", lambda: float(next(clock)))
    assert counting._copy_rate(CPU, seconds=3.0, size=64) == 2 * 4 * 64 * 64


def test_live_memory_and_operations():
    weight = torch.nn.Linear(1, 1)
    x = torch.ones(1000)

    def work():
        a = x + 1  # 4,000 bytes
        b = a.view(10, 100) * 2  # 8,000 held
        del a
        c = b + b  # 8,000
        del b
        return c.sum().item()

    seen = observe(work, weight, CPU)
    assert seen.bytes == 8000
    assert seen.operations == 5  # the last two are sum and what reads it


def test_copies_of_a_branch_count_once_also_where_training_makes_them_anew():
    model = adapted(dtype=torch.bfloat16)
    branch = 3 * BranchSettings().cost(64).parameters
    scoring = runner(model, Work(kind="scoring", batch=1, tokens=2))
    training = runner(model, Work(kind="training", batch=1, tokens=2))
    made = observe(scoring.run, model, CPU).bytes
    assert observe(scoring.run, model, CPU).bytes == pytest.approx(made, abs=1000)
    assert sum(copy.nbytes for copy in copies(model)) == 2 * branch
    training.run()
    found = observe(training.run, model, CPU).bytes
    forget()
    model.apply(lambda module: module.__dict__.pop("_preskip_cast", None))
    assert found == observe(training.run, model, CPU).bytes


def test_a_row_shares_every_tensor_that_it_does_not_change():
    model = base()
    twin = sharing(model, own=["model.layers.0.self_attn.q_proj"])
    own = {id(p) for p in twin.parameters()} - {id(p) for p in model.parameters()}
    assert own == {id(twin.model.layers[0].self_attn.q_proj.weight)}
    assert torch.equal(twin.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


def test_counts_of_the_larger_shapes_are_those_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    lines = dict.fromkeys(("base", "adapter", "lora", "int8", *CHEAP), "")
    for shape, layers, width, weights in (
        ("pythia-410m", 24, 1024, 405_334_016),
        ("llama-3-8b", 32, 4096, 8_030_261_248),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(shape, branch=None), dtype=torch.bfloat16)
            targets = attention_paths(model)
            budget = branch_parameters(model, BranchSettings(), targets)
            assert model.num_parameters() == weights  # as published
            assert budget == layers * 3.5 * width**2
            context = ArmContext(
                base=model, settings=BranchSettings(), skip_position="attention", layers=None, targets=tuple(targets),
                budget=budget,
            )  # fmt: skip
            read = count(model, torch.bfloat16).weight_bytes
            assert read == 2 * (weights - model.get_input_embeddings().weight.numel())
            # Half the bytes of a branch in bfloat16, and a scale per output.
            sizes = {
                "base": (weights, read),
                "int8": (weights + budget, read + budget + 2 * layers * int(3.25 * width)),
            }
            for row, arm in {"adapter": "preskip", "lora": "lora", **CHEAP}.items():
                adapted = get_peft_model(sharing(model), ARMS[arm].configs(context)[0])
                total = sum(p.numel() for p in adapted.parameters())
                sizes[row] = total, count(adapted, torch.bfloat16).weight_bytes
                if row != "lora":
                    assert sizes[row][1] - read == 2 * (total - weights)
        for row, (total, found) in sizes.items():
            lines[row] += f" {total / 1e6:,.1f}M | {found / 1e6:,.1f} | {found / read:.3f} |"
    for row, line in lines.items():
        name = "`adapter`, `optimized`, `baked`" if row == "adapter" else f"`{row}`"
        assert f"| {name} |{line}\n" in page

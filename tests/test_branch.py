"""The branch's arithmetic against a naive fp64 reference: values, gradients, initialisation, cost, dtypes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from preskip import BranchSettings, PreskipBranch, PreskipError

D, BATCH, TOKENS = 20, 2, 7

VARIANTS = {
    "paper": {},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "mish": {"activation": "mish"},
    "expansion": {"expansion": 2.37},
    "narrow": {"expansion": 0.3},
    "gated": {"gated": True},
    "gated_gelu": {"gated": True, "activation": "gelu"},
    "preprojection_only": {"content_skip": False},
    "skip_only": {"preprojection": False},
    "content": {"enrich_attention": False},
    "parallel": {"enrich_attention": False, "content_skip": False},
    "parallel_gated": {"enrich_attention": False, "content_skip": False, "gated": True},
    "low_rank": {"skip_rank": 3},
    "low_rank_skip_only": {"skip_rank": 3, "preprojection": False},
    "low_rank_gated_content": {"skip_rank": 3, "gated": True, "enrich_attention": False},
}


def sigma(name: str, x: torch.Tensor) -> torch.Tensor:
    """The four activations from their formulas."""
    return {
        "silu": lambda: x / (1 + torch.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "relu": lambda: torch.where(x > 0, x, torch.zeros_like(x)),
        "mish": lambda: x * torch.tanh(torch.log1p(torch.exp(x))),
    }[name]()


def naive(x: torch.Tensor, w: dict[str, torch.Tensor], settings: BranchSettings):
    """(what attention reads, skip) by the paper's formulas, in the dtype of its arguments."""
    enriched = x
    if settings.preprojection:
        inner = sigma(settings.activation, x @ w["gate" if settings.gated else "up"].T)
        if settings.gated:
            inner = inner * (x @ w["up"].T)
        enriched = x + inner @ w["down"].T
    skip = None
    if settings.content_skip:
        w_skip = w["skip"] if settings.skip_rank is None else w["skip_up"] @ w["skip_down"]
        skip = enriched @ w_skip.T
    elif not settings.enrich_attention:
        skip = enriched - x
    return (enriched if settings.enrich_attention else x), skip


def random_branch(**settings) -> PreskipBranch:
    branch = PreskipBranch(D, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return branch


def some_input(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, D, generator=torch.Generator().manual_seed(6)).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_every_gradient_against_the_naive_reference(variant: str) -> None:
    branch = random_branch(**VARIANTS[variant])
    x = some_input().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    w64 = {part: linear.weight.detach().double().requires_grad_() for part, linear in branch.linears.items()}

    outputs, references = branch(x), naive(x64, w64, branch.settings)
    loss, loss64 = x.sum() * 0, x64.sum() * 0
    for name, output, reference in zip(("attention input", "skip"), outputs, references, strict=True):
        assert (output is None) == (reference is None), name
        if output is not None:
            torch.testing.assert_close(output.double(), reference, rtol=1e-5, atol=1e-6, msg=name)
            loss, loss64 = loss + output.pow(2).sum(), loss64 + reference.pow(2).sum()
    loss.backward()
    loss64.backward()

    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert set(branch.linears) == {name.split(".")[0] for name, _ in branch.named_parameters()} != set()
    for part, linear in branch.linears.items():
        torch.testing.assert_close(linear.weight.grad.double(), w64[part].grad, rtol=1e-4, atol=1e-4, msg=part)


def test_skip_is_a_linear_shortcut_plus_a_tied_parallel_adapter() -> None:
    branch = random_branch().double()
    x = some_input(torch.float64)
    up, down, skip = (branch.linears[part].weight for part in ("up", "down", "skip"))
    identity = x @ skip.T + sigma("silu", x @ up.T) @ (skip @ down).T
    torch.testing.assert_close(branch(x)[1], identity, rtol=1e-12, atol=1e-12)


def test_content_alone_gives_attention_its_old_input_and_the_same_skip() -> None:
    full, content = random_branch(), random_branch(enrich_attention=False)
    x = some_input()
    assert content(x)[0] is x
    assert torch.equal(content(x)[1], full(x)[1])
    assert not torch.equal(full(x)[0], x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_identity_initialisation_changes_nothing_at_all(variant: str) -> None:
    branch = PreskipBranch(D, **VARIANTS[variant])
    x = some_input()
    attention_input, skip = branch(x)
    assert torch.equal(attention_input, x)
    assert skip is None or torch.count_nonzero(skip) == 0


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_initial_standard_deviations(init: str) -> None:
    torch.manual_seed(0)
    d, rank = 256, 16
    weights = {
        part: linear.weight
        for branch in (
            PreskipBranch(d, init_weights=init, gated=True, init_std=0.02, skip_init_std=3e-4),
            PreskipBranch(d, init_weights=init, preprojection=False, skip_rank=rank, skip_init_std=3e-4),
        )
        for part, linear in branch.linears.items()
    }
    weights["product"] = weights["skip_up"] @ weights["skip_down"]
    expected = {"up": 0.02, "gate": 0.02, "skip_down": 1 / math.sqrt(d)}
    if init == "paper":
        expected |= {"down": 0.02, "skip": 3e-4, "product": 3e-4}
    else:
        expected |= {"down": 0.0, "skip": 0.0, "skip_up": 0.0, "product": 0.0}
    for part, std in expected.items():
        if std == 0.0:
            assert torch.count_nonzero(weights[part]) == 0, part
        else:
            assert weights[part].std().item() == pytest.approx(std, rel=0.05 if part == "product" else 0.02), part
            assert abs(weights[part].mean().item()) < 4 * std / math.sqrt(weights[part].numel() / rank), part


def test_defaults_are_the_papers() -> None:
    branch = PreskipBranch(768)
    assert {part: tuple(linear.weight.shape) for part, linear in branch.linears.items()} == {
        "up": (960, 768),
        "down": (768, 960),
        "skip": (768, 768),
    }
    assert branch.up.weight.std().item() == pytest.approx(0.01, rel=0.01)
    settings = BranchSettings()
    assert (settings.activation, settings.init_std, settings.skip_init_std) == ("silu", 0.01, 1e-4)
    assert (settings.init_weights, settings.dropout, settings.skip_rank) == ("identity", 0.0, None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cost_is_what_is_there(variant: str) -> None:
    branch = random_branch(**VARIANTS[variant])
    counted = sum(parameter.numel() for parameter in branch.parameters())
    cost = branch.cost()
    assert (cost.parameters, cost.weight_bytes) == (counted, 4 * counted)
    assert branch.settings.cost(D) == cost

    macs = 0

    def count(linear: nn.Linear, args: tuple, output: torch.Tensor) -> None:
        nonlocal macs
        macs += args[0].numel() // linear.in_features * linear.weight.numel()

    for linear in branch.linears.values():
        linear.register_forward_hook(count)
    branch(some_input())
    assert cost.flops_per_token * BATCH * TOKENS == 2 * macs


def test_cost_of_the_papers_models() -> None:
    assert BranchSettings().cost(768).parameters == 3.5 * 768**2
    # Pythia-160M: 17.69M + 7.08M = 24.77M; Pythia-410M: 62.9M + 25.2M = 88.1M.
    for layers, d, total, skip_total in ((12, 768, 24.77e6, 7.08e6), (24, 1024, 88.1e6, 25.2e6)):
        assert layers * BranchSettings().cost(d).parameters == pytest.approx(total, rel=1e-3)
        skip_only = BranchSettings(preprojection=False).cost(d)
        assert layers * skip_only.parameters == pytest.approx(skip_total, rel=2e-3)
        preprojection = BranchSettings(content_skip=False).cost(d)
        assert layers * preprojection.parameters == pytest.approx(total - skip_total, rel=1e-3)


def test_dropout_acts_in_training_only() -> None:
    plain, branch = random_branch(), random_branch(dropout=0.5)
    x = some_input()
    assert torch.equal(branch.eval()(x)[0], plain(x)[0])
    branch.train()
    torch.manual_seed(1)
    first, again = branch(x)[0], branch(x)[0]
    assert not torch.equal(first, again)
    # What is dropped is an inner feature; what stays is doubled.
    torch.manual_seed(3)
    inner = sigma("silu", x @ branch.up.weight.T)
    out = branch(x)[0]
    torch.manual_seed(3)
    kept = nn.functional.dropout(torch.ones_like(inner), 0.5)
    torch.testing.assert_close(out, x + (inner * kept) @ branch.down.weight.T, rtol=1e-5, atol=1e-6)


def test_bf16_activations_are_multiplied_with_bf16_copies_of_fp32_weights() -> None:
    branch = random_branch()
    x = some_input(torch.bfloat16)
    attention_input, skip = branch(x)
    assert attention_input.dtype == skip.dtype == torch.bfloat16
    w = {part: linear.weight.detach().to(torch.bfloat16) for part, linear in branch.linears.items()}
    inner = nn.functional.silu(x @ w["up"].T)
    assert torch.equal(attention_input, x + inner @ w["down"].T)
    assert torch.equal(skip, attention_input @ w["skip"].T)
    w64 = {part: linear.weight.double() for part, linear in branch.linears.items()}
    for output, reference in zip((attention_input, skip), naive(x.double(), w64, branch.settings), strict=True):
        assert (output.double() - reference).abs().max() < 0.02 * reference.abs().max()
    (attention_input.float().sum() + skip.float().sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in branch.parameters())


def test_float16_activations_are_computed_in_fp32() -> None:
    branch = random_branch()
    x = some_input(torch.float16)
    attention_input, skip = branch(x)
    assert attention_input.dtype == skip.dtype == torch.float16
    w64 = {part: linear.weight.double() for part, linear in branch.linears.items()}
    reference, _ = naive(x.double(), w64, branch.settings)
    assert (attention_input.double() - reference).abs().max() < 1e-3 * reference.abs().max()
    # Inner features beyond float16's range: the products are taken in fp32.
    with torch.no_grad():
        branch.up.weight.mul_(1e5)
        branch.down.weight.mul_(1e-5)
    assert all(output.isfinite().all() for output in branch(x))


@pytest.mark.parametrize("variant", ["paper", "gated", "content", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_chooses_the_dtype_of_the_products(variant: str, dtype: torch.dtype) -> None:
    branch = random_branch(**VARIANTS[variant])
    x = some_input(dtype)
    seen = []
    for linear in branch.linears.values():
        linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention_input, skip = branch(x)
    assert set(seen) == {torch.bfloat16}
    assert attention_input.dtype == skip.dtype == dtype
    w64 = {part: linear.weight.double() for part, linear in branch.linears.items()}
    for output, reference in zip((attention_input, skip), naive(x.double(), w64, branch.settings), strict=True):
        assert (output.double() - reference).abs().max() < 0.03 * reference.abs().max()
    # Outside the context the products are in the input's dtype again.
    seen.clear()
    branch(x)
    assert set(seen) == {dtype}


def test_weights_are_fp32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        branch = PreskipBranch(D)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in branch.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in PreskipBranch(D, device="meta").parameters()} == {"meta"}


def test_the_seed_decides_the_weights_and_reset_draws_anew() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return PreskipBranch(D).up.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    branch = random_branch()
    branch.reset_parameters()
    assert torch.count_nonzero(branch.down.weight) == torch.count_nonzero(branch.skip.weight) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expansion", 0),
        ("expansion", -1.0),
        ("expansion", float("nan")),
        ("expansion", float("inf")),
        ("expansion", True),
        ("expansion", "wide"),
        ("activation", "tanh"),
        ("activation", ["silu"]),
        ("init_weights", "zero"),
        ("init_weights", True),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("init_std", -1.0),
        ("init_std", 0.0),
        ("skip_init_std", -1e-4),
        ("skip_rank", 0),
        ("skip_rank", 2.5),
        ("skip_rank", True),
        ("gated", "no"),
        ("content_skip", None),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(PreskipError) as caught:
        BranchSettings(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r} is not possible: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preprojection": False, "content_skip": False}, "content_skip=False"),
        ({"preprojection": False, "gated": True}, "gated=True is not possible: it needs preprojection"),
        ({"content_skip": False, "skip_rank": 4}, "skip_rank=4 is not possible: it needs content_skip"),
        ({"enrich_attention": False, "preprojection": False}, "enrich_attention=False"),
        ({"skip_rank": D + 1}, f"skip_rank={D + 1} exceeds the width {D}"),
        ({"expansion": 0.01}, "expansion=0.01 gives no inner feature"),
        ({"width": 3}, "unknown field"),
        ({"settings": BranchSettings(), "gated": True}, "not both"),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(PreskipError, match=message):
        PreskipBranch(D, **settings)

"""One cast per weight and optimiser step: how often, what flows back, and that no copy outlives its weight."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from preskip import PreskipBranch, PreskipConfig, bake, casting
from preskip.casting import product
from preskip.optimizing import copies

T, D = 63, 60


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Every cast of a weight, as it happens."""
    made: list[torch.dtype] = []
    real = torch.Tensor.to

    def counting(tensor: torch.Tensor, *args, **kwargs):
        if isinstance(tensor, nn.Parameter) and args and args[0] is torch.bfloat16:
            made.append(args[0])
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    return made


def branch(**settings) -> PreskipBranch:
    torch.manual_seed(0)
    return PreskipBranch(D, init_weights="paper", init_std=0.1, skip_init_std=0.1, **settings)


def some_input(batch: int = 3, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(batch, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    enriched, skip = module(x)
    return enriched.float().square().mean() + skip.float().square().mean()


def test_one_cast_per_weight_and_step_whatever_reads_it(casts: list) -> None:
    module, x = branch(), some_input()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(1, 4):
        for micro in x.split(1):
            loss(module, micro).backward()
        checkpoint(loss, module, x.requires_grad_(), use_reentrant=True).backward()
        checkpoint(loss, module, x, use_reentrant=False).backward()
        with torch.no_grad():
            loss(module, x)
        with torch.inference_mode():
            loss(module, x.detach())
        assert len(casts) == 3 * step
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_weight_is_cast_once(casts: list) -> None:
    module = branch().requires_grad_(False)
    for _ in range(4):
        loss(module, some_input())
    with torch.inference_mode():
        loss(module, some_input())
    assert len(casts) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.detach().mul_(2),
        lambda w: setattr(w, "data", w.data * 2),
    ],
)
def test_a_changed_weight_is_cast_anew(change) -> None:
    module, x = branch(), some_input()
    before = product(x, module.up)
    change(module.up.weight)
    assert torch.equal(product(x, module.up), before * 2)


def test_an_optimiser_that_changes_weights_past_their_version_counts_as_a_step() -> None:
    class Uncounted(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.mul_(2)

    module, x = branch(), some_input()
    before = product(x, module.up)
    Uncounted(module.parameters(), lr=0.0).step()
    assert torch.equal(product(x, module.up), before * 2)


def test_a_replaced_weight_is_cast_anew() -> None:
    module, x = branch(), some_input()
    before = product(x, module.up)
    module.load_state_dict({key: value * 2 for key, value in module.state_dict().items()}, assign=True)
    assert torch.equal(product(x, module.up), before * 2)


@pytest.mark.parametrize("kind", ["branch", "adapter", "architecture"])
@torch.no_grad()
def test_a_load_that_keeps_versions_is_seen(kind: str) -> None:
    """As under `fully_shard`, which gathers weights into the same parameter, whose version it keeps."""
    module, x = branch(), some_input()
    if kind != "branch":
        base, x = zoo.build("llama", dtype=torch.bfloat16), zoo.inputs("llama")["input_ids"]
        module = get_peft_model(base, PreskipConfig())
        if kind == "architecture":
            config = {key: value for key, value in base.config.to_dict().items() if key != "model_type"}
            config = AutoConfig.for_model("preskip_llama", **config, preskip_keep_float32=True)
            module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        zoo.randomise(module.eval())
    own = [weight for name, weight in module.named_parameters() if kind == "branch" or ".preskip." in name]
    assert {weight.dtype for weight in own} == {torch.float32}
    before = module(x)[0]
    larger = {key: value * 2 for key, value in module.state_dict().items()}
    with torch.autograd._unsafe_preserve_version_counter(tuple(own)):
        module.load_state_dict(larger)
    after = module(x)[0]
    casting.forget()
    assert torch.equal(after, module(x)[0])
    assert not torch.equal(after, before)


@torch.no_grad()
def test_weights_that_are_handed_in_for_one_call_are_cast_each() -> None:
    module, x, scales = branch(), some_input(), range(1, 41)
    weight = module.up.weight.clone()
    wanted = [nn.functional.linear(x, (weight * scale).bfloat16()) for scale in scales]
    found = [torch.func.functional_call(Up(module.up), {"up.weight": weight * scale}, (x,)) for scale in scales]
    assert all(map(torch.equal, found, wanted))


class Up(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.up)


def test_gradients_by_torch_func_are_those_of_backward() -> None:
    module, x = branch(), some_input()
    weights = dict(module.named_parameters())
    loss(module, x).backward()
    wanted = {name: weight.grad for name, weight in weights.items()}

    def of_weights(some):
        return torch.func.functional_call(Loss(module), some, (x,))

    found = torch.func.grad(of_weights)({f"module.{name}": weight for name, weight in weights.items()})
    for name, gradient in wanted.items():
        assert (found[f"module.{name}"] - gradient).abs().max() < 2e-2 * gradient.abs().max(), name
    # What was cast while an input's gradient was taken is not used afterwards.
    casting.forget()
    of_input = torch.func.grad(lambda some: loss(module, some))(x)
    assert of_input.isfinite().all()
    module.zero_grad()
    loss(module, x).backward()
    for name, weight in module.named_parameters():
        assert torch.equal(weight.grad, wanted[name]), name


class Loss(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return loss(self.module, x)


def test_writes_through_data_are_seen_after_forget() -> None:
    module, x = branch().requires_grad_(False), some_input()
    before = product(x, module.up)
    module.up.weight.data.mul_(2)
    casting.forget()
    assert torch.equal(product(x, module.up), before * 2)


def test_other_storage_is_seen_where_it_has_the_address_of_the_last() -> None:
    """As in searches that set weights, score them and put them back: what is freed leaves its address to the next."""
    module, x = branch(), some_input()
    weight, home = module.up.weight, module.up.weight.data
    for scale in range(1, 21):
        weight.data = home * scale
        assert torch.equal(product(x, module.up), nn.functional.linear(x, (home * scale).bfloat16()))
        weight.data = home


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("trainable", [True, False])
@torch.no_grad()
def test_a_trace_keeps_the_weights_themselves(trainable: bool) -> None:
    module, x = branch().requires_grad_(trainable), some_input()
    module(x)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    assert all(map(torch.equal, traced(x), module(x)))
    module.up.weight.mul_(2)
    assert all(map(torch.equal, traced(x), module(x)))


def test_gradients_against_float64_and_added_up_in_float32() -> None:
    module, x = branch(), some_input()
    exact = copy.deepcopy(module).double()
    loss(exact, x.double()).backward()
    loss(module, x).backward()
    for (name, parameter), reference in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - reference.grad).abs().max()
        assert error < 2e-2 * reference.grad.abs().max(), name
    once = [parameter.grad.clone() for parameter in module.parameters()]
    for _ in range(3):
        loss(module, x).backward()
    for parameter, first in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 4 * first, rtol=1e-6, atol=0)


def test_float32_is_as_it_was(casts: list) -> None:
    module, x = branch(), some_input(dtype=torch.float32)
    enriched, skip = module(x)
    inner = nn.functional.silu(nn.functional.linear(x, module.up.weight))
    assert torch.equal(enriched, x + nn.functional.linear(inner, module.down.weight))
    assert torch.equal(skip, nn.functional.linear(enriched, module.skip.weight))
    assert not casts
    assert not any(casting._CAST in vars(linear) for linear in module.linears.values())


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_a_matrix_are_called(register: str) -> None:
    module, seen = branch(), []
    for part, linear in module.linears.items():
        getattr(linear, register)(lambda *_, part=part: seen.append(part))
    loss(module, some_input().requires_grad_()).backward()
    assert sorted(seen) == ["down", "skip", "up"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_meta_a_pass_tells_shapes(dtype: torch.dtype) -> None:
    enriched, skip = branch().to("meta")(some_input(dtype=dtype).to("meta"))
    assert enriched.device.type == skip.device.type == "meta"
    assert (enriched.shape, enriched.dtype) == (skip.shape, skip.dtype) == ((3, T, D), dtype)


def test_no_copy_is_saved_copied_or_left_behind() -> None:
    module, x = branch(), some_input()
    loss(module, x).backward()
    assert casting._CAST in vars(module.up)
    assert set(module.state_dict()) == {"up.weight", "down.weight", "skip.weight"}
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])
        with torch.no_grad():
            twin.up.weight.zero_()
        assert not torch.equal(twin(x)[0], module(x)[0])
    alive = weakref.ref(module.up.weight)
    del module, twin
    gc.collect()
    assert alive() is None


def test_adapter_and_baked_give_the_same_bits(tmp_path) -> None:
    zoo.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_peft_model(base, PreskipConfig()).eval()
    zoo.randomise(model)
    bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(zoo.logits(baked, "llama"), zoo.logits(model, "llama"))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiles_into_one_graph_with_the_same_result(training: bool) -> None:
    module, x = branch(), some_input()
    module.requires_grad_(training)
    wanted = loss(module, x)
    compiled = torch.compile(lambda x: loss(module, x), fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
    if training:
        found.backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["branch", "adapter"])
def test_what_is_moved_leaves_no_copy_behind(kind: str) -> None:
    module, x = branch().requires_grad_(False), some_input()
    if kind == "adapter":
        module = get_peft_model(zoo.build("llama", dtype=torch.bfloat16), PreskipConfig()).eval()
        x = zoo.inputs("llama")["input_ids"]
    module(x)
    kept = [weakref.ref(tensor) for tensor in copies(module)]
    assert kept
    module.to("meta")
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)


def test_a_pass_without_values_leaves_no_copy_without_values() -> None:
    module, x = branch().requires_grad_(False), some_input()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(mode.from_tensor(x))
    assert torch.equal(module(x)[0], branch()(x)[0])

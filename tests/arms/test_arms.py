import copy
import functools
import inspect
import pathlib
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import zoo
from preskip.arms import (
    ARMS,
    ArmContext,
    attention_paths,
    branch_parameters,
    linear_shapes,
    lora_ranks,
    match_expansion,
    resolve_arms,
)
from preskip.arms.catalogue import LORA_ARMS
from preskip.arms.insert import insert
from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.evaluate.adapters import load_adapter
from tiny_model import tiny_llama


def context_for(base, settings=None, layers=None) -> ArmContext:
    settings = settings or BranchSettings()
    targets = tuple(attention_paths(base, layers))
    budget = branch_parameters(base, settings, targets)
    return ArmContext(
        base=base, settings=settings, skip_position="attention", layers=layers, targets=targets, budget=budget
    )


def trainable(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32))


@pytest.mark.parametrize("make", [lambda: tiny_llama(hidden_size=64), gpt2])
@pytest.mark.parametrize("expansion", [0.3, 1.25, 2.0])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_lora_on_attention_matches_within_half_a_percent(make, expansion, layers):
    settings = BranchSettings(expansion=expansion)
    counts = {}
    for arm in ("preskip", "lora-attention"):
        base = make()
        model = get_peft_model(base, ARMS[arm].make_config(context_for(base, settings, layers)))
        counts[arm] = trainable(model)
        adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
        assert adapted, arm
    assert counts["preskip"] == context_for(make(), settings, layers).budget
    for arm, count in counts.items():
        assert abs(count - counts["preskip"]) <= 0.005 * counts["preskip"], arm


def test_lora_ranks_of_pythia():
    """Rank 448 at 160M and 597 at 410M match pre-projection + skip on qkv + dense."""
    for width, layers, heads, expected in ((768, 12, 12, 448), (1024, 24, 16, 597)):
        config = GPTNeoXConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            vocab_size=8,
        )
        with torch.device("meta"):
            model = GPTNeoXForCausalLM(config)
        targets = attention_paths(model)
        budget = branch_parameters(model, BranchSettings(), targets)
        assert budget == int(3.5 * width**2) * layers
        ranks = lora_ranks(linear_shapes(model, targets), budget)
        assert ranks.rank == expected
        assert abs(ranks.parameters - budget) < 0.001 * budget


def test_lora_scale_is_one_for_every_target():
    base = tiny_llama()
    model = get_peft_model(base, ARMS["lora"].make_config(context_for(base, BranchSettings(expansion=0.9))))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    scales, ranks = {layer.scaling["default"] for layer in layers}, {layer.r["default"] for layer in layers}
    assert scales == {1.0}
    assert len(layers) == 7 * 2
    assert len(ranks) == 2, "the budget is met by two neighbouring ranks"
    assert max(ranks) - min(ranks) == 1


def test_impossible_budget_names_the_nearest():
    base = tiny_llama()
    with pytest.raises(PreskipError, match=r"rank 1 has 448, the nearest possible"):
        lora_ranks(linear_shapes(base, attention_paths(base)), 100)


def test_lora_ranks_written_out():
    """A rank of a layer costs in + out: here 16 and 12, which come to 56 of rank 2."""
    ranks = lora_ranks({"a": (8, 8), "b": (8, 4)}, 72)
    assert (ranks.rank, ranks.rank_pattern, ranks.parameters) == (2, {"a": 3}, 72)
    capped = lora_ranks({"a": (100, 100), "b": (4, 4)}, 10 * 200 + 4 * 8)
    assert (capped.rank, capped.rank_pattern, capped.parameters) == (10, {"b": 4}, 2032)
    common = lora_ranks({"a": (100, 100), "b": (4, 4)}, 10 * 208, common=True)
    assert (common.rank, common.rank_pattern, common.parameters) == (10, {}, 2080)
    # DoRA has a further weight per output.
    for magnitudes, budget in ((0.0, 750), (0.5, 775), (1.0, 800)):
        dora = lora_ranks({"a": (100, 50)}, budget, magnitudes=magnitudes)
        assert (dora.rank, dora.parameters) == (5, budget)


def test_lora_may_be_half_a_per_cent_off():
    assert lora_ranks({"a": (100, 100)}, 1005).parameters == 1000
    with pytest.raises(PreskipError, match=r"1,006 parameters within 0.5 %: the nearest possible is 1,000"):
        lora_ranks({"a": (100, 100)}, 1006)
    assert lora_ranks({"a": (100, 100)}, 1006, whole=1200).parameters == 1000


@pytest.mark.parametrize(("part", "rank", "capped"), [("all", 114, 0), ("mlp", 183, 0), ("attention", 376, 60)])
def test_lora_ranks_of_smollm2(part, rank, capped):
    """34,836,480 weights over 30 layers: r = 114 of 10,176 each on all layers, 183 of 6,336 on the MLP's; on attention
    K and V have 192 outputs, and 1,161,216 = 2 · 768 · 192 + 2 · 1,152 · 376."""
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ranks = lora_ranks(linear_shapes(model, attention_paths(model), part), 34_836_480)
    assert ranks.rank == rank
    assert list(ranks.rank_pattern.values()).count(192) == capped
    assert set(ranks.rank_pattern.values()) <= {192, rank + 1}
    assert abs(ranks.parameters - 34_836_480) < 0.0001 * 34_836_480
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if name in ranks.targets}
    own = {name: ranks.rank_pattern.get(name, rank) for name in ranks.targets}
    assert all(own[name] <= min(shape) for name, shape in shapes.items())
    assert sum(own[name] * sum(shape) for name, shape in shapes.items()) == ranks.parameters


def test_parts_of_a_block():
    """BERT's attention keeps its output projection beside `attention.self`; the head and embeddings are in no block."""
    for base in (tiny_llama(), gpt2(), zoo.build("bert")):
        targets = attention_paths(base)
        every, own, rest = (set(linear_shapes(base, targets, part)) for part in ("all", "attention", "mlp"))
        assert own | rest == every
        assert own
        assert rest
        assert not own & rest
        assert not [name for name in every if "head" in name or "pooler" in name]


def test_resolve_arms():
    assert [arm.name for arm in resolve_arms(["lora", "none", "preskip"])] == ["none", "lora", "preskip"]
    with pytest.raises(PreskipError, match=r"unknown arm 'dora2': choose from none, preskip, preproj"):
        resolve_arms(["none", "dora2"])
    with pytest.raises(PreskipError, match="different arms"):
        resolve_arms(["lora", "lora"])


def test_the_registry_is_read_without_torch():
    """`--help` names the arms, and should not take seconds."""
    code = "import sys, preskip.arms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_targets_by_expression():
    base = tiny_llama(num_hidden_layers=3)
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    assert attention_paths(base) == names
    assert attention_paths(base, (0, 2)) == [names[0], names[2]]
    assert attention_paths(base, None, r".*\.[12]\.self_attn") == names[1:]
    assert attention_paths(base, None, None, r".*\.1\..*") == [names[0], names[2]]
    with pytest.raises(PreskipError, match="is left to adapt"):
        attention_paths(base, None, "nothing")


def bit_equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.trains and name != "bitfit"])
def test_every_arm_meets_the_budget_starts_as_the_base_trains_and_leaves_no_trace(name, match, tmp_path):
    base = tiny_llama(hidden_size=64, num_hidden_layers=4).eval()
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        before = base(input_ids=ids).logits
    state = {key: value.clone() for key, value in base.state_dict().items()}
    if name == "hira" and match == "flops":
        with pytest.raises(PreskipError, match=r"arm hira: it adds a second product .*: match params, or leave it out"):
            ARMS[name].configs(replace(context_for(base), match=match))
        return
    # HiRA has one rank for all layers: of 3,328 weights each, 17 come near to 4 · (2 · 79 · 64 + 64²).
    settings = BranchSettings(expansion=1.24) if name == "hira" else None
    context = replace(context_for(base, settings), match=match)
    with insert(ARMS[name], context, seed=3) as inserted:
        assert inserted.parameters == trainable(inserted.model)
        has = inserted.parameters if match == "params" else inserted.flops_per_token / 2
        if ARMS[name].budget == "matched":
            assert abs(has - context.budget) <= 0.005 * context.budget
        else:
            assert (has > context.budget) == (name == "full" and match == "params")
        with torch.no_grad():
            # DoRA divides by a norm and multiplies it back.
            assert (inserted.model(input_ids=ids).logits - before).abs().max() <= (1e-5 if name == "dora" else 0.0)
        inserted.model(input_ids=ids, labels=ids).loss.backward()
        moved = [p for p in inserted.trainable.values() if p.grad is not None and p.grad.abs().sum() > 0]
        assert moved
        is_late = name.startswith(("preskip-late", "preskip-third"))  # the last of four layers, either way
        late = {"3"} if is_late else {"0", "1", "2", "3"}
        late -= {"0"} if name == "value-residual" else set()  # whose values the others get
        assert {key.split(".layers.")[1][0] for key in inserted.trainable if ".layers." in key} == late
        with torch.no_grad():
            for weight in inserted.trainable.values():
                weight.add_(0.1)
            assert (inserted.model(input_ids=ids).logits - before).abs().max() > 1e-4
        inserted.save(tmp_path)
        assert list(tmp_path.rglob("*.safetensors"))
    assert bit_equal(state, base.state_dict())
    assert all(weight.requires_grad and weight.grad is None for weight in base.parameters())
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, before)


def test_stacked_adapters_are_saved_each_in_its_own_folder_and_load_again(tmp_path):
    base = tiny_llama(hidden_size=64)
    ids = torch.arange(12)[None]
    with insert(ARMS["preproj+lora"], context_for(base), seed=0) as inserted:
        with torch.no_grad():
            for weight in inserted.trainable.values():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
            wanted = inserted.model.eval()(ids).logits
        inserted.save(tmp_path)
    keys = [set(load_file(tmp_path / number / "adapter_model.safetensors")) for number in ("1", "2")]
    assert all(".preskip." in key for key in keys[0])
    assert all(".lora_" in key for key in keys[1])
    first = PeftModel.from_pretrained(tiny_llama(hidden_size=64), tmp_path / "1")
    both = PeftModel.from_pretrained(first.get_base_model(), tmp_path / "2").eval()
    with torch.no_grad():
        assert torch.equal(both(ids).logits, wanted)


def test_peft_lily_reads_later_tokens():
    """Why it is no arm: PEFT averages its router over all tokens of a batch. If this fails, Lily can become one."""
    if not hasattr(peft, "LilyConfig"):
        pytest.skip("this peft has no Lily")
    model = get_peft_model(tiny_llama(), peft.LilyConfig(r=4, num_B=2, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lily_" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        ids = torch.arange(5, 17)[None]
        other = ids.clone()
        other[0, -1] = 40
        assert not torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])
        with model.disable_adapter():
            assert torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])


def test_counted_sizes():
    """Written-out counts for a width of 64, 4 layers, q and o of 64 x 64, k and v of 64 x 32, MLP of 64 x 64."""
    base = tiny_llama(hidden_size=64, num_hidden_layers=4)
    counts = {}
    cheap = ("skip", "preskip-late-narrow", "preskip-third-narrow", "preskip-lowrank-narrow", "preskip-bottleneck")
    gated = ("content-gated", "preskip-closed")
    for name in (*cheap, "layernorm", "ia3", "full", "preproj+lora", "canon", "value-residual", *gated):
        with insert(ARMS[name], context_for(base), seed=0) as inserted:
            counts[name] = (inserted.parameters, inserted.flops_per_token)
    assert counts["canon"] == (4 * 4 * (64 + 128 + 64 + 128), 4 * 8 * (64 + 128 + 64 + 128))
    assert counts["value-residual"] == (3 * 2, 3 * 2 * 32)
    for name, scaled in zip(gated, (1, 2), strict=True):  # the branch is narrower by the gate, its bias and rounding
        branch = 4 * 64 * (64 + 2 * 79)
        assert counts[name] == (branch + 4 * (64 + 1), 2 * branch + 4 * (2 * 64 + scaled * 64))
    assert counts["skip"] == (4 * 64**2, 2 * 4 * 64**2)
    assert counts["layernorm"] == (9 * 64, 0)
    assert counts["ia3"] == (4 * (32 + 32 + 64), 4 * (32 + 32 + 64))
    lone = replace(context_for(base), match="none", lora_ranks={"lora-attention": 1})
    with insert(ARMS["lora-attention"], lone, seed=0) as inserted:  # matrices of one row or column are matrices
        size = 4 * (2 * (64 + 64) + 2 * (64 + 32))
        assert (inserted.parameters, inserted.flops_per_token) == (size, 2 * size)
    assert counts["full"] == (sum(p.numel() for p in base.parameters()), 0)
    assert counts["preskip-late-narrow"] == (int(3.5 * 64**2), (7 * 64**2))
    assert counts["preskip-third-narrow"] == counts["preskip-late-narrow"]  # one of four layers, either way
    assert counts["preskip-lowrank-narrow"][0] == 4 * (2 * 80 * 64 + 2 * 8 * 64)
    assert counts["preskip-bottleneck"] == (4 * (2 * 16 * 64 + 2 * 8 * 64), 2 * 4 * (2 * 16 * 64 + 2 * 8 * 64))
    budget = int(3.5 * 64**2) * 4
    assert counts["preproj+lora"][0] == pytest.approx(budget, rel=0.005)


@pytest.mark.parametrize("make", [lambda: tiny_llama(hidden_size=64), gpt2])
@pytest.mark.parametrize(
    "name",
    ["preskip", "content", "preskip-lowrank", "lora", "lora-mlp", "dora", "rslora", "hira", "preproj+lora", "ia3"],
)
def test_flops_of_an_arm_are_those_that_torch_counts(name, make):
    """What a token more costs with the arm and without it; so products of weights alone, once per pass, fall out."""
    base = make().eval()

    def per_token(model):
        counted = []
        for length in (8, 24):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(input_ids=torch.zeros(1, length, dtype=torch.long))
            counted.append(counter.get_total_flops())
        return (counted[1] - counted[0]) / 16

    plain = per_token(base)
    with insert(ARMS[name], replace(context_for(base), match="none", lora_ranks=dict.fromkeys(LORA_ARMS, 4)), 0) as own:
        # Torch counts matrix products alone, not what multiplies by a vector.
        vectors = sum(p.numel() for p in own.trainable.values() if p.dim() == 1 or min(p.shape) == 1)
        assert own.flops_per_token - vectors == per_token(own.model) - plain


def test_dora_has_a_larger_rank_where_flops_are_matched():
    base = tiny_llama(hidden_size=64, num_hidden_layers=4)
    sizes = {}
    for match in ("params", "flops"):
        with insert(ARMS["dora"], replace(context_for(base), match=match), seed=0) as inserted:
            sizes[match] = inserted.parameters
    assert sizes["flops"] > sizes["params"]


def test_unmatched_arms_keep_their_own_size():
    base = tiny_llama(hidden_size=64)
    context = replace(context_for(base), match="none", lora_ranks={"lora": 5, "lora-attention": 5})
    with insert(ARMS["preproj"], context, seed=0) as inserted:
        assert inserted.parameters == 2 * int(2.5 * 64**2)
    with insert(ARMS["lora-attention"], context, seed=0) as inserted:
        assert inserted.parameters == 2 * 5 * (128 + 96 + 96 + 128)
    with insert(ARMS["lora"], context, seed=0) as inserted:
        assert inserted.parameters == 2 * 5 * (128 + 96 + 96 + 128 + 3 * (64 + 64))
    (lora,) = ARMS["lora"].configs(replace(context, lora_ranks={"lora": 0.625}, lora_scale=2.0))
    assert (lora.r, lora.lora_alpha) == (40, 80)
    with pytest.raises(PreskipError, match="arm lora: --match none leaves its rank open: give --lora-rank"):
        ARMS["lora"].configs(replace(context, lora_ranks={}))


def test_floor_arms_stay_in_the_chosen_layers():
    base = tiny_llama(num_hidden_layers=3)
    for name in ("layernorm", "ia3"):
        with insert(ARMS[name], context_for(base, layers=(1,)), seed=0) as inserted:
            assert all(".layers.1." in key for key in inserted.trainable)
            assert inserted.trainable


def test_bitfit_trains_biases_and_says_when_there_are_none():
    base = gpt2()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    with insert(ARMS["bitfit"], context_for(base), seed=0) as inserted:
        assert inserted.own
        assert all(key.endswith(".bias") for key in inserted.trainable)
        with torch.no_grad():
            for weight in inserted.own.values():
                weight.add_(1.0)
    assert bit_equal(state, base.state_dict())
    with (
        pytest.raises(PreskipError, match=r"LlamaForCausalLM has no biases"),
        insert(ARMS["bitfit"], context_for(tiny_llama()), seed=0),
    ):
        pass


@pytest.mark.parametrize("name", ["bitfit", "full", "preskip-closed", "canon"])
def test_a_quantised_base_takes_adapters_of_peft_only(name):
    """As `Trainer` does, which says so in a traceback at the first training."""
    base = gpt2()
    base.is_quantized = True
    told = rf"arm {name} is no PEFT adapter, and only these are trained in a quantised base: leave it out, or give"
    with pytest.raises(PreskipError, match=told), insert(ARMS[name], context_for(base), seed=0):
        pass
    for other in ("none", "preskip", "lora"):
        with insert(ARMS[other], context_for(base), seed=0) as inserted:
            assert bool(inserted.layers) == (other != "none")


def test_weights_of_a_float16_base_are_not_trained():
    base = tiny_llama().half()
    with (
        pytest.raises(PreskipError, match="arm full would train weights in float16"),
        insert(ARMS["full"], context_for(base), seed=0),
    ):
        pass
    assert {weight.dtype for weight in base.parameters()} == {torch.float16}


def test_all_weights_of_a_bfloat16_base_are_trained_in_float32():
    """The first loss and gradients are those of PyTorch's own mixed precision; the base comes back bit for bit."""
    base = tiny_llama().bfloat16()
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
    reference = copy.deepcopy(base).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(input_ids=ids, labels=ids).loss
    expected.backward()
    with insert(ARMS["full"], context_for(base), seed=0) as inserted:
        assert {weight.dtype for weight in inserted.trainable.values()} == {torch.float32}
        loss = inserted.model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert loss.item() == expected.item()
        for name, weight in reference.named_parameters():
            torch.testing.assert_close(inserted.trainable[name].grad, weight.grad, rtol=0, atol=0)
        with torch.no_grad():
            for weight in inserted.trainable.values():
                weight.add_(1e-4)  # bfloat16 could not hold it beside a weight of 1
            assert not torch.equal(inserted.model(input_ids=ids).logits, before)
            with inserted.as_base():
                torch.testing.assert_close(inserted.model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert bit_equal(state, base.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=ids).logits, before, rtol=0, atol=0)


def test_biases_of_a_bfloat16_base_with_layer_norms_are_trained_in_float32():
    """torch's LayerNorm for processors refuses a bfloat16 weight beside a float32 bias."""
    base = gpt2().bfloat16().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
    reference = copy.deepcopy(base).float()
    reference(input_ids=ids, labels=ids).loss.backward()
    expected = dict(reference.named_parameters())
    with insert(ARMS["bitfit"], context_for(base), seed=0) as inserted:
        inserted.model(input_ids=ids, labels=ids).loss.backward()
        for name, weight in inserted.trainable.items():
            assert weight.dtype == weight.grad.dtype == torch.float32
            error = (weight.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp(min=1e-3)
            assert error < 0.05, name
        with torch.no_grad():
            for weight in inserted.trainable.values():
                weight.add_(0.1)
        with torch.no_grad(), inserted.as_base():
            assert torch.equal(inserted.model(input_ids=ids).logits, before)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_copy_of_a_model_under_autocast_trains_itself(wrapped):
    """FSDP shards a copy; `wrapped` as accelerate's hooks leave a forward."""
    base = tiny_llama().bfloat16()
    if wrapped:
        base.forward = functools.update_wrapper(functools.partial(type(base).forward, base), base.forward)
    own = vars(base).get("forward")
    ids = torch.tensor([[5, 6, 7, 8]])
    with insert(ARMS["full"], context_for(base), seed=0) as inserted:
        model = copy.deepcopy(inserted.model)
        assert "input_ids" in inspect.signature(model.forward).parameters
        loss = model(input_ids=ids, labels=ids).loss
        assert loss.item() == inserted.model(input_ids=ids, labels=ids).loss.item()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        assert all(weight.grad is None for weight in inserted.model.parameters())
    assert vars(base).get("forward") is own


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_norms_of_a_bfloat16_base_are_trained_and_loaded_in_float32(family, tmp_path):
    """As they are they change nothing; a step too small for bfloat16 is kept, also in the file."""
    base = zoo.build(family).bfloat16().eval()
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(input_ids=ids).logits
    with insert(ARMS["layernorm"], context_for(base), seed=0) as inserted:
        trainable = inserted.trainable
        assert {weight.dtype for weight in trainable.values()} == {torch.float32}
        logits = inserted.model(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, before, atol=0.02, rtol=0.02)
        logits.float().square().mean().backward()
        assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in trainable.values())
        with torch.no_grad():
            for weight in trainable.values():
                weight.add_(1e-4)
        assert all((weight != weight.bfloat16()).any() for weight in trainable.values())
        inserted.save(tmp_path)
        trained = {name: weight.detach().clone() for name, weight in trainable.items()}
        logits = inserted.model(input_ids=ids).logits
    assert bit_equal(state, base.state_dict())
    assert torch.equal(base(input_ids=ids).logits, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_adapter(base, tmp_path)
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in trained.items())
    assert torch.equal(loaded(input_ids=ids).logits, logits)


def test_content_leaves_what_attention_reads():
    base = tiny_llama(hidden_size=64)
    config = ARMS["content"].make_config(context_for(base))
    assert config.content_skip
    assert not config.enrich_attention
    assert config.expansion == pytest.approx(1.25, abs=0.01)


def test_an_expansion_that_cannot_be_met_names_the_nearest():
    base = tiny_llama()
    with pytest.raises(PreskipError, match="nearest possible is"):
        match_expansion(base, BranchSettings(), 5050, attention_paths(base))


def test_the_arm_that_the_page_adds():
    """The example of docs/add-arm.md is run as it stands there."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "add-arm.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    definition, entry = block.split("\n\n\nArm(")
    exec(definition, names)
    arm = eval("Arm(" + entry, names)
    base = tiny_llama(hidden_size=64)
    with insert(arm, context_for(base), seed=0) as inserted:
        assert 0 < inserted.parameters < context_for(base).budget
        assert all("vera_" in name for name in inserted.trainable)

"""`preskip.optimize`: beside the hooks' arithmetic as the reference, outputs and every gradient; reversible."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import preskip
import zoo
from preskip import PreskipConfig, casting
from preskip.attach import CHILD

# Odd sizes: width 60, 63 tokens, 3 rows.
ODD = LlamaConfig(
    vocab_size=97, hidden_size=60, intermediate_size=90, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=128, pad_token_id=None,
)  # fmt: skip
IDS = torch.randint(97, (3, 63), generator=torch.Generator().manual_seed(0))
SETTINGS = [
    {},
    {"gated": True, "activation": "gelu"},
    {"skip_rank": 7},
    {"content_skip": False},
    {"preprojection": False},
    {"enrich_attention": False},
    {"enrich_attention": False, "content_skip": False},
    {"layers_to_transform": [2]},
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """torch gives up after eight graphs of one function, over all tests."""
    torch.compiler.reset()


def adapted(dtype: torch.dtype = torch.float32, **fields):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM._from_config(ODD, dtype=dtype), PreskipConfig(**fields))
    zoo.randomise(model)
    return model.eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of every branch weight, and of the embedded input."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"input": embedded.grad, **found}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_outputs_and_every_gradient_are_those_of_the_hooks(fields, dtype):
    model = adapted(dtype, **fields)
    wanted, slopes = model(IDS).logits, gradients(model)
    before = hooks_of(model)
    with preskip.optimize(model) as handle:
        assert handle.attentions == (1 if "layers_to_transform" in fields else 3)
        assert hooks_of(model) == before - 2 * handle.attentions
        assert torch.equal(model(IDS).logits, wanted)
        with torch.inference_mode():  # packed, where the processor packs bfloat16
            for batch in (IDS, IDS[:1, :1], IDS[:, :7]):
                packed, reference = model(batch).logits, wanted[: len(batch), : batch.shape[1]]
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                assert (packed - reference).abs().max() <= tolerance * reference.abs().max()
        found = gradients(model)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (found[name] - slope).abs().max() <= tolerance * slope.abs().max(), name
    assert hooks_of(model) == before
    assert type(model.base_model.model.model.layers[2].self_attn).__name__ == "LlamaAttention"
    assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.filterwarnings("ignore:no attention was optimised")
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "falcon", "gemma2", "bert", "qwen3"])
def test_on_every_call_style(family):
    model = get_peft_model(zoo.build(family), PreskipConfig())
    zoo.randomise(model)
    wanted = zoo.logits(model.eval(), family)
    with preskip.optimize(model) as handle:
        assert handle.attentions == (0 if family == "bert" else zoo.LAYERS)  # its skip joins behind another module
        assert torch.equal(zoo.logits(model, family), wanted)


def test_a_model_with_branches_built_in_gives_the_adapters_bits_in_bfloat16(tmp_path):
    model = adapted(torch.bfloat16)
    preskip.bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    wanted = model(IDS).logits
    for other in (model, baked):
        with preskip.optimize(other) as handle:
            assert handle.attentions == 3
            assert torch.equal(other(IDS).logits, wanted)


def test_every_element_is_written():
    """torch.empty filled with NaN, as for a buffer that nothing has written."""
    model = adapted(torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        with preskip.optimize(model), torch.inference_mode():
            assert model(IDS).logits.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changes_meanwhile_is_seen(dtype):
    model = adapted(dtype)
    twin = copy.deepcopy(model)
    with preskip.optimize(model), torch.no_grad():
        model(IDS)
        for change in (
            lambda m: next(p for n, p in m.named_parameters() if "skip" in n).mul_(2),
            lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}, assign=True),
            lambda m: (m.add_adapter("second", PreskipConfig(init_weights="paper")), m.set_adapter("second")),
            lambda m: m.base_model.set_adapter(["default", "second"]),
            lambda m: m.base_model.disable_adapter_layers(),
        ):
            for each in (model, twin):
                torch.manual_seed(1)
                change(each)
            assert torch.equal(model(IDS).logits, twin(IDS).logits)
        model.base_model.enable_adapter_layers()
        twin.base_model.enable_adapter_layers()
        with model.disable_adapter():
            disabled = model(IDS).logits
        with twin.disable_adapter():
            assert torch.equal(disabled, twin(IDS).logits)


def through_data(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".preskip." in name:
            parameter.data.mul_(1.5)
    casting.forget()


def in_other_storage(model: nn.Module) -> None:
    own = [parameter for name, parameter in model.named_parameters() if ".preskip." in name]
    vector_to_parameters(parameters_to_vector(own) * 1.5, own)


def in_a_new_adapter_of_its_name(model: nn.Module) -> None:
    model.add_adapter("second", PreskipConfig())
    model.set_adapter("second")
    model.delete_adapter("default")
    model.add_adapter("default", PreskipConfig(init_weights="paper", init_std=0.3))
    model.set_adapter("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [through_data, in_other_storage, in_a_new_adapter_of_its_name])
def test_weights_that_change_without_a_new_version_are_seen(change, dtype):
    model = adapted(dtype)
    twin = copy.deepcopy(model)
    with preskip.optimize(model), torch.inference_mode():
        before = model(IDS).logits
        with torch.inference_mode(False), torch.no_grad():
            for each in (model, twin):
                torch.manual_seed(1)
                change(each)
        found, wanted = model.eval()(IDS).logits, twin.eval()(IDS).logits
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        assert (found - before).abs().max() > 10 * tolerance * wanted.abs().max()


def test_other_storage_is_seen_where_it_has_the_address_of_the_last(tmp_path):
    preskip.bake(adapted(torch.bfloat16), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    own = [parameter for name, parameter in model.named_parameters() if ".preskip." in name]
    home = parameters_to_vector(own)
    with preskip.optimize(model), torch.no_grad():
        for scale in range(1, 11):
            vector_to_parameters(home * scale, own)
            found = model(IDS).logits
            casting.forget()
            assert torch.equal(found, model(IDS).logits)
            vector_to_parameters(home, own)


@pytest.mark.parametrize("rows", [1, 3])
def test_int8_weights_that_are_loaded_meanwhile_are_seen(rows, tmp_path):
    preskip.bake(adapted(torch.bfloat16), tmp_path / "out", quantize="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    others = {
        key: -value if value.dtype == torch.int8 else value * 1.5 if key.endswith("preskip.skip.scale") else value
        for key, value in model.state_dict().items()
    }
    ids = IDS[:rows, :1]
    with preskip.optimize(model), torch.inference_mode():
        before = model(ids).logits
        model.load_state_dict(others)
        found = model(ids).logits
    with torch.inference_mode():
        wanted = model(ids).logits
    assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert (found - before).abs().max() > 0.2 * wanted.abs().max()


def test_weights_that_torch_gives_no_versions_compute_as_with_hooks():
    with torch.inference_mode():
        model = adapted(torch.bfloat16)
        wanted = model(IDS).logits
        with preskip.optimize(model) as handle:
            assert handle.attentions == 3
            assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_compiles_before_its_first_call(dtype):
    model = adapted(dtype)
    preskip.optimize(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin.base_model.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS).logits, model(IDS).logits)


def test_training_and_its_dropout_are_as_with_hooks():
    model = adapted(dropout=0.5)
    twin = copy.deepcopy(model)
    preskip.optimize(model)
    for each in (model.train(), twin.train()):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            each(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.eval()(IDS).logits, twin.eval()(IDS).logits)


def test_unloading_copies_and_a_second_call():
    model = adapted(torch.bfloat16)
    wanted = model(IDS).logits
    handle = preskip.optimize(model)
    assert preskip.optimize(model).attentions == 0
    assert torch.equal(copy.deepcopy(model)(IDS).logits, wanted)
    base = model.unload()
    plain = base(IDS).logits
    handle.remove()
    handle.remove()
    assert torch.equal(base(IDS).logits, plain)
    assert hooks_of(base) == 0
    assert not hasattr(base.model.layers[0].self_attn, CHILD)


@pytest.mark.parametrize("name", ["default", "second"])
@pytest.mark.parametrize("training", [False, True])
def test_the_next_adapter_on_an_unloaded_base_is_the_only_one_that_acts(name, training):
    """As on a base that was never optimised, with its hooks, optimised anew, and after the first handle's end."""
    first = adapted()
    handle = preskip.optimize(first)
    first(IDS)
    base, plain = first.unload(), LlamaForCausalLM._from_config(ODD)
    plain.load_state_dict(base.state_dict())
    models = []
    for each in (base, plain):
        torch.manual_seed(1)
        models.append(get_peft_model(each, PreskipConfig(init_weights="paper", init_std=0.3), adapter_name=name))
        models[-1].train(training)
    found, wanted = models
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)
    again = preskip.optimize(found)
    assert again.attentions == 3
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)
    handle.remove()
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)
    again.remove()
    assert hooks_of(found) == hooks_of(wanted)
    assert type(base.model.layers[0].self_attn).__name__ == "LlamaAttention"
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)


def test_an_unloaded_copy_leaves_the_original_optimised():
    model = adapted()
    wanted = model(IDS).logits
    with preskip.optimize(model):
        twin = copy.deepcopy(model)
        base = twin.unload()
        assert type(base.model.layers[0].self_attn).__name__ == "LlamaAttention"
        assert torch.equal(model(IDS).logits, wanted)
        assert not torch.equal(base(IDS).logits, wanted)
        assert hooks_of(model) < hooks_of(adapted())


def test_an_attention_with_anothers_hook_is_left_as_it_is():
    model = adapted()
    seen = []
    attention = model.base_model.model.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    with preskip.optimize(model) as handle:
        assert handle.attentions == 2
        model(IDS)
    assert seen == [(3, 63, 60)]


def test_a_model_in_which_nothing_can_be_optimised_is_named(tmp_path):
    recorded, several, bert = adapted(), adapted(), get_peft_model(zoo.build("bert"), PreskipConfig())
    recorded(IDS, output_hidden_states=True)
    several.add_adapter("second", PreskipConfig())
    preskip.bake(several, tmp_path / "out", adapter=["default", "second"])
    for model in (recorded, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), bert):
        with pytest.warns(UserWarning, match="no attention was optimised: the branches join behind other modules, lie"):
            assert preskip.optimize(model).attentions == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model in (adapted(), LlamaForCausalLM(ODD)):
            preskip.optimize(model)
            preskip.optimize(model)


def test_pickled_it_is_as_it_was():
    model = adapted(torch.bfloat16)
    with torch.no_grad():
        wanted = model(IDS).logits
        with preskip.optimize(model):
            assert torch.equal(model(IDS).logits, wanted)
            twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(IDS).logits, wanted)
        assert type(twin.base_model.model.model.layers[0].self_attn).__name__ == "OptimizedLlamaAttention"
        assert torch.equal(twin.unload()(IDS).logits, model.unload()(IDS).logits)


def test_gradients_by_torch_func_are_those_with_hooks():
    model = adapted(torch.bfloat16)
    model.config._attn_implementation = "eager"
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def loss(some):
        return torch.func.functional_call(model, some, (IDS,)).logits.float().square().mean()

    wanted = torch.func.grad(loss)(weights)
    with preskip.optimize(model):
        found = torch.func.grad(loss)(weights)
        assert all(torch.equal(found[name], wanted[name]) for name in weights)
        loss(weights).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_has_the_weights_themselves():
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = adapted(torch.bfloat16)
    with preskip.optimize(model):
        model(IDS)
        traced = torch.jit.trace(Logits(model), (IDS,), check_trace=False)
    before = model(IDS).logits
    assert torch.equal(traced(IDS), before)
    next(weight for name, weight in model.named_parameters() if "preskip.down" in name).mul_(2)
    assert torch.equal(traced(IDS), model(IDS).logits)
    assert not torch.equal(traced(IDS), before)


def test_a_different_adapter_per_row():
    model = adapted()
    torch.manual_seed(1)
    model.add_adapter("second", PreskipConfig(init_weights="paper", init_std=0.3))
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        wanted = model(input_ids=IDS, adapter_names=names).logits
        assert not torch.equal(wanted, model(input_ids=IDS).logits)
        with preskip.optimize(model):
            assert torch.equal(model(input_ids=IDS, adapter_names=names).logits, wanted)


def test_lora_beside_it():
    model = adapted()
    stacked = get_peft_model(model.get_base_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted = stacked.eval()(IDS).logits
    with preskip.optimize(stacked) as handle:
        assert handle.attentions == 3
        assert torch.equal(stacked(IDS).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_a_static_cache_is_one_graph_that_is_compiled_once(dtype):
    model = adapted(dtype)
    ids = IDS[:1]
    with torch.inference_mode():
        wanted = model(ids).logits
        with preskip.optimize(model):
            cache = StaticCache(config=model.config, max_cache_len=64)
            model(input_ids=ids[:, :50], past_key_values=cache, use_cache=True)
            graphs = []

            def count(graph, inputs):
                graphs.append(graph)
                return graph.forward

            compiled = torch.compile(model.base_model.model, backend=count, fullgraph=True, dynamic=False)
            for place in range(50, 63):
                found = compiled(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                assert (found[:, 0] - wanted[:, place]).abs().max() <= tolerance * wanted.abs().max()
    assert len(graphs) == 1


def test_a_compiled_graph_casts_no_weight():
    """The graph's inputs are the weights as they are multiplied, not their fp32 masters."""
    model = adapted(torch.bfloat16)
    inputs: list[torch.Tensor] = []

    def look(graph, example_inputs):
        inputs.extend(each for each in example_inputs if isinstance(each, torch.Tensor))
        return graph.forward

    with torch.inference_mode():
        torch.compile(model.base_model.model, backend=look, fullgraph=True, dynamic=False)(input_ids=IDS)
        assert sum(t.dtype == torch.float32 and t.ndim == 2 for t in inputs) == 9  # with hooks: three masters a layer
        inputs.clear()
        torch.compiler.reset()
        with preskip.optimize(model):
            torch.compile(model.base_model.model, backend=look, fullgraph=True, dynamic=False)(input_ids=IDS)
    assert not any(t.dtype == torch.float32 and t.ndim == 2 for t in inputs)


def test_the_architecture_from_a_config():
    torch.manual_seed(0)
    config = AutoConfig.for_model("preskip_llama", **{k: v for k, v in ODD.to_dict().items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config).eval()
    wanted = model(IDS).logits
    with preskip.optimize(model) as handle:
        assert handle.attentions == 3
        assert torch.equal(model(IDS).logits, wanted)


def test_on_meta_a_pass_tells_shapes():
    model = adapted().to("meta")
    with preskip.optimize(model), torch.no_grad():
        found = model(IDS.to("meta")).logits
    assert (found.device.type, found.shape) == ("meta", (*IDS.shape, ODD.vocab_size))


@torch.no_grad()
def test_a_moved_model_keeps_no_copies_of_weights_as_they_were():
    model = adapted(torch.bfloat16)
    wanted = model(IDS).logits
    with preskip.optimize(model):
        model(IDS)
        kept = [weakref.ref(tensor) for tensor in preskip.optimizing.copies(model)]
        assert kept
        model.to("cpu")
        gc.collect()
        assert not any(tensor() is not None for tensor in kept)
        assert preskip.optimizing.copies(model)  # made anew at once, for a compiler that comes first
        error = (model(IDS).logits - wanted).abs().max()
        assert error <= 2e-2 * wanted.abs().max()

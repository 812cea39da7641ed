"""The controls: what is matched, held against counts of built models and against equations."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from preskip.architecture import TYPES
from preskip.arms import SCRATCH_ARMS
from preskip.arms.plan import Planner
from preskip.arms.shape import tokenizer_fields
from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.scratch import build_model
from preskip.experiment.scratch_inputs import plan_arms
from tiny_text import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Canon layers sit inside the MLP, which experts do not have as linear layers; a part of a matrix is not replaced.
ARMS_THAT_DO_NOT_FIT = {"mixtral": "canon"} | dict.fromkeys(("gpt2", "gpt_neox", "pythia-14m", "phi3"), "nonlinear-q")


def config(**changes):
    return PretrainConfig(**{"arms": tuple(SCRATCH_ARMS), "tokens": 400_000, **changes})


def planner(layers=None):
    options = config()
    return Planner(
        arch=options.arch,
        overrides=options.overrides,
        fields=tokenizer_fields(TOKENIZER),
        own_vocabulary=False,
        settings=options.settings,
        skip_position=options.skip_position,
        layers=layers,
        seq_len=options.seq_len,
        steps=options.steps,
        tokens_per_step=options.tokens_per_step,
    )


@pytest.fixture(scope="module")
def plans():
    return plan_arms(config(), TOKENIZER)


def test_every_name_has_an_arm():
    names = {"base", "base-wide", "base-deep", "base-flops", "skip", "preproj", "preskip", "parallel"}
    assert names <= set(SCRATCH_ARMS)


def test_sizes_are_those_of_the_models_that_are_built(plans):
    for name, plan in plans.items():
        model = AutoModelForCausalLM.from_config(plan.config)
        assert plan.size.parameters == sum(p.numel() for p in model.parameters()), name
        looked_up = 4 if name.endswith("value-embed") else 1  # tables of values of as many tokens, as wide
        assert plan.size.parameters - plan.size.non_embedding == looked_up * 400 * 128, name


def test_preskip_adds_three_and_a_half_squares_per_layer(plans):
    added = plans["preskip"].size.parameters - plans["base"].size.parameters
    assert added == 5 * 3.5 * 128**2
    assert plans["preskip"].size.flops_per_token - plans["base"].size.flops_per_token == 2 * added


def test_the_wide_control_has_as_many_weights_as_the_width_allows(plans):
    wide, target = plans["base-wide"], plans["preskip"].size.parameters
    assert wide.matched == "parameters"
    # One feature more or less of a gated MLP is 3 d weights per layer.
    assert abs(wide.size.parameters - target) <= 5 * 3 * 128 / 2
    assert wide.deviation == pytest.approx(wide.size.parameters / target - 1)
    assert wide.config.intermediate_size == wide.mlp_width == 344 + round(3.5 * 128 / 3)


def test_the_deep_control_is_the_nearest_number_of_layers():
    plans = plan_arms(config(overrides={"num_hidden_layers": 12}), TOKENIZER)
    base, deep, target = (plans[name] for name in ("base", "base-deep", "preskip"))
    per_layer = (deep.size.parameters - base.size.parameters) / (deep.config.num_hidden_layers - 12)
    assert abs(deep.size.parameters - target.size.parameters) <= per_layer / 2
    assert deep.deviation == pytest.approx(deep.size.parameters / target.size.parameters - 1)


def test_the_iso_flop_control_trains_on_as_many_flops(plans):
    flops, target = plans["base-flops"], plans["preskip"]
    assert flops.size == plans["base"].size
    assert flops.tokens % 4096 == 0
    one_step = 3 * flops.size.flops_per_token * 4096
    assert abs(flops.training_flops - target.training_flops) <= one_step / 2
    assert flops.deviation == pytest.approx(flops.training_flops / target.training_flops - 1)


@pytest.mark.parametrize("arm", ["preproj", "parallel"])
def test_arms_without_a_skip_are_widened(plans, arm):
    assert plans[arm].size.parameters == pytest.approx(plans["preskip"].size.parameters, rel=5e-4)
    assert plans[arm].config.preskip_content_skip is False
    assert plans[arm].config.preskip_enrich_attention is (arm == "preproj")


def test_the_linear_skip_is_smaller_and_says_so(plans):
    assert plans["skip"].matched is None
    assert plans["skip"].size.parameters == plans["base"].size.parameters + 5 * 128**2


def test_peers_are_counted(plans):
    """Width 128, 5 layers, MLP of 344, 4 heads with keys and values of their own; 400 tokens here."""
    base, target = plans["base"].size, plans["preskip"].size
    for arm, per_layer in (("canon-a", 4 * 128), ("canon", 4 * (128 + 3 * 128 + 128 + 2 * 344))):
        more = plans[arm].size.parameters - base.parameters
        assert more == 5 * per_layer
        assert plans[arm].size.flops_per_token - base.flops_per_token == 2 * more
        assert plans[arm].matched is None
        crossed = plans[f"preskip+{arm}"]
        assert crossed.deviation == pytest.approx(0, abs=5e-4)
        assert crossed.config.preskip_expansion == pytest.approx(1.25 - per_layer / (2 * 128**2), abs=1 / 128)
    assert plans["value-residual"].size == base
    assert plans["preskip+value-residual"].size == target
    for arm, weights, flops in (("nonlinear-q", 2 * 128, 0), ("gated-attention", 4 * 128, 2 * 4 * 128)):
        assert plans[arm].size.parameters - base.parameters == 5 * weights
        assert plans[arm].size.flops_per_token - base.flops_per_token == 5 * flops
        assert plans[arm].matched is None
        assert plans[f"preskip+{arm}"].deviation == pytest.approx(0, abs=5e-4)
    tables = 3 * (400 * 128 + 4 * 12)
    assert plans["value-embed"].config.preskip_peers == {"value-embed": {"layers": [0, 2, 4]}}
    assert plans["preskip+value-embed"].size.parameters == target.parameters + tables
    assert plans["preskip+value-embed"].size.flops_per_token == target.flops_per_token + 2 * 3 * 4 * 12
    assert plans["preskip+value-embed"].facts["budget"] == "larger"
    wide = plans["value-embed"]
    assert wide.size.parameters == base.parameters + tables + 5 * 3 * 128 * (wide.mlp_width - 344)
    for arm in ("value-embed", "base-wide+canon-a"):
        assert abs(plans[arm].size.parameters - target.parameters) <= 5 * 3 * 128 / 2
        assert plans[arm].matched == "parameters"


def test_a_table_that_the_branch_cannot_pay_for_is_refused():
    with pytest.raises(
        PreskipError, match=r"arm value-embed: one table of values has 6,4\d\d,\d{3} weights, more than"
    ):
        plan_arms(config(overrides={"vocab_size": 50_304}, arms=("value-embed",)), TOKENIZER)


def test_a_vocabulary_with_gaps_reaches_to_its_highest_id(tmp_path):
    stored = json.loads(TOKENIZER.backend_tokenizer.to_str())
    before, after = stored["model"]["merges"][-1]
    stored["model"]["vocab"]["".join((before, after))] = 450
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert (len(tokenizer), max(tokenizer.get_vocab().values())) == (400, 450)
    assert plan_arms(config(arms=("base",)), tokenizer)["base"].config.vocab_size == 451
    with pytest.raises(PreskipError, match="whose ids go up to 450: raise it to 451, or leave it out"):
        plan_arms(config(overrides={"vocab_size": 450}, arms=("base",)), tokenizer)


def test_every_arm_trains_on_the_asked_tokens_but_the_iso_flop_one(plans):
    assert {plan.tokens for name, plan in plans.items() if name != "base-flops"} == {98 * 4096}


@pytest.mark.parametrize("arm", ["preskip", "preproj", "skip", "parallel"])
def test_only_the_chosen_layers_have_a_branch(arm):
    plan, whole = (planner(layers=layers).plan(SCRATCH_ARMS[arm]) for layers in ((1, 3), None))
    model = AutoModelForCausalLM.from_config(plan.config)
    assert {int(name.split(".layers.")[1][0]) for name, _ in model.named_parameters() if ".preskip." in name} == {1, 3}
    assert plan.size.parameters == sum(p.numel() for p in model.parameters())
    plain = planner(layers=None).plan(SCRATCH_ARMS["base"]).size.parameters
    assert 5 * (plan.size.parameters - plain) == 2 * (whole.size.parameters - plain)
    assert plan.deviation == (None if arm == "skip" else pytest.approx(0, abs=5e-4))


def test_controls_are_matched_to_the_layers_that_have_a_branch():
    plain, wide = (planner(layers=(0,)).plan(SCRATCH_ARMS[arm]) for arm in ("base", "base-wide"))
    assert wide.size.parameters - plain.size.parameters == pytest.approx(3.5 * 128**2, abs=5 * 3 * 128 / 2)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(PreskipError, match=r"preskip_layers=\[0, 5\] is not possible with 5 layers"):
        planner(layers=(0, 5)).plan(SCRATCH_ARMS["preskip"])


def test_other_branches_can_be_trained_from_scratch_too(plans):
    for arm in ("content", "preskip-gated"):
        assert planner().plan(SCRATCH_ARMS[arm]).size.parameters == pytest.approx(
            plans["preskip"].size.parameters, rel=5e-4
        )


@pytest.mark.parametrize("gated", [False, True])
def test_other_branches_are_matched_too(gated):
    settings = BranchSettings(gated=gated, expansion=0.5, skip_rank=8, init_weights="paper")
    plans = plan_arms(config(settings=settings), TOKENIZER)
    for arm in ("preproj", "parallel", "base-wide"):
        assert plans[arm].size.parameters == pytest.approx(plans["preskip"].size.parameters, rel=2e-3)


@pytest.mark.parametrize("arch", ["pythia-14m", "gpt2", "gemma3_text", "mixtral", "phi3"])
def test_other_architectures_are_matched_too(arch, tmp_path):
    path = arch
    if "-" not in arch:
        path = tmp_path / "config.json"
        path.write_text(f'{{"model_type": "{arch}"}}')
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
        "num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 16,
    }  # fmt: skip
    unknown = {
        "pythia-14m": ("num_key_value_heads", "num_local_experts", "head_dim"),
        "gpt2": ("num_key_value_heads", "num_local_experts", "head_dim", "intermediate_size"),
    }.get(arch, ("num_local_experts", "head_dim") if arch == "phi3" else ())
    sizes = {
        key: value for key, value in sizes.items() if key not in unknown and (arch == "mixtral" or "experts" not in key)
    }
    odd = ARMS_THAT_DO_NOT_FIT.get(arch)
    arms = tuple(name for name in SCRATCH_ARMS if odd is None or not name.endswith(odd))
    plans = plan_arms(config(arch=str(path), overrides=sizes, arms=arms), TOKENIZER)
    assert abs(plans["base-wide"].deviation) < 0.005
    assert plans["preskip"].config.model_type == f"preskip_{plans['base'].config.model_type}"
    assert plans["preskip"].size.flops_per_token > plans["base"].size.flops_per_token


@pytest.mark.parametrize("kind", TYPES)
def test_a_config_file_with_every_field_is_planned_with_other_sizes(kind, tmp_path):
    """As a model's own config.json: fields of the tokenizer and sizes are in it, and those given replace them."""
    made = AutoConfig.for_model(kind)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "num_local_experts": 2, "vocab_size": 999}
    for field in dataclasses.fields(made):
        if field.name in sizes:
            setattr(made, field.name, sizes[field.name])
    made.save_pretrained(tmp_path)
    odd = ARMS_THAT_DO_NOT_FIT.get(kind)
    arms = tuple(name for name in SCRATCH_ARMS if odd is None or not name.endswith(odd))
    given = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96}
    plans = plan_arms(config(arch=str(tmp_path), overrides=given, arms=arms), TOKENIZER)
    base = plans["base"]
    assert (base.config.hidden_size, base.config.vocab_size, base.config.num_hidden_layers) == (64, 400, 5)
    assert (base.mlp_width, plans["base-wide"].mlp_width > 96) == (96, True)
    assert abs(plans["base-wide"].deviation) < 0.01
    with pytest.raises(PreskipError, match=f"rope_thetta is no field of a {kind} config"):
        plan_arms(config(arch=str(tmp_path), overrides={"rope_thetta": 3}), TOKENIZER)


def test_base_and_preskip_begin_with_the_same_weights():
    arms = ("base", "preskip", "canon", "preskip+canon-a")
    plans = plan_arms(config(overrides={"num_hidden_layers": 1}, arms=arms), TOKENIZER)
    run = config(device="cpu")
    base, *others = (build_model(run, plans[arm], seed=7).state_dict() for arm in arms)
    for ours in others:
        assert base.keys() < ours.keys()
        for name, tensor in base.items():
            assert torch.equal(tensor, ours[name]), name
    other = build_model(run, plans["base"], seed=8).state_dict()
    assert not torch.equal(other["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "pythia-70b"}, "did you mean pythia-70m"),
        ({"arch": "nowhere/config.json"}, "does not exist"),
        ({"overrides": {"hidden_size": 130}}, "cannot be shared by 4 heads"),
        ({"overrides": {"num_key_value_heads": 3}}, "4 heads cannot share 3 key-value heads"),
        (
            {"overrides": {"vocab_size": 300}},
            "vocab_size 300 is too small .*, whose ids go up to 399: raise it to 400",
        ),
        ({"overrides": {"colour": 3}}, "colour is no field"),
        ({"overrides": {"num_hidden_layers": "many"}}, "num_hidden_layers"),
    ],
)
def test_architectures_that_cannot_be_built(changes, message):
    with pytest.raises(PreskipError, match=message):
        plan_arms(config(**changes), TOKENIZER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "preskip_llama"}', "give the config of a plain llama"),
        ('{"model_type": "bert"}', "of type 'bert'"),
        ("{", "cannot be read"),
    ],
)
def test_config_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PreskipError, match=message):
        plan_arms(config(arch=str(tmp_path)), TOKENIZER)

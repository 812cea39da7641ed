"""What every experiment's options have in common: written once, layered, stored and read back."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError
from preskip.evaluate.task_settings import TaskSettings
from preskip.experiment.options import ExperimentConfig
from preskip.experiment.presets import preset_options
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.probe_options import ProbeConfig
from preskip.fields import about, flags

STORED = sorted((Path(__file__).parents[2] / "results").rglob("run.json"))
KINDS = [ProbeConfig, PretrainConfig]


# Options that stored runs lack, with what they had.
LATER = {
    "lora_scale": 1.0,
    "keep_weight": 0.0,
    "reuse_prefix": True,
    "layers": None,
    "task_settings": asdict(TaskSettings()),
    "eval_text_column": None,
    "eval_corpus_split": None,
    "primary": [],
    "looks": [],
    "lr_rule": "in-domain",
    "lr_harm": 0.01,
    "tune_share": 0.5,
    "split_special_tokens": False,
}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_stored_runs_of_schema_2_are_read_and_written_back(path):
    record = json.loads(path.read_text())
    kind = PretrainConfig if record.get("kind") == "pretrain" else ProbeConfig
    written = json.loads(json.dumps(kind.from_json(record["config"]).to_json()))
    assert {name: written[name] for name in record["config"]} == record["config"]
    later = set(written) - set(record["config"])
    assert {name: written[name] for name in later} == {name: value for name, value in LATER.items() if name in later}


def test_an_option_of_both_is_a_field_of_the_common_class():
    shared = flags(ProbeConfig).keys() & flags(PretrainConfig).keys()
    own = shared - flags(ExperimentConfig).keys()
    assert len(shared) > 30
    assert own == {"context_length"}  # of one it has a default, of the other it is --seq-len
    for name in shared - own:
        one, two = (flags(kind)[name].about for kind in KINDS)
        same = ("hint", "group", "least", "above", "below", "flag", "many", "read")
        assert {key: one.get(key) for key in same} == {key: two.get(key) for key in same}, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_says_what_it_is_and_stands_in_a_group(kind):
    for name, flag in flags(kind).items():
        assert flag.about["help"].endswith("."), name
        assert flag.about.get("group") or flag.about.get("positional"), name
    assert flags(kind)["init_weights"].default == {ProbeConfig: "identity", PretrainConfig: "paper"}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_allowed_and_the_record_gives_the_config_back(kind):
    assert kind.from_options() == kind() == kind.from_json(json.loads(json.dumps(kind().to_json())))
    with pytest.raises(PreskipError, match=f"no configuration of this `preskip {kind.command}`"):
        kind.from_json({"settings": {}, "colour": "x"})


def test_a_later_layer_overrides_and_parts_are_merged():
    layers = [
        {"steps": 5, "expansion": 2.0, "seeds": "1,2"},
        {"steps": "7", "settings": {"gated": True}},
        {"seeds": [3]},
    ]
    config = ProbeConfig.from_options(*layers)
    assert (config.steps, config.seeds) == (7, (3,))
    assert config.settings == BranchSettings(expansion=2.0, gated=True)
    pretrain = PretrainConfig.from_options(
        {"num_layers": 2, "set": ["rope_theta=5", "x=a"]}, {"overrides": {"hidden_size": 64}}, {"num_layers": 3}
    )
    assert pretrain.overrides == {"num_hidden_layers": 3, "rope_theta": 5, "x": "a", "hidden_size": 64}
    assert pretrain.settings == BranchSettings(init_weights="paper")
    assert pretrain.layers is None


def test_lm_evals_options_are_parts_of_a_probe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"tasks": "own", "include_path": "own", "num_fewshot": "3", "apply_chat_template": True}
    config = ProbeConfig.from_options({"task_settings": {"system_instruction": "Be short."}}, given)
    assert config.task_settings == TaskSettings(
        include_path=str(tmp_path / "own"), num_fewshot=3, apply_chat_template=True, system_instruction="Be short."
    )
    assert ProbeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_layers_may_be_the_word_attention_in_every_form():
    for given in ("attention", ["attention"], ("attention",)):
        config = ProbeConfig.from_options({"layers": given})
        assert config.layers == ("attention",)
        assert ProbeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_preset_below_file_below_option():
    file, given = {"preset": "standard", "steps": 30, "save_steps": 10}, {"steps": 40}
    config = ProbeConfig.from_options(file, given, start=preset_options(ProbeConfig, [file, given]))
    assert (config.preset, config.steps, config.save_steps) == ("standard", 40, 10)
    assert (config.task_limit, config.lr_mode) == (1500, "tune")
    assert preset_options(ProbeConfig, [file, {"preset": "quick"}])["batch_size"] == 4
    assert preset_options(PretrainConfig, [given]) == {}
    with pytest.raises(PreskipError, match="--preset 'huge' is unknown: choose one of quick, standard, confirmatory"):
        preset_options(ProbeConfig, [{"preset": "huge"}])


@pytest.mark.parametrize(
    ("layers", "mode", "rates"),
    [
        ([{"lr": ["1e-4"]}], "fixed", {"preskip": 1e-4, "lora": 1e-4}),
        ([{"lr": 1e-4}], "fixed", {"preskip": 1e-4, "lora": 1e-4}),
        ([{"lr": ["1e-4", "lora=1e-3"]}], "fixed", {"preskip": 1e-4, "lora": 1e-3}),
        ([{"lr": {"preskip": "1e-4", "lora": 1e-3}}], "fixed", {"preskip": 1e-4, "lora": 1e-3}),  # YAML's 1e-4
        ([{"learning_rates": {"preskip": "1e-4"}}], "default", {"preskip": 1e-4}),
        ([{"lr": ["tune", "lora=1e-3"]}], "tune", {"lora": 1e-3}),
        ([{"lr": "tune"}, {"lr": ["lora=1e-3"]}], "fixed", {"lora": 1e-3}),
        ([{"lr": "tune"}, {"lr_mode": "default", "learning_rates": {}}], "default", {}),
        ([{"lr_mode": "tune", "learning_rates": {}}, {"lr": ["1e-4"], "arms": "lora"}], "fixed", {"lora": 1e-4}),
        ([{"lr": ["1e-4"]}, {"arms": ["none", "skip"]}], "fixed", {"skip": 1e-4}),
    ],
)  # fmt: skip
def test_rates_of_a_probe(layers, mode, rates):
    config = ProbeConfig.from_options(*layers)
    assert (config.lr_mode, config.learning_rates) == (mode, rates)


def test_rates_of_a_pretraining():
    config = PretrainConfig.from_options(
        {"learning_rate": 1e-2, "learning_rates": {"base": 1.0}}, {"lr": ["preskip=2e-3"]}
    )
    assert (config.learning_rate, config.learning_rates) == (3e-3, {"preskip": 2e-3})
    config = PretrainConfig.from_options({"lr": ["5e-3", "base=1e-3"], "branch_lr_factor": "2"})
    assert (config.learning_rate, config.learning_rates, config.branch_rate_factor) == (5e-3, {"base": 1e-3}, 2.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ProbeConfig, {"steps": "ten"}, "--steps ten is not possible: it must be at least 2"),
        (ProbeConfig, {"steps": 2.5}, "--steps 2.5 is not possible"),
        (ProbeConfig, {"steps": True}, "--steps True is not possible"),
        (ProbeConfig, {"steps": None}, "--steps None is not possible"),
        (ProbeConfig, {"tune_seed": "one"}, "--tune-seed one is not possible: it must be at least 0"),
        (ProbeConfig, {"dtype_audit": 1}, "--dtype-audit 1 is not possible: choose true or false"),
        (ProbeConfig, {"lr_rule": "frontier"}, "--lr-rule is for --lr tune: give that, too, or leave it out"),
        (ProbeConfig, {"lr_rule": "best"}, "--lr-rule 'best' is unknown: choose one of in-domain, frontier"),
        (ProbeConfig, {"primary": "preskip"}, "--primary 'preskip' is not ARM:REFERENCE"),
        (ProbeConfig, {"primary": "preskip:dora"}, "--primary preskip:dora: give two of the arms that are compared"),
        (ProbeConfig, {"looks": "3,x"}, "--looks: 'x' is not a whole number"),
        (PretrainConfig, {"looks": "1,2"}, "--looks 1, 2: give 2 to 10 rising numbers of seeds"),
        (PretrainConfig, {"looks": "5,3"}, "--looks 5, 3: give 2 to 10 rising numbers of seeds"),
        (PretrainConfig, {"looks": "3,5"}, "--seeds gives 1: looks are declared at 3, 5 seeds"),
        (ProbeConfig, {"equal_step": "yes"}, "--equal-step yes is not possible: choose true or false"),
        (ProbeConfig, {"model": 3}, "--model 3 is not possible: it must be a text"),
        (ProbeConfig, {"expansion": "wide"}, "expansion='wide' is not possible: it must be > 0 and <= 64"),
        (ProbeConfig, {"heldout_fraction": 1}, "--heldout-fraction 1.0 is not possible: it must be > 0 and < 1"),
        (ProbeConfig, {"layers": [1, 1]}, "--layers needs one or more different layer indices"),
        (PretrainConfig, {"layers": "1-"}, "--layers '1-' is not a list of layers"),
        (PretrainConfig, {"layers": "7,5-3"}, "--layers '5-3' ends before it begins: give 3-5"),
        (ProbeConfig, {"layers": "mamba"}, "--layers 'mamba' is not a list of layers, e.g. 0-5,10, nor 'attention'"),
        (PretrainConfig, {"layers": "attention"}, "--layers attention is for models with other layers, too"),
        (PretrainConfig, {"max_grad_norm": float("inf")}, "--max-grad-norm inf is not possible: it must be > 0"),
        (ProbeConfig, {"lr": ["tune", "1e-3"]}, "--lr tune has nothing to tune, every arm has a rate"),
        (ProbeConfig, {"lr": "tune", "lr_harm": "0.002"}, "--lr-harm is for --lr-rule frontier: give that, too"),
        (ProbeConfig, {"tune_share": "0.7"}, "--tune-share is for --lr tune: give that, too, or leave it out"),
        (ProbeConfig, {"tune_share": "1.5"}, "--tune-share 1.5 is not possible: it must be > 0 and <= 1"),
        (ProbeConfig, {"tune_seed": "3"}, "--tune-seed is for --lr tune: give that, too, or leave it out"),
        (ProbeConfig, {"lora_rank": "8"}, "--lora-rank is for --match none: give that, too, or leave it out"),
        (ProbeConfig, {"development_words": 50}, "--development-words is for --lr tune: give that, too"),
        (ProbeConfig, {"development_documents": 9}, "--development-documents is for --lr tune: give that, too"),
        (ProbeConfig, {"task_limit": 50}, "--task-limit is for --tasks: give that, too, or leave it out"),
        (ProbeConfig, {"num_fewshot": 3}, "--num-fewshot is for --tasks: give that, too, or leave it out"),
        (ProbeConfig, {"task_settings": {"gen_kwargs": "x=1"}}, "--gen-kwargs is for --tasks: give that, too"),
        (PretrainConfig, {"eval_text_column": "t"}, "--eval-text-column is for --eval-corpora: give that, too"),
        (ProbeConfig, {"lr": ["1e-3", "2e-3"]}, "--lr is given twice for every arm: leave one of them out"),
        (PretrainConfig, {"lr": ["base=1", "1", "base=1"]}, "--lr is given twice for base: leave one of them out"),
        (PretrainConfig, {"warmup_steps": 24, "tokens": 24 * 4096}, "--warmup-steps 24 is not below the 24 steps"),
        (PretrainConfig, {"tokenizer": "x", "vocab_size": 300}, "--vocab-size 300 is for a tokenizer that is trained"),
        (PretrainConfig, {"peak_flops": "-5"}, "--peak-flops -5.0 is not possible: it must be > 0"),
        (PretrainConfig, {"weight_decay": "x"}, "--weight-decay x is not possible: it must be >= 0 and < 10"),
    ],
)
def test_wrong_values_are_refused_in_one_line(kind, options, message):
    with pytest.raises(PreskipError) as caught:
        kind.from_options(options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_stored_run_keeps_options_that_have_no_effect():
    for config in (ProbeConfig(lora_ranks={"lora": 8.0}), PretrainConfig(tokenizer="x", vocab_size=300)):
        assert type(config).from_json(config.to_json()) == config


def test_what_a_subclass_leaves_out_it_inherits():
    assert about(PretrainConfig)["batch_size"] == about(ExperimentConfig)["batch_size"]
    assert about(PretrainConfig)["heldout_fraction"]["below"] == 1
    assert (flags(PretrainConfig)["batch_size"].default, flags(ProbeConfig)["batch_size"].default) == (32, 8)

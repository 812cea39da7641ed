"""Options of a YAML or JSON file, and of another run's run.json."""

import json
from contextlib import suppress

import pytest

from preskip.errors import PreskipError
from preskip.experiment.option_file import configured, load_options
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.probe_options import ProbeConfig
from preskip.fields import about, flags


def test_flags_and_fields_in_yaml_and_json(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "steps: 9\nlr: 1e-3\neval-batch-tokens: 64\nseeds: [1, 2]\nlayers: 0-1\ngated: true\nsettings: {expansion: 2}\n"
    )
    config = configured(ProbeConfig, {}, tmp_path / "run.yaml")
    assert (config.steps, config.eval_batch_tokens, config.seeds, config.layers) == (9, 64, (1, 2), (0, 1))
    assert (config.settings.gated, config.settings.expansion) == (True, 2)
    assert config.learning_rates == {"preskip": 1e-3, "lora": 1e-3}
    (tmp_path / "run.json").write_text(json.dumps({"tokens": "5M", "num-layers": 3, "overrides": {"hidden_size": 64}}))
    pretrain = configured(PretrainConfig, {}, tmp_path / "run.json")
    assert pretrain.tokens == 5_000_000
    assert pretrain.overrides == {"num_hidden_layers": 3, "hidden_size": 64}


@pytest.mark.parametrize("kind", [ProbeConfig, PretrainConfig])
def test_another_runs_record_gives_an_equal_config(tmp_path, kind):
    arms = {ProbeConfig: ("none", "skip", "dora"), PretrainConfig: ("base", "skip")}[kind]
    config = kind(arms=arms, seeds=(5, 6), layers=(0, 2), learning_rates={"skip": 2e-3}, eval_corpora=("pydoc:4x9",))
    record = {"schema_version": 2, "directory": str(tmp_path), "config": config.to_json()}
    record |= {"kind": "pretrain"} if kind is PretrainConfig else {}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert configured(kind, {}, tmp_path / "run.json") == config
    assert configured(kind, {"seeds": "7"}, tmp_path / "run.json").seeds == (7,)


def of_run(folder, kind, stored, **given):
    """The configuration that another run's record and options beside it give."""
    record = {"schema_version": 2, "directory": str(folder), "config": stored.to_json(), "kind": kind.command}
    (folder / "run.json").write_text(json.dumps(record))
    return configured(kind, given, folder / "run.json")


def test_a_rate_for_all_arms_of_another_run_is_one_for_all(tmp_path):
    stored = ProbeConfig.from_options({"arms": "preskip,lora", "lr": ["1e-5"]})
    assert of_run(tmp_path, ProbeConfig, stored) == stored
    more = of_run(tmp_path, ProbeConfig, stored, arms="none,preskip,skip,lora")
    assert more.learning_rates == {"preskip": 1e-5, "skip": 1e-5, "lora": 1e-5}
    assert of_run(tmp_path, ProbeConfig, stored, arms="preskip").learning_rates == {"preskip": 1e-5}


@pytest.mark.parametrize(
    ("kind", "arms"), [(ProbeConfig, "none,preskip,lora,skip"), (PretrainConfig, "base,preskip,skip")]
)
def test_rates_of_arms_that_are_left_out_are_left_out(tmp_path, kind, arms):
    stored = kind.from_options({"arms": arms, "lr": ["preskip=1e-3", "skip=2e-3"]})
    less = of_run(tmp_path, kind, stored, arms=arms.removesuffix(",skip"))
    assert less.learning_rates == {"preskip": 1e-3}


def test_another_match_leaves_out_the_ranks_of_another_run(tmp_path):
    stored = configured(ProbeConfig, {"preset": "paper"})
    assert of_run(tmp_path, ProbeConfig, stored) == stored
    other = of_run(tmp_path, ProbeConfig, stored, match="params")
    assert (other.match, other.lora_ranks) == ("params", {})


def test_paths_of_another_run_are_those_of_its_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    (home / "text.txt").write_text("x")
    others = ("books:4x9", "text.txt", "text.txt:2x5")
    config = ProbeConfig(corpus="text.txt", model="owner/model", eval_corpora=others).to_json()
    for directory in (str(home), ".."):  # absolute, or as seen from the run
        (home / "run" / "run.json").write_text(
            json.dumps({"schema_version": 2, "directory": directory, "config": config})
        )
        options, is_record = load_options(home / "run" / "run.json", ProbeConfig)
        assert is_record
        assert (home / "text.txt").samefile(options["corpus"])
        assert options["model"] == "owner/model"
        named, plain, sized = ProbeConfig.from_options(options).eval_corpora
        assert (named, sized) == ("books:4x9", f"{plain}:2x5")
        assert (home / "text.txt").samefile(plain)
    monkeypatch.chdir(home)
    assert load_options(home / "run" / "run.json", ProbeConfig)[0]["corpus"] == "text.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "run.yaml: 'stepz' is no option of `preskip probe`: did you mean steps?"),
        ("colour: red", "run.yaml: 'colour' is no option of `preskip probe`"),
        ("settings: {width: 3}", "run.yaml: 'width' is no part of settings"),
        ("settings: 3", "run.yaml: settings must be a mapping"),
        ("seq-len: 32\nseq_len: 16", "run.yaml: seq_len is given twice"),
        ("steps: 2\nsteps: 4", "run.yaml cannot be read: steps is given twice"),
        ("settings: {expansion: 2, expansion: 3}", "run.yaml cannot be read: expansion is given twice"),
        ('{"steps": 2, "steps": 4}', "run.yaml cannot be read: steps is given twice"),
        ("? [steps]\n: 2", "run.yaml cannot be read: while constructing a mapping"),
        ("- 1", "run.yaml must hold options by name"),
        ("a: [", "run.yaml cannot be read: while parsing"),
        ("schema_version: 2\nkind: pretrain\nconfig: {}", "run.yaml is of `preskip pretrain`"),
        (None, "run.yaml: no such file"),
    ],
)
def test_what_no_file_may_hold_is_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PreskipError) as caught:
        load_options(tmp_path / "run.yaml", ProbeConfig)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_s_own_way_to_share_names_is_kept(tmp_path):
    (tmp_path / "run.yaml").write_text("settings: {<<: {expansion: 2}, expansion: 3}\n")
    assert load_options(tmp_path / "run.yaml", ProbeConfig) == ({"settings": {"expansion": 3}}, False)
    (tmp_path / "run.json").write_text('{"steps": 2, "steps": 4}')
    with pytest.raises(PreskipError, match="steps is given twice"):
        load_options(tmp_path / "run.json", ProbeConfig)


def test_a_part_given_by_its_flag_and_in_its_field_is_refused():
    with pytest.raises(PreskipError, match="--expansion and --settings expansion give the same: leave one of them out"):
        ProbeConfig.from_options({"settings": {"expansion": 2}, "expansion": 3})
    later = ProbeConfig.from_options({"settings": {"expansion": 2}}, {"expansion": 3})
    assert later.settings.expansion == 3


def test_numbers_and_paths_within_a_mapping_are_read_as_those_of_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text("settings: {expansion: 2e0, dropout: 1e-1}\ntasks: own\ntask_settings: {include_path: tasks}\n")
    config = configured(ProbeConfig, {}, file)
    assert (config.settings.expansion, config.settings.dropout) == (2.0, 0.1)
    assert config.task_settings.include_path == str(tmp_path / "tasks")
    file.write_text("set: {rms_norm_eps: 1e-6, rope_theta: 1.5e+4, name: 1e}\n")
    assert configured(PretrainConfig, {}, file).overrides == {"rms_norm_eps": 1e-6, "rope_theta": 1.5e4, "name": "1e"}


def test_what_a_run_or_a_preset_has_for_an_option_that_is_changed_is_left_out(tmp_path):
    preset: dict[str, object] = {"preset": "confirmatory"}
    fixed = {"lr": ["1e-3"]}
    tuned = configured(ProbeConfig, preset)
    for config in (of_run(tmp_path, ProbeConfig, tuned, **fixed), configured(ProbeConfig, preset | fixed)):
        assert (config.lr_rule, config.tune_share, config.development_documents) == ("in-domain", 0.5, 24)
        assert (config.steps, config.primary) == (48, ("content", "lora"))
    assert configured(ProbeConfig, preset | {"arms": "content,skip"}).primary == ()
    with pytest.raises(PreskipError, match="--primary content:lora: give two of the arms that are compared: none,"):
        configured(ProbeConfig, preset | {"arms": "skip", "primary": "content:lora"})
    with pytest.raises(PreskipError, match="--tune-share is for --lr tune: give that, too, or leave it out"):
        configured(ProbeConfig, preset | fixed | {"tune_share": "0.7"})


@pytest.mark.parametrize("kind", [ProbeConfig, PretrainConfig])
def test_a_value_of_another_type_is_read_or_refused(kind, tmp_path):
    """Each of what YAML may hold, for each option: an empty one is None there, and a lone number no list."""
    file = tmp_path / "run.json"
    for name in {**flags(kind), **about(kind)}:
        for value in (None, True, 1.5, [], [[1]], {"a": [1]}):
            file.write_text(json.dumps({name: value}))
            with suppress(PreskipError):
                configured(kind, {}, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 1.5", "--seeds: '1.5' is not a whole number"),
        ("arms: 5", "unknown arm '5'"),
        ("tasks:", "--tasks None is not possible: give a value, or leave it out"),
        ("layers: 0.5", "--layers 0.5 is not a list of layers"),
        ("primary: 5", "--primary 5 is not ARM:REFERENCE"),
        ("include_path: true", "--include-path True is not possible: it must be a text"),
        ("learning_rates: {preskip: [1]}", r"--lr 'preskip=\[1\]' is not a number"),
        ("steps: 1" + "0" * 400, "it must be at least 2"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PreskipError, match=message):
        configured(ProbeConfig, {}, tmp_path / "run.yaml")


@pytest.mark.parametrize("text", ["command: probe", "rates: [lr]", "settings: {1: 2}", "task_settings: {shots: 1}"])
def test_what_is_no_option_is_refused(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PreskipError, match=r"is no option of `preskip probe`|is no part of"):
        load_options(tmp_path / "run.yaml", ProbeConfig)

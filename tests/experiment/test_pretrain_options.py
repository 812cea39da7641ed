import pytest

from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_by_arm, parse_extent, parse_overrides, parse_tokens
from preskip.experiment.pretrain_options import PretrainConfig


def test_tokens_with_and_without_units():
    assert [parse_tokens(text) for text in ("5000000", "5e6", "5M", "1.5B", "20k")] == [
        5_000_000,
        5_000_000,
        5_000_000,
        1_500_000_000,
        20_000,
    ]
    for text in ("", "M", "five", "1T", "inf"):
        with pytest.raises(PreskipError, match="not a number of tokens"):
            parse_tokens(text)


def test_fields_are_json_or_words():
    assert parse_overrides(["a=1", "b=true", "c=[1, 2]", "d=gelu"]) == {"a": 1, "b": True, "c": [1, 2], "d": "gelu"}


def test_rates_for_all_and_for_one():
    assert parse_by_arm(["3e-3", "skip=1e-3"]) == (3e-3, {"skip": 1e-3})
    assert parse_by_arm([]) == (None, {})


def test_extent():
    assert parse_extent("sotu", 50, 400) == ("sotu", 50, 400)
    assert parse_extent("a:b/c:20x10", 50, 400) == ("a:b/c", 20, 10)


def test_the_record_gives_the_config_back():
    config = PretrainConfig(
        overrides={"hidden_size": 64},
        seeds=(3, 4),
        settings=BranchSettings(expansion=2.0, init_weights="paper"),
        learning_rates={"preskip": 1e-3},
    )
    assert PretrainConfig.from_json(config.to_json()) == config
    with pytest.raises(PreskipError, match="no configuration of this"):
        PretrainConfig.from_json({"settings": {}, "model": "x"})


def test_steps_warm_up_and_rates():
    config = PretrainConfig(tokens=5_000_000, learning_rates={"skip": 1e-3}, arms=("base", "skip"))
    assert config.steps == 1221  # 5,000,000 / (32 · 128) = 1,220.7
    assert (config.warmup(1221), config.warmup(3)) == (122, 1)
    assert (config.rate("skip"), config.rate("base")) == (1e-3, 3e-3)
    assert PretrainConfig(warmup_steps=7).warmup(1000) == 7


def test_a_lone_step_that_would_train_nothing_is_refused():
    lone = {"tokens": "5k"}
    with pytest.raises(PreskipError, match=r"--tokens 5,000 is one step of 32 x 128, at the warm-up's rate of 0"):
        PretrainConfig.from_options(lone)
    assert PretrainConfig.from_options(lone, {"warmup_steps": 0}).steps == 1
    assert PretrainConfig.from_json(PretrainConfig(tokens=5000).to_json()).steps == 1  # of a stored run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"keep_checkpoints": 1}, "--keep-checkpoints 1 is not possible: it must be at least 2"),
        ({"learning_rate": 0.0}, "--lr 0.0"),
        ({"branch_rate_factor": 0}, "--branch-lr-factor 0"),
        ({"final_rate": 2.0}, "a share of the peak"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"arms": ()}, "one or more different arms"),
        ({"dtype": "float16"}, "choose one of auto, float32, bfloat16"),
        ({"eval_steps": 10, "log_steps": 3}, "multiple of --log-steps 3"),
        ({"heldout_fraction": 1.0}, "--heldout-fraction"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(PreskipError, match=message):
        PretrainConfig(**changes)

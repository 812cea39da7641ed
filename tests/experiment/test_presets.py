"""Every preset is a set of options that the command line and the configuration know."""

import json

import pytest

from preskip.arms import ARMS
from preskip.errors import PreskipError
from preskip.experiment.option_file import configured, load_options
from preskip.experiment.parse import parse_extent
from preskip.experiment.presets import PRESETS
from preskip.experiment.probe_options import ProbeConfig, parse_lora_ranks
from preskip.fields import flags


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_is_an_option(name):
    options = PRESETS[name].options
    assert set(options) <= set(flags(ProbeConfig))
    assert all(arm in ARMS for arm in options.get("arms", "none").split(","))
    for text in options.get("eval_corpora", "").split(","):
        assert not text or parse_extent(text, 2, 1)[1] >= 2


def test_a_preset_beside_a_record_of_all_options_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema_version": 2, "config": ProbeConfig().to_json()}))
    with pytest.raises(PreskipError, match=r"--preset paper: .*run.json has all options of its run: leave out one"):
        load_options(path, ProbeConfig, preset="paper")
    path.write_text('{"steps": 3}')
    assert load_options(path, ProbeConfig, preset="paper") == ({"steps": 3}, False)


def test_the_papers_protocol():
    """PAPER: lr 1e-5, 500 steps of 16 x 512 tokens, LoRA of rank 480 (d 768) or 640 (d 1024), seed 42."""
    paper = PRESETS["paper"].options
    assert (paper["steps"], paper["batch_size"], paper["seq_len"]) == (500, 16, 512)
    assert paper["lr"] == ["1e-5"]
    assert configured(ProbeConfig, {"preset": "paper"}).lora_ranks["preproj+lora"] == 64
    assert not configured(ProbeConfig, {"preset": "paper", "match": "params"}).lora_ranks
    ranks = parse_lora_ranks(paper["lora_rank"])
    assert ranks.pop("preproj+lora") == 64
    assert "lora-attention" in ranks
    assert set(ranks.values()) == {0.625}
    assert (0.625 * 768, 0.625 * 1024) == (480, 640)
    assert paper["lora_scale"] == 2
    assert paper["seeds"] == "42"

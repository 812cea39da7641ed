"""The shipped configurations, as `accelerate launch` reads them."""

import json
import shlex

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from two_processes import FSDP2, ROOT

CONFIGS = ROOT / "configs"


def launched(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["--config_file", str(CONFIGS / name), "-m", "preskip", "probe"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_ddp(monkeypatch):
    arguments = launched("ddp.yaml", monkeypatch)
    assert arguments.multi_gpu
    assert not arguments.use_fsdp
    assert not arguments.use_deepspeed
    assert (arguments.num_processes, arguments.num_machines) == (2, 1)


def test_fsdp2_sets_what_the_tests_and_the_page_set(monkeypatch):
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launched("fsdp2.yaml", monkeypatch)
    assert arguments.use_fsdp
    environment = prepare_multi_gpu_env(arguments)
    for name, value in FSDP2.items():
        assert environment[name].lower() == value.lower()
    page = (ROOT / "docs" / "distributed.md").read_text()
    exported = next(line for line in page.splitlines() if line.startswith("export ACCELERATE_USE_FSDP"))
    assert dict(part.split("=") for part in shlex.split(exported)[1:]) == FSDP2


def test_deepspeed_is_zero_2_with_everything_else_from_the_command(monkeypatch):
    arguments = launched("deepspeed_zero2.yaml", monkeypatch)
    assert arguments.use_deepspeed
    assert not arguments.zero3_init_flag
    config = HfDeepSpeedConfig(ROOT / arguments.deepspeed_config_file)
    assert config.is_zero2()
    assert not config.is_offload()
    stored = json.loads((CONFIGS / "deepspeed_zero2.json").read_text())
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert stored[name] == "auto"


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml", "deepspeed_zero2.yaml"])
def test_every_configuration_is_in_the_page(name):
    assert f"configs/{name}" in (ROOT / "docs" / "distributed.md").read_text()

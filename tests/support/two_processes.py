"""What two processes do together in the tests, and how a command is launched in two.

They train three families with DDP and with FSDP2, the frozen probe and from scratch, and read models in two halves.
`train_all` does the same trainings in a single process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, set_seed

from preskip import PreskipConfig
from preskip.train.distributed import Crew, is_main
from preskip.train.frozen import train_frozen
from preskip.train.scratch import ScratchSettings, train_scratch
from preskip.train.settings import TrainingSettings

ROOT = Path(__file__).parents[2]
FAMILIES = ("llama", "gpt_neox", "gemma3_text")
BLOCKS = np.random.default_rng(0).integers(3, 96, (16, 12)).astype(np.int32)
STEPS, BATCH = 4, 4
# What `accelerate launch --config_file configs/fsdp2.yaml` sets.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def launch(*arguments, launcher=("torch.distributed.run", "--standalone", "--nproc_per_node=2"), **environment):
    """Start two processes over gloo; returns the finished launch."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    settings |= environment
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)


def tiny_model(family: str):
    """A random model: of the family itself, or `preskip_<family>` with a branch of visible size."""
    set_seed(0)
    fields = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None}
    if "gpt_neox" not in family:
        fields |= {"num_key_value_heads": 2, "head_dim": 8}
    if family.startswith("preskip_"):
        fields |= {"preskip_init_std": 0.1, "preskip_skip_init_std": 0.05}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)


def probe(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes) -> list[dict]:
    model = tiny_model(family).to(dtype)
    model = get_peft_model(model, PreskipConfig(init_weights="paper", init_std=0.1, skip_init_std=0.05))
    options = {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 1e-2, "seed": 1}
    settings = TrainingSettings(**{**options, "save_steps": 2, **changes})
    log, checkpoints = folder / "train.jsonl", folder / "checkpoints"
    rows = train_frozen(model, BLOCKS, settings, arm="preskip", checkpoints=checkpoints, log=log)
    if is_main():
        model.save_pretrained(folder / "model")
    return rows


def scratch(family: str, folder: Path, **changes) -> list[dict]:
    model = tiny_model(f"preskip_{family}")
    options = {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 1e-2, "seed": 1}
    settings = ScratchSettings(**{**options, "warmup_steps": 1, "save_steps": 2, **changes})
    log, checkpoints = folder / "train.jsonl", folder / "checkpoints"
    rows = train_scratch(model, BLOCKS, settings, arm="preskip", checkpoints=checkpoints, log=log)
    if is_main():
        model.save_pretrained(folder / "model")
    return rows


def watch_units() -> dict[str, list[str]]:
    """Will hold the modules that FSDP made units of, for the last model of each kind."""
    from torch.distributed.fsdp import FSDPModule

    found: dict[str, list[str]] = {}
    train = Trainer.train

    def watched(trainer, *arguments, **options):
        result = train(trainer, *arguments, **options)
        modules = trainer.model.named_modules()
        kind = "probe" if hasattr(trainer.model, "peft_config") else "scratch"
        found[kind] = [path for path, module in modules if isinstance(module, FSDPModule)]
        return result

    Trainer.train = watched
    return found


def train_all(folder: Path) -> None:
    told = {}
    for family in FAMILIES:
        told[f"probe/{family}"] = probe(family, folder / "probe" / family)
        told[f"scratch/{family}"] = scratch(family, folder / "scratch" / family)
    told["probe/bf16"] = probe("llama", folder / "probe" / "bf16", torch.bfloat16, gradient_checkpointing=True)
    told["probe/accumulated"] = probe("llama", folder / "probe" / "accumulated", micro_batch_size=1)
    if is_main():
        (folder / "rows.json").write_text(json.dumps(told))


def read_in_halves(folder: Path) -> dict[str, dict]:
    """The logits of saved models under tensor parallelism, how they are split, and what they generate."""
    told = {}
    for model_folder in sorted(folder.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(model_folder, tp_plan="auto", dtype=torch.float32).eval()
        ids = torch.from_numpy(BLOCKS[:2]).long()
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        split = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        told[model_folder.name] = {"logits": logits.tolist(), "split": split, "generated": generated.tolist()}
    return told


def train_and_read(folder: Path) -> None:
    """What each of two processes does."""
    Crew("cpu")
    train_all(folder / "ddp")
    halves = read_in_halves(folder / "saved")
    os.environ |= FSDP2
    units = watch_units()
    train_all(folder / "fsdp")
    if is_main():
        (folder / "halves.json").write_text(json.dumps(halves))
        (folder / "units.json").write_text(json.dumps(units))
    torch.distributed.destroy_process_group()

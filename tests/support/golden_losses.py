"""Losses of 50 training steps of a tiny model of every architecture, to be stored and held against.

Write them anew, after a change that is meant to move them, with

    python tests/support/golden_losses.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from preskip.architecture import TYPES
from preskip.train.scratch import ScratchSettings, train_scratch

STORED = Path(__file__).parents[1] / "experiment" / "golden" / "losses.json"
STEPS, VOCABULARY = 50, 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip


def text(blocks: int = 64, length: int = 16) -> np.ndarray:
    """Token blocks of a chain in which every token is followed by one of four: there is something to learn."""
    random = np.random.default_rng(0)
    follows = random.integers(0, VOCABULARY, (VOCABULARY, 4))
    state = random.integers(0, VOCABULARY, blocks)
    columns = []
    for _ in range(length):
        columns.append(state)
        state = follows[state, random.integers(0, 4, blocks)]
    return np.stack(columns, axis=1).astype(np.uint16)


def losses(base_type: str) -> list[float]:
    """The loss of every step of a fixed, short training of `preskip_<base_type>`."""
    kind = type(AutoConfig.for_model(base_type))
    known = set(kind().to_dict()) | set(kind.attribute_map)
    sizes = {key: value for key, value in SIZES.items() if key in known or key == "pad_token_id"}
    config = AutoConfig.for_model(f"preskip_{base_type}", **{kind.attribute_map.get(k, k): v for k, v in sizes.items()})
    set_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    settings = ScratchSettings(
        steps=STEPS, batch_size=8, micro_batch_size=8, learning_rate=3e-3, warmup_steps=5, seed=1, save_steps=10 * STEPS
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = train_scratch(
            model,
            text(),
            settings,
            arm=base_type,
            checkpoints=Path(folder) / "checkpoints",
            log=Path(folder) / "train.jsonl",
        )
    return [row["loss"] for row in rows]


if __name__ == "__main__":
    STORED.parent.mkdir(exist_ok=True)
    found = {base_type: [round(loss, 6) for loss in losses(base_type)] for base_type in TYPES}
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

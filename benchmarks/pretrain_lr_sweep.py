"""Loss on development documents by learning rate, width and arm: how the best rate moves with the width.

    python benchmarks/pretrain_lr_sweep.py --corpus books --widths 64,128 --lrs 2e-3,4e-3,8e-3 --arms base,preskip \
        --tokens 600k --workers 2 --out sweep.json

Every training is a cell of `preskip pretrain` with its own schedule run to the end, one seed; the width changes the
hidden size, the MLP in proportion (8/3) and the heads (32 wide; as many to a key-value head as the shape has). Each
loss is printed and written as soon as it is there, null where the training diverged. Nothing is scored on held-out
documents.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from preskip.architecture.shapes import SHAPES
from preskip.errors import DivergedError
from preskip.experiment.cell import run_cell
from preskip.experiment.execute import processes
from preskip.experiment.parse import parse_tokens
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.run import start_run
from preskip.experiment.scratch import Scratch
from preskip.experiment.scratch_inputs import plan_arms
from preskip.runs.directory import RunDirectory
from preskip.runs.environment import describe
from preskip.runs.files import write_json
from preskip.train.distributed import Crew

HEAD = 32


def main() -> None:
    """Train every cell and print its loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="llama-1m")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--widths", help="default: the shape's own")
    parser.add_argument("--lrs", default="2e-3,4e-3,8e-3")
    parser.add_argument("--arms", default="base,preskip")
    parser.add_argument("--tokens", default="600k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokens, arms = parse_tokens(options.tokens), tuple(options.arms.split(","))
    config = PretrainConfig(
        arch=options.arch,
        corpus=options.corpus,
        arms=arms,
        seeds=(options.seed,),
        tokens=tokens,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        dtype=options.dtype,
        eval_steps=round(tokens / (options.batch_size * 128)),
        eval_blocks=256,
        eval_documents=2,
        eval_words=20,
        report_to=("none",),
    )
    with tempfile.TemporaryDirectory() as folder:
        first = start_run(config, Path(folder) / "first", [])
        config = PretrainConfig.from_json(first.manifest["config"])
        tokenizer = Scratch.prepare(first, config, False, Crew())[0].tokenizer
        cells = []
        own = SHAPES[options.arch].settings
        shared = own["num_attention_heads"] // own.get("num_key_value_heads", own["num_attention_heads"])
        for width in map(int, (options.widths or str(own["hidden_size"])).split(",")):
            for rate in map(float, options.lrs.split(",")):
                path = Path(folder) / f"{width}-{rate:g}"
                sizes = {
                    "hidden_size": width,
                    "num_attention_heads": width // HEAD,
                    "num_key_value_heads": width // HEAD // shared,
                    "intermediate_size": round(width * 8 / 3 / 8) * 8,
                }
                changed = replace(config, learning_rate=rate, overrides=sizes)
                plans = plan_arms(changed, tokenizer)
                facts = {name: {**plan.facts, "learning_rate": rate} for name, plan in plans.items()}
                run = RunDirectory.create(path, {**first.manifest, "config": changed.to_json(), "arms": facts})
                for folder_name in ("data", "tokenizer"):
                    shutil.copytree(first.path / folder_name, run.path / folder_name)
                cells += [(width, rate, arm, path) for arm in arms]
        rows: dict[int, dict[str, Any]] = {}
        about = {"settings": asdict(config) | {"directory": "."}, "environment": describe("cpu")}
        with processes(options.workers) as outcomes:
            calls = [(path, arm, options.seed) for *_, arm, path in cells]
            for index, loss in outcomes(loss_of, calls, ()):
                width, rate, arm, _ = cells[index]
                rows[index] = {"width": width, "learning_rate": rate, "arm": arm, "development_loss": loss}
                said = "diverged" if loss is None else f"{loss:.4f}"
                print(f"width {width}  lr {rate:g}  {arm:8s} {said}", flush=True)
                if options.out:
                    write_json(options.out, {**about, "rows": [rows[index] for index in sorted(rows)]})
    print(json.dumps([rows[index] for index in sorted(rows)]))


def loss_of(path: Path, arm: str, seed: int) -> float | None:
    """The development loss of a cell, None where its training diverged."""
    try:
        loss = run_cell(path, arm, seed)["final_eval_loss"]
    except DivergedError:
        return None
    assert loss is not None  # it is evaluated at the end
    return round(loss, 4)


if __name__ == "__main__":
    main()

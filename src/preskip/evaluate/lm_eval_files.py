"""lm-eval's own files of an evaluation, which its viewers and tools read.

::

    FOLDER/MODEL/results_TIME.json          as `lm-eval run --output_path FOLDER --log_samples` writes them
    FOLDER/MODEL/samples_TASK_TIME.jsonl
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.evaluate.task_loading import quiet_lm_eval
from preskip.evaluate.task_settings import TaskSettings
from preskip.runs.files import clear_disk_errors


def write_lm_eval_files(
    folder: Path,
    results: Mapping[str, Any],
    tokenizer: Any,
    *,
    model: str,
    adapter: str | None,
    settings: TaskSettings,
    about: Mapping[str, Any],
) -> None:
    """Write results and samples with lm-eval's own `EvaluationTracker`; all of them are there, or none.

    Args:
        folder: in which a folder named after the model is made.
        results: `TaskScores.lm_eval`.
        tokenizer: of the model.
        model: its name.
        adapter: its folder.
        settings: how the prompts were made.
        about: more of `config` in the results: seeds, batch size, limit, device, ...

    Raises:
        PreskipError: the disk is full, or lm-eval cannot write.
    """
    from lm_eval.loggers import EvaluationTracker

    arguments = f"pretrained={model}" + (f",peft={adapter}" if adapter else "")
    template = tokenizer.get_chat_template() if settings.apply_chat_template else None
    samples = results["samples"]
    with clear_disk_errors(folder), quiet_lm_eval():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            tracker = EvaluationTracker(output_path=temporary)
            tracker.general_config_tracker.log_experiment_args(
                model_source="hf",
                model_args=arguments,
                system_instruction=settings.system_instruction,
                chat_template=template,
                fewshot_as_multiturn=settings.multiturn,
            )
            kept = {key: value for key, value in results.items() if key != "samples"}
            config = {"model": "hf", "model_args": arguments, "gen_kwargs": settings.gen_kwargs, **about}
            tracker.save_results_aggregated({**kept, "config": config, **_tokens(tokenizer)}, samples)
            for task, rows in samples.items():
                tracker.save_results_samples(task, rows)
            # It only logs what goes wrong.
            written = [path for path in Path(temporary).rglob("*") if path.is_file()]
            if len(written) != 1 + len(samples):
                raise PreskipError(f"lm-eval could not write its samples to {folder}: is the disk full?")
            (made,) = Path(temporary).iterdir()
            shutil.move(made, folder / made.name)


def _tokens(tokenizer: Any) -> dict[str, Any]:
    """The special tokens, as lm-eval names them."""
    return {
        f"tokenizer_{kind}_token": [getattr(tokenizer, f"{kind}_token"), str(getattr(tokenizer, f"{kind}_token_id"))]
        for kind in ("pad", "eos", "bos")
    }

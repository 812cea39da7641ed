"""Nulls and controls, after the cells: what the norms by layer owe to the optimiser, and the scores to the dtype."""

from __future__ import annotations

import shutil
from typing import Any

from preskip.adapter import PreskipConfig
from preskip.analysis.depth import depth_profile, text_profile
from preskip.analysis.depth_results import norms
from preskip.arms import Arm, ArmContext, resolve_arms
from preskip.assets import weights_dtype
from preskip.evaluate.dtype_audit import dtype_audit
from preskip.experiment.frozen import Frozen
from preskip.experiment.measured import controlled, finite
from preskip.runs.directory import Cell
from preskip.runs.files import clear_disk_errors, read_json, write_json
from preskip.runs.schema import DepthRow, DtypeAudit, NullRun, Record


def run_controls(prepared: Frozen) -> Any:
    """Train the nulls and controls that the run asks for; finished ones are not repeated.

    `noise` costs seconds and is made for every arm with a branch and every seed; `shuffled` and the equal steps cost a
    training each and are made for `preskip` (without it, the first arm with a branch) and the first seed. All use the
    arm's own rate, steps and shapes.

    Returns:
        `nulls`, `equal_step` and `dtype_audit` of results.json, as far as asked for.
    """
    config = prepared.config
    arms = [arm for arm in resolve_arms(config.arms) if has_branch(arm, prepared.context)]
    arms.sort(key=lambda arm: arm.name != "preskip")
    parts: dict[str, Any] = {}
    notes: list[str] = []
    if not arms and (config.nulls or config.equal_step):
        notes.append("no arm has a branch: nulls and trainings with equal steps, which are of branches, were not made")
    nulls: dict[str, dict[str, list[NullRun]]] = {}
    for null in config.nulls:
        chosen, seeds = (arms, config.seeds) if null == "noise" else (arms[:1], config.seeds[:1])
        nulls[null] = {}
        for arm in chosen:
            runs: list[NullRun] = []
            for seed in seeds:
                with controlled(notes, f"{null} null of {arm.name}, seed {seed}"):
                    runs.append({"seed": seed, "layers": norms(_control(prepared, arm.name, seed, null, control=null))})
            if runs:
                nulls[null][arm.name] = runs
    if nulls:
        parts["nulls"] = nulls
    if config.equal_step and arms:
        arm, seed = arms[0], config.seeds[0]
        with controlled(notes, f"control with equal steps of {arm.name}"):
            rows = _control(prepared, arm.name, seed, "equal_step", equal_step=True)
            parts["equal_step"] = {arm.name: {str(seed): rows}}
    if config.dtype_audit:
        with controlled(notes, "audit of dtypes"):
            parts["dtype_audit"] = _dtype_audit(prepared)
    if notes:
        parts["notes"] = notes
    return parts


def has_branch(arm: Arm, context: ArmContext) -> bool:
    """Whether one of the arm's adapters is a Preskip branch; to be asked while the base is untouched."""
    return any(isinstance(config, PreskipConfig) for config in arm.configs(context))


def _dtype_audit(prepared: Frozen) -> DtypeAudit:
    """The untouched base in each dtype on what the arms are scored on, audited now or read from the run."""
    done = prepared.run.path / "controls" / "dtype-audit.json"
    if not done.is_file():
        config = prepared.config
        found = dtype_audit(
            prepared.model_name,
            prepared.tokenizer,
            texts=prepared.heldout.texts,
            suite=prepared.heldout.suite,
            device=config.device,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            revision=prepared.run.manifest["model"]["revision"],
            batch_tokens=config.eval_batch_tokens,
            known=_known(prepared),
            quiet=prepared.quiet,
        )
        write_json(done, finite(found.report))
    return read_json(done)


def _known(prepared: Frozen) -> dict[str, list[Record]]:
    """What arm `none` has got in the run's dtype on what the audit scores, if it has all of it."""
    heldout, config = prepared.heldout, prepared.config
    cell = prepared.run.cell("none", config.seeds[0])
    if not cell.is_done or weights_dtype(prepared.base) != config.dtype:
        return {}
    scored = {*(text.name for text in heldout.texts), *(heldout.suite.sets if heldout.suite else ())}
    records = [record for record in cell.load()[1] if record["set"] in scored]
    return {config.dtype: records} if {record["set"] for record in records} == scored else {}


def _control(prepared: Frozen, arm: str, seed: int, name: str, **control: Any) -> list[DepthRow]:
    """Depth rows of one control, trained now or read from the run."""
    cell: Cell = prepared.run.control(name, arm, seed)
    if cell.is_done:
        return read_json(cell.summary)["depth"]
    with clear_disk_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    with prepared.build(arm, seed) as built:
        prepared.train(built, arm, seed, cell, f"{name} {arm}", **control)
        # Of the nulls only the norms say something.
        base = prepared.base
        depth = text_profile(base, prepared.heldout.texts[0]) if name == "equal_step" else depth_profile(base, [])
        finite(depth)
    write_json(cell.summary, {"arm": arm, "seed": seed, "control": name, "depth": depth})
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return depth

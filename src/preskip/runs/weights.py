"""Where trained weights lie: in a run's arm, in adapter folders (one, or several stacked), or a baked checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.model_types import PREFIX
from preskip.runs.directory import RunDirectory
from preskip.runs.files import read_config, read_json
from preskip.runs.schema import Manifest, NullRun

ADAPTER_CONFIG = "adapter_config.json"
# Of an arm that trains the base's own weights: all of them that it trained.
OWN_WEIGHTS = "own_weights.safetensors"
PEFT_TYPE = "PRESKIP"


def adapter_folders(folder: Path) -> list[Path]:
    """The saved adapters of a folder: itself, or those stacked in its sub-folders 1, 2, ..., first to last.

    Args:
        folder: as saved by PEFT's `save_pretrained`, or by `preskip.arms.insert.Inserted.save`.

    Returns:
        Folders with an adapter_config.json; none where there is no adapter.

    Raises:
        PreskipError: one of the stacked adapters is missing, or they are no stack: adapters of one type with numbers
            for names.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return [folder]
    numbers = {int(path.parent.name) for path in folder.glob(f"*/{ADAPTER_CONFIG}") if path.parent.name.isdecimal()}
    missing = set(range(1, max(2, *numbers) + 1)) - numbers if numbers else set()
    if missing:
        raise PreskipError(f"adapter {folder} holds stacked adapters, but number {min(missing)} is missing")
    parts = [folder / str(number) for number in sorted(numbers)]
    kinds = [read_config(part / ADAPTER_CONFIG).get("peft_type") for part in parts]
    if len(set(kinds)) < len(kinds):  # what is stacked is of different types
        names = ", ".join(part.name for part in parts)
        raise PreskipError(f"adapter {folder} holds {len(parts)} adapters, {names}: give one of them, e.g. {parts[0]}")
    return parts


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights are, and what is known of them.

    Attributes:
        kind: "run", "adapter" or "baked".
        name: of the run or the folder.
        weights: a folder of an adapter, or of several stacked ones, or a checkpoint folder.
        is_checkpoint: whether `weights` is a whole model.
        arm: name of the arm, in a run.
        seed: of its training, in a run.
        run: the run that the weights lie in, or None.
        manifest: its run.json, or None.
    """

    kind: str
    name: str
    weights: Path
    is_checkpoint: bool
    arm: str | None = None
    seed: int | None = None
    run: Path | None = None
    manifest: Manifest | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The options of the run, or {}."""
        return self.manifest["config"] if self.manifest else {}

    @property
    def directory(self) -> Path:
        """Where the run was started."""
        return Path(self.manifest.get("directory", ".") if self.manifest else ".")

    @property
    def dtype(self) -> str:
        """Of the base's weights: as the run had them (from scratch they are float32 always), else "auto"."""
        return "float32" if self.run is not None and self.is_checkpoint else self.config.get("dtype", "auto")

    @property
    def base(self) -> str | None:
        """The model that the adapter was trained on, as recorded and as far as known; a checkpoint's own folder."""
        if self.is_checkpoint:
            return str(self.weights)
        return self.config.get("model") or _configs(self.weights)[0].get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        """The base's, where it is a model on the Hub that a run has loaded."""
        model: Any = self.manifest.get("model", {}) if self.manifest else {}
        return model.get("revision")

    @property
    def others(self) -> list[str]:
        """PEFT types of the adapters that stay on beside the branch."""
        return [] if self.is_checkpoint else [kind for kind in _types(self.weights) if kind != PEFT_TYPE]

    @property
    def null(self) -> list[NullRun]:
        """The noise nulls of the arm, {"seed", "layers"}; none where the run has trained none."""
        path = None if self.run is None else self.run / "results.json"
        if path is None or self.arm is None or not path.is_file():
            return []
        return ((read_json(path).get("nulls") or {}).get("noise") or {}).get(self.arm) or []


def find_source(path: Path, *, arm: str | None = None, seed: int | None = None) -> Source:
    """Find out what a folder holds.

    Args:
        path: a run directory, an adapter folder or a baked checkpoint.
        arm: of a run; None is the reference arm if it has a branch, else the first that has.
        seed: of that arm; None is the first.

    Raises:
        PreskipError: none of these, no branch in it, or an arm or seed that is not there.
    """
    if not path.is_dir():
        raise PreskipError(f"{path} does not exist or is no folder: give a run, an adapter or a baked checkpoint")
    if (path / "run.json").is_file():
        return _in_run(path, arm, seed)
    if arm is not None or seed is not None:
        raise PreskipError(f"--arm and --seed are for runs, and {path} is none: leave them out")
    if adapter_folders(path):
        return _adapter(path)
    if (path / "config.json").is_file():
        return _checkpoint(path)
    raise PreskipError(
        f"{path} has no run.json, adapter_config.json or config.json: give a run, an adapter or a baked checkpoint"
    )


def trained_context(folder: Path) -> int | None:
    """The tokens at once with which a run from scratch scored its own model, RUN/arms/ARM/seed-N/model; None of others.

    What its config calls its positions may be many times what it was trained on.
    """
    place = folder.expanduser().resolve()
    if place.name != "model" or len(place.parents) < 4 or not (record := place.parents[3] / "run.json").is_file():
        return None
    manifest = read_json(record)
    config = manifest.get("config") or {}
    return config.get("context_length") or config.get("seq_len") if manifest.get("kind") == "pretrain" else None


def _in_run(path: Path, arm: str | None, seed: int | None) -> Source:
    run = RunDirectory.open(path)
    manifest = run.manifest
    known = sorted(manifest.get("arms") or {}) or sorted(folder.name for folder in path.glob("arms/*"))
    if arm is not None and arm not in known:
        raise PreskipError(f"run {path} has no arm {arm!r}: choose one of {', '.join(known) or 'none'}")
    done: dict[str, dict[int, Path]] = {}
    for cell in sorted(path.glob("arms/*/seed-*/cell.json")):
        number = cell.parent.name.removeprefix("seed-")
        weights = _branch_in(cell.parent) if number.isdecimal() else None  # not of a copy, "seed-1 (copy)"
        if weights is not None:
            done.setdefault(cell.parent.parent.name, {})[int(number)] = weights
    if not done:
        raise PreskipError(f"run {path} has no finished arm with a branch: finish it, or give another run")
    if arm is None:
        family = manifest.get("family")
        declared = [row["arm"] for row in family["declared"]] if family else []
        arm = next(name for name in [*declared, *(manifest.get("arms") or ()), *done] if name in done)
    if arm not in done:
        why = "has no branch" if any(path.glob(f"arms/{arm}/seed-*/cell.json")) else "is not finished"
        raise PreskipError(f"arm {arm} of {path} {why}: choose one of {', '.join(done)}")
    seeds = done[arm]
    order = [number for number in manifest.get("seeds") or [] if number in seeds] or sorted(seeds)
    if seed is not None and seed not in seeds:
        raise PreskipError(
            f"arm {arm} of {path} has no finished seed {seed}: choose one of {', '.join(map(str, sorted(seeds)))}"
        )
    chosen = order[0] if seed is None else seed
    return Source(
        kind="run",
        name=path.resolve().name,
        weights=seeds[chosen],
        is_checkpoint=seeds[chosen].name == "model",
        arm=arm,
        seed=chosen,
        run=path,
        manifest=manifest,
    )


def _branch_in(cell: Path) -> Path | None:
    """The weights of a cell that have a branch, or None."""
    adapter, model = cell / "adapter", cell / "model" / "config.json"
    if PEFT_TYPE in _types(adapter):
        return adapter
    return model.parent if model.is_file() and _has_branch(read_config(model)) else None


def _has_branch(config: dict[str, Any]) -> bool:
    """Whether a model's config has a branch in any layer; with peers alone (`preskip.peers`) it has none."""
    return str(config.get("model_type")).startswith(PREFIX) and config.get("preskip_layers") != []


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The configurations of the adapters of a folder, first to last; none where there is no adapter."""
    return [read_config(part / ADAPTER_CONFIG) for part in adapter_folders(folder)]


def _types(folder: Path) -> list[str]:
    return [str(config.get("peft_type")) for config in _configs(folder)]


def _adapter(path: Path) -> Source:
    kinds = _types(path)
    if PEFT_TYPE not in kinds:
        raise PreskipError(
            f"{path} holds a {' and a '.join(kinds)} adapter, which has no branch: give a Preskip adapter"
        )
    # A run, or a folder in it, may be reached through a link: first as it is named, then where it lies.
    for place in (path.absolute(), path.resolve()):
        match place.parts[-4:]:
            case ("arms", arm, seed, _) if (
                re.fullmatch(r"seed-\d+", seed) and (place.parents[3] / "run.json").is_file()
            ):
                run = place.parents[3]
                return Source(
                    kind="adapter",
                    name=run.name,
                    weights=path,
                    is_checkpoint=False,
                    arm=arm,
                    seed=int(seed.removeprefix("seed-")),
                    run=run,
                    manifest=RunDirectory.open(run).manifest,
                )
    return Source(kind="adapter", name=path.resolve().name, weights=path, is_checkpoint=False)


def _checkpoint(path: Path) -> Source:
    config = read_config(path / "config.json")
    if not _has_branch(config):
        kind = config.get("model_type")
        raise PreskipError(f"{path} is a {kind} model, which has no branch: give a baked checkpoint or an adapter")
    return Source(kind="baked", name=path.resolve().name, weights=path, is_checkpoint=True)

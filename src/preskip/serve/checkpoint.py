"""A checkpoint folder before any engine opens it: whole, of ours, and how much memory it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.attach import CHILD
from preskip.errors import PreskipError, explained, one_line
from preskip.model_types import PREFIX
from preskip.runs.files import read_json

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint holds.

    Attributes:
        folder: where it lies.
        config: transformers' config of it.
        dtype: of its weights, as the config says.
        weight_bytes: of all tensors.
        branch_bytes: of those of the branches.
        branches: their paths in the tensors' names, e.g. `model.layers.0.self_attn.preskip`.
        cache_bytes: of one token's keys and values in all layers, in `dtype`.
    """

    folder: Path
    config: Any
    dtype: str
    weight_bytes: int
    branch_bytes: int
    branches: tuple[str, ...]
    cache_bytes: int

    @property
    def weight_ratio(self) -> float:
        """Weight bytes over the base's."""
        return self.weight_bytes / (self.weight_bytes - self.branch_bytes)

    def weight_bytes_in(self, dtype: str) -> int:
        """Of all tensors once they are cast; int8 branches, which are not cast alike, are taken as the rest."""
        return self._cast(self.weight_bytes, dtype)

    def cache_bytes_in(self, dtype: str) -> int:
        """Of one token's keys and values in all layers, in the dtype that is computed in."""
        return self._cast(self.cache_bytes, dtype)

    def _cast(self, size: int, dtype: str) -> int:
        import torch

        return size * getattr(torch, dtype).itemsize // getattr(torch, self.dtype).itemsize


def examine(folder: Path) -> Facts:
    """Read a checkpoint's config and the heads of its weight files.

    Raises:
        PreskipError: it is no `preskip_<type>` checkpoint in safetensors, a file is missing or cut short, or a layer's
            branch is not in it.
    """
    kind = str(read_json(folder / "config.json").get("model_type"))
    if not kind.startswith(PREFIX):
        raise PreskipError(f"{folder} is a {kind} model without a branch: serve it with vLLM itself")
    from transformers import AutoConfig

    with explained(lambda error: f"{folder}/config.json cannot be read ({one_line(error, 200)})"):
        config: Any = AutoConfig.from_pretrained(folder)
    if config.preskip_peers:
        raise PreskipError(f"{folder} has {', '.join(config.preskip_peers)} in its blocks, which no engine would run")
    sizes = dict(_tensor_sizes(folder))
    layers = config.preskip_layers
    with_branch = {f"{key.partition(f'.{CHILD}.')[0]}.{CHILD}" for key in sizes if f".{CHILD}." in key}
    expected = config.num_hidden_layers if layers is None else len(layers)
    if len(with_branch) != expected:
        raise PreskipError(
            f"{folder} holds {len(with_branch)} of {expected} branches: the checkpoint is incomplete, bake it again"
        )
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    import torch

    from preskip.arms.flops import cache_width

    return Facts(
        folder=folder,
        config=config,
        dtype=dtype,
        weight_bytes=sum(sizes.values()),
        branch_bytes=sum(size for key, size in sizes.items() if f".{CHILD}." in key),
        branches=tuple(sorted(with_branch)),
        cache_bytes=cache_width(config) * getattr(torch, dtype).itemsize,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        PreskipError: there is none, or the index names one that is missing.
    """
    if (folder / _INDEX).is_file():
        files = [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise PreskipError(f"{file} does not exist: the checkpoint is incomplete, bake it again")
    return files


def _tensor_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Bytes of each tensor; safetensors holds a file's head against its length, and maps tensors without a copy."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with (
            explained(lambda error, file=file: f"{file} is damaged or cut short ({error}): bake it again"),  # type: ignore[misc]
            safe_open(file, framework="pt") as source,
        ):
            for key in source.keys():  # noqa: SIM118
                yield key, source.get_tensor(key).nbytes


def without_branch(folder: Path, out: Path) -> Path:
    """Write the base that a checkpoint was baked from: the same tensors without the branches, under the base's type.

    Args:
        folder: a baked checkpoint.
        out: a new folder.

    Returns:
        `out`.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    config = read_json(folder / "config.json")
    base = {key: value for key, value in config.items() if not key.startswith(PREFIX) and key != "auto_map"}
    base["model_type"] = config["model_type"].removeprefix(PREFIX)
    base["architectures"] = [name.removeprefix("Preskip") for name in config["architectures"]]
    (out / "config.json").write_text(json.dumps(base, indent=1))
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as source:
            kept = {key: source.get_tensor(key) for key in source.keys() if f".{CHILD}." not in key}  # noqa: SIM118
        save_file(kept, out / file.name, metadata={"format": "pt"})
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        index["weight_map"] = {key: name for key, name in index["weight_map"].items() if f".{CHILD}." not in key}
        (out / _INDEX).write_text(json.dumps(index))
    for file in folder.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())
    return out

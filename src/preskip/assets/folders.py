"""A local checkpoint in a folder: what is refused before transformers reads it, and its checksum."""

import hashlib
import json
from pathlib import Path

from preskip.assets.cache import file_sha256
from preskip.errors import PreskipError, one_line

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Beyond so many bytes a checksum of all would delay every run by tens of seconds: it is of the ends of files then.
_LARGEST_HASHED = 8 << 30
_END = 1 << 20

# transformers would put it on the model without a word, and the untouched base would be something else.
HOLDS_ADAPTER = (
    "model {} also holds an adapter (adapter_config.json): move the adapter's files into a folder of their own, and "
    "give that with --adapter"
)


def check_folder(path: Path) -> None:
    """Look at a local checkpoint before transformers does, whose own errors span many lines.

    Raises:
        PreskipError: it is no checkpoint of a model in safetensors, or not whole.
    """
    config = path / "config.json"
    if not config.is_file():
        if (path / "adapter_config.json").is_file():
            raise PreskipError(f"model folder {path} holds a PEFT adapter, not a model: give its base model")
        if (path / "run.json").is_file() and (path / "arms").is_dir():
            raise PreskipError(
                f"model folder {path} is a run, not a model: give what a cell of it trained, arms/ARM/seed-N/model in "
                "it, or the base model and arms/ARM/seed-N/adapter with --adapter"
            )
        raise PreskipError(f"model folder {path} has no config.json: give a folder saved with save_pretrained")
    if (path / "adapter_config.json").is_file():
        raise PreskipError(HOLDS_ADAPTER.format(path))
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PreskipError(f"{config} is not valid JSON ({error}): get it again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise PreskipError(f"{config} names no model_type: give a folder saved with save_pretrained")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        if pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
            raise PreskipError(
                f"model folder {path} has only pickle weights ({pickles[0]}), which can run code when loaded and are "
                f"refused: convert them with save_pretrained to safetensors"
            )
        raise PreskipError(f"model folder {path} has no *.safetensors weights: get the whole checkpoint")
    for file in weights:
        _check_safetensors(file)
    _check_shards(path)


def _check_shards(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise PreskipError(f"{index} is not a valid safetensors index ({error}): get it again") from error
    if absent := [shard for shard in shards if not (path / shard).is_file()]:
        raise PreskipError(f"model folder {path} lacks {absent[0]}, which {index.name} names: get the whole checkpoint")


def _check_safetensors(file: Path) -> None:
    """Read the header, which safetensors holds against the file's length, so that a cut file is found at once."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise PreskipError(f"{file} is corrupt or truncated ({one_line(error, 120)}): get it again") from error


def folder_sha256(path: Path) -> str:
    """Return the checksum over a folder's config and weights, each by name and content.

    Of more than 8 GiB it is over names, sizes, and the first and last megabyte of each file: another training changes
    these, too.
    """
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    is_large = sum(file.stat().st_size for file in files) > _LARGEST_HASHED
    digest = hashlib.sha256()
    for file in files:
        mark = _ends_sha256(file) if is_large else file_sha256(file)
        digest.update(f"{file.name} {mark}\n".encode())
    return digest.hexdigest()


def _ends_sha256(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as source:
        first = source.read(_END)
        source.seek(max(0, size - _END))
        return hashlib.sha256(b"%d " % size + first + source.read()).hexdigest()

"""A GGUF file as an ordinary model: dequantised, without the quantisation marks that forbid training and saving."""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.assets.loaded import check_loaded
from preskip.errors import PreskipError, explained, one_line

if TYPE_CHECKING:
    import torch

# Written last into a converted folder: which GGUF it came from and the bytes of each file.
RECORD = "preskip.json"


def load_gguf(path: Path, dtype: "torch.dtype", attn_implementation: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Load a GGUF file dequantised, as a model that can be trained and saved, with transformers' loading report.

    Args:
        path: the file.
        dtype: dtype of the weights.
        attn_implementation: as in transformers; None leaves its default.

    Raises:
        PreskipError: no such file, corrupt or truncated, or an architecture that transformers cannot read.
    """
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    check_readable(path)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if hasattr(transformers, "GgufConfig"):
        # Where a GGUF kernel is installed, newer versions would keep the weights packed, which cannot be trained on.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with explained(partial(_explain, path)), quiet_transformers(), _no_dequantising_bar():
        auto: Any = AutoModelForCausalLM
        loaded, report = auto.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True, **options
        )
        # The loaded object still counts as quantised and saves under GGUF's names: start a fresh one.
        config = type(loaded.config).from_dict(
            {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        )
        if hasattr(loaded.config, "_attn_implementation"):
            config._attn_implementation = loaded.config._attn_implementation
        config.dtype = dtype
        with no_init_weights():
            model = type(loaded)(config)
        # Weights bring their dtype; buffers that are not stored, as the rotary frequencies, stay in float32.
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
    return model.eval(), report


def load_gguf_config(path: Path) -> Any:
    """Load the config inside a GGUF file.

    Raises:
        PreskipError: no such file, corrupt or truncated, or an architecture that transformers cannot read.
    """
    from transformers import AutoConfig

    check_readable(path)
    with explained(partial(_explain, path)), quiet_transformers():
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def load_gguf_tokenizer(path: Path) -> Any:
    """Load the tokenizer inside a GGUF file.

    Raises:
        PreskipError: no such file, corrupt or truncated, or a tokenizer that transformers cannot read.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    check_readable(path)
    with explained(partial(_explain, path)), quiet_transformers(), _no_dequantising_bar():
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        if _pre_tokenizer_name(path) == "smollm":
            # transformers drops SmolLM's split into single digits; without it spaces before a number differ.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
    return tokenizer


def convert_gguf(path: Path, folder: Path, sha256: str) -> None:
    """Write a GGUF file's model and tokenizer as a safetensors folder in float32, with a record of where it came from.

    Args:
        path: the GGUF file.
        folder: an existing empty folder.
        sha256: checksum of the GGUF file, for the record.

    Raises:
        PreskipError: the file cannot be read, or the disk is full.
    """
    import torch

    model, report = load_gguf(path, torch.float32)
    check_loaded(path.name, model, report)
    tokenizer = load_gguf_tokenizer(path)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if shutil.disk_usage(folder).free < needed + 50_000_000:
        raise PreskipError(
            f"cache {folder}: {needed / 1e6:.0f} MB are needed for the converted model and the disk has less: free "
            f"some space, or point PRESKIP_CACHE at another folder"
        )
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / RECORD).write_text(json.dumps({"gguf_sha256": sha256, "files": files}, indent=2) + "\n", encoding="utf-8")


def is_converted(folder: Path, sha256: str) -> bool:
    """Say whether a folder is a whole conversion of the GGUF file with this checksum."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == sha256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' and the Hub client's warnings and progress bars off the terminal for a while."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_level = hub_logging.get_verbosity()
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)  # several lines for each of its retries without a network
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_readable(path: Path) -> None:
    """Refuse what is no GGUF file.

    Raises:
        PreskipError: it is not there, may not be read, or holds something else.
    """
    if not path.is_file():
        raise PreskipError(f"GGUF file {path} does not exist: check the path")
    if not os.access(path, os.R_OK):
        raise PreskipError(f"GGUF file {path} cannot be read: check its permissions")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise PreskipError(f"{path} is not a GGUF file (its first bytes are not GGUF): get it again")


def _explain(path: Path, error: Exception) -> str:
    """What a reader of untrusted bytes raised, in one line that names the file."""
    text = one_line(error)
    if isinstance(error, ImportError) and importlib.util.find_spec("gguf") is None:
        return f"GGUF file {path}: reading it needs gguf, which is not installed: pip install 'preskip[train]'"
    if isinstance(error, (MemoryError, ImportError)):
        raise error
    if "not supported" in text or isinstance(error, NotImplementedError):
        return f"GGUF file {path}: transformers cannot read this kind of model ({text[:160]})"
    return f"GGUF file {path} is corrupt or truncated ({type(error).__name__}: {text[:120]}): get it again"


def _pre_tokenizer_name(path: Path) -> str | None:
    """Return the GGUF's name for its pre-tokenizer: a string field, key then type 8, length (u64), bytes."""
    with open(path, "rb") as file:
        head = file.read(16 << 20)
    key = b"tokenizer.ggml.pre" + struct.pack("<I", 8)
    at = head.find(key)
    if at < 0:
        return None
    at += len(key)
    length = int.from_bytes(head[at : at + 8], "little")
    return head[at + 8 : at + 8 + min(length, 64)].decode("utf-8", errors="replace")


@contextlib.contextmanager
def _no_dequantising_bar() -> Iterator[None]:
    """Hide the one progress bar of transformers that its own switch does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar

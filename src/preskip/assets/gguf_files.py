"""A GGUF file as an ordinary model: dequantised, without the quantisation marks that forbid training and saving."""

import contextlib
import importlib
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
from preskip.progress import say

if TYPE_CHECKING:
    import torch

# Metadata and names of tensors come first in the file; of the largest vocabularies they take some 20 MB.
_HEADER_BYTES = 64 << 20
# Linear layers, as llama.cpp names them.
_WITH_BIAS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Of byte-level vocabularies, by llama.cpp's names: digits stand alone, the rest is cut as GPT-2 does.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# Cut as GPT-2 does, which is what transformers does with a name that it does not know.
_AS_GPT2 = {
    *("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "trillion"),
    *("a.x-4.0", "granite-docling", "roberta-bpe", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
}
# Written last into a converted folder: which GGUF it came from and the bytes of each file.
RECORD = "preskip.json"


def load_gguf(path: Path, dtype: "torch.dtype", attn_implementation: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Load a GGUF file dequantised, as a model that can be trained and saved, with transformers' loading report.

    Args:
        path: the file.
        dtype: dtype of the weights.
        attn_implementation: as in transformers; None leaves its default.

    Raises:
        PreskipError: no such file, corrupt or truncated, an architecture that transformers cannot read, or scaled
            positions or biases that it leaves out.
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
    _refuse_lost_scaling(path, config)
    _refuse_lost_biases(path, model)
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
        PreskipError: no such file, corrupt or truncated, or a tokenizer that transformers cannot read, or reads as
            another one.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    check_readable(path)
    with explained(partial(_explain, path)), quiet_transformers(), _no_dequantising_bar():
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        head = _header(path)
        name = _text_field(head, "tokenizer.ggml.pre")
        if name in _SINGLE_DIGITS:
            # transformers drops the split into single digits; without it spaces before a number differ, too.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
    if _text_field(head, "tokenizer.ggml.model") == "gpt2":
        _check_pre_tokenizer(path, name)
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


def _refuse_lost_scaling(path: Path, config: Any) -> None:
    """Refuse a file whose rotary frequencies are scaled where the config that transformers made of it has them plain.

    Llama 3.1 and later have their scaling as a tensor, others as metadata; transformers reads it of few.
    """
    head = _header(path)
    kind = _text_field(head, f"{_text_field(head, 'general.architecture')}.rope.scaling.type")
    tensors = [name for name in ("rope_freqs.weight", "rope_factors_long.weight") if _has_name(head, name)]
    parameters: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Of one kind for all layers, or one for each kind of layer.
    kinds = {one.get("rope_type") for one in (parameters, *parameters.values()) if isinstance(one, dict)}
    if (tensors or kind not in (None, "none")) and kinds <= {None, "default"}:
        raise PreskipError(
            f"GGUF file {path} scales its positions ({tensors[0] if tensors else f'rope.scaling.type {kind}'}), which "
            "transformers leaves out: use the model's own safetensors"
        )


def _refuse_lost_biases(path: Path, model: Any) -> None:
    """Refuse a file whose linear layers have biases where the model that transformers made of it has none."""
    head = _header(path)
    stored = [f"blk.0.{part}.bias" for part in _WITH_BIAS if _has_name(head, f"blk.0.{part}.bias")]
    if stored and not any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise PreskipError(
            f"GGUF file {path} has biases ({stored[0]}), which transformers leaves out: use the model's own safetensors"
        )


def _check_pre_tokenizer(path: Path, name: str | None) -> None:
    """Refuse a byte-level vocabulary whose text transformers would cut otherwise than its merges were learned."""
    known = _splits_of_transformers()
    if name is None:
        say(f"GGUF file {path} does not say how text is cut before its merges: it is cut as GPT-2 does")
    elif known is not None and name not in known | _SINGLE_DIGITS | _AS_GPT2:
        raise PreskipError(
            f"GGUF file {path}: transformers does not know the pre-tokenizer {name!r}, and would cut text as GPT-2 "
            "does: use the model's own safetensors and tokenizer.json"
        )


def _splits_of_transformers() -> set[str] | None:
    """The pre-tokenizers that transformers knows; None of a version that has no table of them."""
    try:
        mapping = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:
        return None
    return set(getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", ())) or None


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEADER_BYTES)


def _has_name(head: bytes, name: str) -> bool:
    """Whether a tensor of this name is in a GGUF's header: length (u64), bytes."""
    return struct.pack("<Q", len(name)) + name.encode() in head


def _text_field(head: bytes, name: str) -> str | None:
    """A string of a GGUF's metadata: key, then type 8, length (u64), bytes; None where it is not there."""
    key = name.encode() + struct.pack("<I", 8)
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

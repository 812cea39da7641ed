"""Flags: those of a settings class, made out of its fields, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, cast, get_origin, get_type_hints

from cyclopts import Group, Parameter

from preskip.errors import PreskipError
from preskip.experiment.options import ExperimentConfig
from preskip.experiment.presets import preset_options
from preskip.fields import Flag, about, flags, refusal

F = TypeVar("F", bound=Callable[..., None])
_HEADINGS = ("What", "Model", "Training", "Scoring", "How much", "A planned design", "Branch", "Evaluation", "Output")
GROUPS = {heading: Group.create_ordered(heading) for heading in _HEADINGS}


def refuse_unused(
    command: Callable[..., None], values: Mapping[str, Any], needs: Mapping[str, tuple[bool, Sequence[str]]]
) -> None:
    """Refuse options that were given and would have no effect.

    Args:
        command: whose signature has their defaults.
        values: of its parameters, such as `locals()` at its beginning.
        needs: by the end of the sentence (`for_other`): whether what is needed is there, and the parameters that need
            it.

    Raises:
        PreskipError: with the option and what it is for.
    """
    defaults = inspect.signature(command).parameters
    for complaint, (is_there, names) in needs.items():
        for name in names:
            if not is_there and values[name] != defaults[name].default:
                raise PreskipError(f"--{name.replace('_', '-')} {complaint}")


def for_other(option: str) -> str:
    """What `refuse_unused` says of an option that serves another."""
    return f"is for {option}: give that, too, or leave it out"


def flag(
    help: str = "",
    group: str = "",
    *,
    name: str | None = None,
    hint: type = str,
    is_list: bool = False,
    **bounds: Any,
) -> Parameter:
    """One flag of a command.

    Args:
        help: one sentence.
        group: heading that it stands under in `--help`.
        name: where it is not the parameter's.
        hint: type of the bounded value.
        is_list: one text holds several values, so that a second one would lose those of the first: it is refused.
        bounds: see `preskip.fields.option`; without any, what holds of the value is checked elsewhere.
    """
    what = {"hint": hint, "optional": True, **bounds}

    def validate(_: Any, value: Any) -> None:
        if why := refusal(value, what):
            raise PreskipError(why)

    more: dict[str, Any] = {"group": GROUPS[group]} if group else {}
    return Parameter(
        name=name,
        help=help,
        validator=validate if bounds else None,
        negative=() if name else None,
        allow_repeating=not is_list,
        **more,
    )


def chosen_context(asked: int | None, own: int | None, most: int) -> int:
    """Tokens read at once: as asked, else what the model reads, at most so many.

    Args:
        asked: `--context-length`, or None.
        own: the model's positions; None where it has no limit.
        most: unless more are asked for.

    Raises:
        PreskipError: fewer than 1, or more than the model reads.
    """
    if asked is None:
        return min(own or most, most)
    if asked < 1:
        raise PreskipError(f"--context-length {asked}: must be 1 or more")
    if own is not None and asked > own:
        raise PreskipError(f"--context-length {asked}: the model reads at most {own}")
    return asked


def of_experiment(name: str, group: str, help: str | None = None) -> Parameter:
    """The flag of every experiment's field `name`, for a command that is none."""
    what = about(ExperimentConfig)[name]
    bounds = {key: value for key, value in what.items() if key in ("least", "choices", "hint")}
    return flag(help or what["help"], group, **bounds)


def options_of(kind: type) -> Callable[[F], F]:
    """Decorate a command: its `**given` become the flags of a settings class. It gets those alone that were given."""

    def decorate(command: F) -> F:
        hints = get_type_hints(command, include_extras=True)
        every = inspect.signature(command).parameters.values()
        own = [parameter for parameter in every if parameter.kind is not parameter.VAR_KEYWORD]
        preset = preset_options(kind, [])  # which always applies
        made = [_parameter(its, preset.get(its.name, its.default)) for its in flags(kind).values()]
        signature = inspect.Signature(sorted((*made, *own), key=lambda parameter: parameter.kind))

        @wraps(command)
        def call(*args: Any, **options: Any) -> None:
            command(**signature.bind(*args, **options).arguments)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {**hints, **{parameter.name: parameter.annotation for parameter in made}}
        return cast(F, call)

    return decorate


def _parameter(its: Flag, default: Any) -> inspect.Parameter:
    what = its.about
    hint: Any = str if "read" in what else what["hint"]
    if isinstance(default, tuple):
        default = ",".join(map(str, default)) or None
    # Where something has imported pydantic, Cyclopts holds the default against the type, too.
    if default is None:
        hint = Optional[hint]
    elif hint is str:
        default = str(default)
    return inspect.Parameter(
        its.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD if what.get("positional") else inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            Optional[list[str]] if what.get("many") else hint,
            flag(what["help"], what.get("group", ""), is_list=get_origin(what["hint"]) is tuple),
        ],
    )


Model = Annotated[str, flag("smollm2 (embedded), a Hub id, a folder, a GGUF file.")]
Base = Annotated[Optional[str], flag("The adapter's base. Default: what the run or the adapter names.", "What")]
TextColumn = Annotated[Optional[str], of_experiment("text_column", "What")]
CorpusSplit = Annotated[
    Optional[str],
    of_experiment("corpus_split", "What", "Split of a Hub data set or a folder of tables. Default: test, if any."),
]
DataDir = Annotated[Optional[Path], of_experiment("data_dir", "What")]
SampleSeed = Annotated[int, flag("Seed of the samples.", "What", hint=int, least=0)]
Dtype = Annotated[str, of_experiment("dtype", "Scoring")]
DtypeOfRun = Annotated[str, of_experiment("dtype", "Scoring", "Base weights: auto (the run's), float32, bfloat16, ...")]
Device = Annotated[str, of_experiment("device", "Scoring")]
AttnImplementation = Annotated[Optional[str], of_experiment("attn_implementation", "Scoring")]
BatchTokens = Annotated[Optional[int], of_experiment("eval_batch_tokens", "Scoring")]
TrustRemoteCode = Annotated[bool, of_experiment("trust_remote_code", "Scoring")]
Json = Annotated[bool, flag("Print one JSON document, without progress.", "Output", name="--json")]

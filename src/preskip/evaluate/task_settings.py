"""How lm-eval makes the prompts of its tasks: options named as lm-eval names them; importable in no time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.fields import about, option, refusal

_GROUP = "Evaluation"


def _as_it_is(value: Any) -> Any:
    return value


def _absolute(path: Any) -> Any:
    """A run is resumed from any folder; what is no path is left to the check."""
    return str(Path(path).expanduser().absolute()) if isinstance(path, str) else path


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """lm-eval's own options of the same names, for all tasks of an evaluation.

    Raises:
        PreskipError: a value is out of range, or two options contradict each other.
    """

    include_path: str | None = option(None, "Folder of your own lm-eval task files.", _GROUP, read=_absolute)
    num_fewshot: int | None = option(
        None, "Examples in the prompt; a task that fixes 0 keeps it. Default: the task's own.", _GROUP, least=0
    )
    apply_chat_template: bool = option(False, "Put prompts into the tokenizer's chat template.", _GROUP)
    system_instruction: str | None = option(None, "Text before every prompt, as system message of a chat.", _GROUP)
    fewshot_as_multiturn: bool | None = option(
        None, "Examples as turns of the chat. Default: with --apply-chat-template.", _GROUP
    )
    gen_kwargs: str | None = option(None, "Of generation: max_gen_toks=64,temperature=0.7,do_sample=True.", _GROUP)

    def __post_init__(self) -> None:
        for name, what in about(type(self)).items():
            if why := refusal(getattr(self, name), what):
                raise PreskipError(f"--{name.replace('_', '-')} {why}")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise PreskipError("--fewshot-as-multiturn needs --apply-chat-template")

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> TaskSettings:
        """The settings that options give, as texts or values by name."""
        known = about(cls)
        return cls(**{name: known[name].get("read", _as_it_is)(value) for name, value in given.items()})

    @property
    def multiturn(self) -> bool:
        """Whether examples are turns of a chat."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def check_special_tokens(self, are_split: bool) -> None:
        """Refuse a chat template where special tokens are read as ordinary text.

        Raises:
            PreskipError: both are asked for.
        """
        if are_split and self.apply_chat_template:
            raise PreskipError(
                "--split-special-tokens reads a chat template's marks as text: leave out one of it and "
                "--apply-chat-template"
            )

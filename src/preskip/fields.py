"""A settings field written once: default, help, group, range and flag, for checks, command line and files alike."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

F = TypeVar("F", bound=Callable[[type], Any])

_BOUNDS = {
    "least": (">=", operator.ge),
    "above": (">", operator.gt),
    "most": ("<=", operator.le),
    "below": ("<", operator.lt),
}
_KINDS = {bool: "choose true or false", int: "it must be a whole number", float: "it must be a number"}
_KINDS |= {str: "it must be a text"}


def _once(function: F) -> F:
    """`functools.cache`, under which type checkers lose the signature."""
    return cache(function)  # type: ignore[return-value]


def option(default: Any, help: str | None = None, group: str | None = None, **about: Any) -> Any:
    """A dataclass field that is an option, too. What a subclass leaves out, be it all but the default, it inherits.

    Args:
        default: of the field.
        help: one sentence, shown by `--help`.
        group: heading that it stands under there.
        about: any of `least`, `above`, `most`, `below` (bounds of a number), `choices`, `allowed` (these in other
            words), `flag` (where it is not the field's name), `read` (makes the value out of a text or of what a file
            holds), `many` (repeatable: `read` takes a list), `parts` (a settings class whose fields are options of
            their own), `key` (of such a part in its field), `path` (it may be a path), `positional`,
            `serves` (without effect unless another option is used: what one gives for that, the field, and the value
            that it then has, where not any).
    """
    metadata = about | ({"help": help} if help else {}) | ({"group": group} if group else {})
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@_once
def about(kind: type) -> dict[str, dict[str, Any]]:
    """What `option` says of the fields of a class; "hint" is the type without None, "optional" whether it has None."""
    found: dict[str, dict[str, Any]] = {}
    for base in reversed(kind.__mro__):
        for own in fields(base) if is_dataclass(base) else ():
            found.setdefault(own.name, {}).update(own.metadata)
    hints = get_type_hints(kind)
    for name, what in found.items():
        allowed = get_args(hints[name])
        optional = type(None) in allowed
        what |= {"hint": allowed[0] if optional else hints[name], "optional": optional}
    return found


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag of a settings class.

    Attributes:
        name: with underscores.
        field: that its value goes to.
        part: its key there, where the field is made of parts.
        default: None where there is none to show.
        about: see `about`.
    """

    name: str
    field: str
    part: str | None = None
    default: Any = None
    about: Mapping[str, Any]


@_once
def flags(kind: type) -> dict[str, Flag]:
    """Every flag of a settings class, by name."""
    found = []
    for own in fields(kind):
        what, default = about(kind)[own.name], None if own.default is MISSING else own.default
        if what.get("help"):
            found.append(Flag(name=what.get("flag", own.name), field=own.name, default=default, about=what))
        for part in fields(what["parts"]) if "parts" in what else ():
            its = about(what["parts"])[part.name]
            shown = getattr(default, part.name, part.default)
            found.append(Flag(name=part.name, field=own.name, part=its.get("key", part.name), default=shown, about=its))
    return {flag.name: flag for flag in found}


def allowed(what: Mapping[str, Any]) -> str:
    """The values that a field may have, as half a sentence."""
    if "allowed" in what:
        return what["allowed"]
    if "choices" in what:
        return f"choose one of {', '.join(what['choices'])}"
    bounds = [f"{sign} {what[name]}" for name, (sign, _) in _BOUNDS.items() if name in what]
    if not bounds:
        return _KINDS.get(what["hint"], "give a value, or leave it out")
    return "it must be " + (" and ".join(bounds) if bounds[1:] or "least" not in what else f"at least {what['least']}")


def refusal(value: Any, what: Mapping[str, Any]) -> str | None:
    """Why a field may not have this value; None where it may."""
    if is_allowed(value, what):
        return None
    wrong = f"{value!r} is unknown" if "choices" in what else f"{value} is not possible"
    return f"{wrong}: {allowed(what)}"


def is_allowed(value: Any, what: Mapping[str, Any]) -> bool:
    """Whether a value has the field's type and lies within its bounds; what is no number, text or truth is."""
    hint = what["hint"]
    if value is None or hint not in _KINDS:
        return value is not None or what["optional"]
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, (int, float) if hint is float else hint):
        return False
    if hint in (int, float) and not abs(value) <= sys.float_info.max:  # nor NaN
        return False
    inside = all(holds(value, what[name]) for name, (_, holds) in _BOUNDS.items() if name in what)
    return inside and value in what.get("choices", (value,))

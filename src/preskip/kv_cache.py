"""The K/V cache under the names that transformers has for it: `cache` since 5.24, `past_key_values` before.

Until 5.40 the old name is still taken, with a warning.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any


@functools.cache
def cache_name() -> str:
    """What the installed transformers calls it, in the arguments of a model and in its output."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache that a pass was given under either name, or None."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache

"""Stored values that are equal, numbers but for a tolerance."""

from typing import Any

import pytest


def assert_close(found: Any, expected: Any, at: str = "", *, rel: float, abs: float = 0.0, more: bool = False) -> None:
    """Equal in all that is expected, part by part; with `more` dictionaries may hold other keys beside."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys() if more else expected.keys() == found.keys(), at
        for key in expected:
            assert_close(found[key], expected[key], f"{at}/{key}", rel=rel, abs=abs, more=more)
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{at}/{index}", rel=rel, abs=abs, more=more)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=abs), at
    else:
        assert found == expected, at

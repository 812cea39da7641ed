"""The real vLLM (`make test-serve`): every engine start takes up to minutes on a processor; the end is a table."""

from __future__ import annotations

import importlib.util
import os

import pytest

IS_THERE = importlib.util.find_spec("vllm") is not None
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if "/real/" in str(item.path):
            item.add_marker(pytest.mark.skipif(not IS_THERE, reason="vLLM is not installed: make test-serve"))
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A tiny random checkpoint of each case and its base, made once."""
    from real_vllm import save_case

    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(case):
        if case not in made:
            made[case] = save_case(case, root)
        return made[case]

    return get


def pytest_terminal_summary(terminalreporter):
    from real_vllm import FOUND, table

    if FOUND:
        terminalreporter.write_line("")
        for line in table():
            terminalreporter.write_line(line)

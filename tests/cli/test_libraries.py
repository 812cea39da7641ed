"""Loading the libraries: no collection of garbage meanwhile, and none of what they have made afterwards."""

import gc
import subprocess
import sys

import pytest

from preskip.cli.libraries import loading_libraries

FRESH = """
import gc
from preskip.cli.libraries import loading_libraries
with loading_libraries(quiet=True):
    assert not gc.isenabled()
    import torch
first = gc.get_freeze_count()
assert gc.isenabled()
with loading_libraries(quiet=True):
    kept = [[] for _ in range(1000)]
print(first, gc.get_freeze_count() - first)
"""


def test_what_they_have_made_is_set_aside_once():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    first, later = map(int, done.stdout.split())
    assert first > 100_000
    assert later <= 0  # what goes out of use leaves


def test_garbage_is_collected_again_after_a_failure():
    before = gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError), loading_libraries(quiet=True):
        raise ModuleNotFoundError
    assert gc.isenabled()
    assert gc.get_freeze_count() <= before

"""Importing torch, transformers and PEFT, which is most of the time of a short command."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from preskip.progress import quiet_libraries, spinner


@contextmanager
def loading_libraries(*, quiet: bool) -> Iterator[None]:
    """Import, in a block, what is heavy: shown as a step, with the libraries' notices off.

    No garbage is collected meanwhile, and the million objects that are there afterwards are set aside for good: the
    collections of every training, and that at the end of the process, would walk over them all. In a process that has
    torch already, such as a test's, objects that nobody holds may lie about, and nothing is set aside.

    Args:
        quiet: show nothing.
    """
    is_first = "torch" not in sys.modules
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with spinner("loading libraries", quiet=quiet):
            quiet_libraries()
            yield
        if is_first:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()

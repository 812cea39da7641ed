"""How a worker process begins, before the libraries are loaded: their notices are kept off the terminal from the start.

A spawned process imports what its first function stands in before it calls it, so this module imports no library.
"""

from __future__ import annotations

import os
import threading
import time

from preskip.progress import quiet_libraries


def set_up(threads: int, parent: int) -> None:
    """The libraries' notices off the terminal; the process's end where the run's dies; its share of the cores.

    Args:
        threads: to compute with.
        parent: id of the run's process.
    """

    def watch() -> None:
        # A run that was killed can be resumed at once: nobody else may be training its cells then.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    quiet_libraries()
    import torch

    torch.set_num_threads(threads)

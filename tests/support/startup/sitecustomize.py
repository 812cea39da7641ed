"""Read by every interpreter that a test starts: torch and PEFT are imported in 3.5 s of CPU instead of 5.7.

Collecting garbage while their million objects are made, and again at the end, is the rest. No result depends on it.
"""

import atexit
import gc

gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)

"""Hidden states kept on the disk, a file per batch with its checksum.

Processes may share the folder: a file is written beside its place and renamed, and all write the same bits under one
name. What is missing, cut short or damaged is computed again, so nothing here has to be brought to the disk at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preskip.progress import say
from preskip.runs.files import TEMPORARY

# Free bytes that are left on the disk for checkpoints and results.
RESERVE = 512 * 2**20
# Checksum of all that follows, and the length of the JSON that stands before the numbers.
_HEAD = struct.Struct("<II")


class KeptStates:
    """Hidden states by name.

    Args:
        folder: made when the first is kept.
        quiet: do not say that no more can be kept.
        reserve: free bytes that are left on the disk.

    Attributes:
        is_open: whether more can be kept; not once the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, quiet: bool = False, reserve: int = RESERVE) -> None:
        self.folder, self.quiet, self.reserve, self.is_open = folder, quiet, reserve, True

    def size(self) -> int:
        """Bytes that are kept."""
        return sum(path.stat().st_size for path in self.folder.glob("[!.]*"))

    def load(self, name: str) -> tuple[torch.Tensor, int] | None:
        """What was given to `save`, on the CPU; None where it is not there whole."""
        try:
            with (self.folder / name).open("rb") as file:
                checksum, length = _HEAD.unpack(file.read(_HEAD.size))
                size = os.fstat(file.fileno()).st_size - _HEAD.size - length
                head = file.read(length)
                about = json.loads(head)
                dtype = getattr(torch, about["dtype"])
                if math.prod(about["shape"]) * dtype.itemsize != size:
                    return None
                # Memory of torch's own: products may round otherwise where they read from another alignment.
                states = torch.empty(about["shape"], dtype=dtype)
                numbers = _bytes_of(states)
                if file.readinto(numbers) != size or zlib.crc32(numbers, zlib.crc32(head)) != checksum:  # type: ignore
                    return None
                return states, about["parts"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, struct.error):
            return None

    def save(self, name: str, states: torch.Tensor, parts: int) -> None:
        """Keep hidden states [B, T, d]; where the disk does not take them, say so once and keep no more.

        Args:
            name: of the file.
            states: on any device.
            parts: length of the tuple that they came in, 0 for none.
        """
        if not self.is_open:
            return
        states = states.detach().cpu().contiguous()
        about = {"shape": list(states.shape), "dtype": str(states.dtype).removeprefix("torch."), "parts": parts}
        head, numbers = json.dumps(about).encode(), _bytes_of(states)
        temporary = self.folder / f".{name}.{os.getpid()}{TEMPORARY}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < numbers.nbytes + self.reserve:
                raise OSError(f"less than {self.reserve >> 20} MiB would be left on the disk")
            with temporary.open("wb") as file:
                file.write(_HEAD.pack(zlib.crc32(numbers, zlib.crc32(head)), len(head)))  # type: ignore[arg-type]
                file.write(head)
                file.write(numbers)  # type: ignore[arg-type]
            os.replace(temporary, self.folder / name)
        except OSError as error:
            self.is_open = False
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            say(
                f"no more states of frozen layers are kept in {self.folder} ({error.strerror or error}): these layers "
                "are computed in every pass",
                quiet=self.quiet,
            )


def _bytes_of(states: torch.Tensor) -> np.ndarray[Any, Any]:
    return states.view(-1).view(torch.uint8).numpy()

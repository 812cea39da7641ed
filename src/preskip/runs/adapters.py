"""Where the saved adapters of a folder lie: one, or several that were trained stacked."""

from __future__ import annotations

from pathlib import Path

from preskip.errors import PreskipError

ADAPTER_CONFIG = "adapter_config.json"


def adapter_folders(folder: Path) -> list[Path]:
    """The saved adapters of a folder: itself, or those stacked in its sub-folders 1, 2, ..., first to last.

    Args:
        folder: as saved by PEFT's `save_pretrained`, or by `preskip.arms.insert.Inserted.save`.

    Returns:
        Folders with an adapter_config.json; none where there is no adapter.

    Raises:
        PreskipError: one of the stacked adapters is missing.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return [folder]
    numbers = {int(path.parent.name) for path in folder.glob(f"*/{ADAPTER_CONFIG}") if path.parent.name.isdecimal()}
    missing = set(range(1, max(2, *numbers) + 1)) - numbers if numbers else set()
    if missing:
        raise PreskipError(f"adapter {folder} holds stacked adapters, but number {min(missing)} is missing")
    return [folder / str(number) for number in sorted(numbers)]

"""Names of models, corpora and folders as a run records them, found again from wherever it is read."""

from __future__ import annotations

from pathlib import Path

from preskip.assets import EMBEDDED_MODELS
from preskip.data.corpus import EMBEDDED_CORPORA
from preskip.data.splits import PUBLISHED


def locate(name: str, directory: Path) -> str:
    """A recorded name; a path that does not exist here is one of the folder that the run was started in.

    Args:
        name: a path, a Hub id, or the name of an embedded or published one, which no path can stand for.
        directory: where the run was started.
    """
    path = directory / name
    is_named = name in EMBEDDED_MODELS or name in EMBEDDED_CORPORA or name in PUBLISHED
    return str(path) if path.exists() and not Path(name).exists() and not is_named else name

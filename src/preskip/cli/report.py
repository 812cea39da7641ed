"""`preskip report`: make a run's HTML page and model cards again from its stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from preskip.cli.options import Json, flag


def report(
    run: Annotated[Path, flag("A run directory.")],
    *,
    as_json: Json = False,
) -> None:
    """Make RUN/report.html, and the model cards of what was trained, again from the stored results."""
    from preskip.report import build_report, write_cards

    write_cards(run)  # they need no extra, the page does
    page = build_report(run)
    print(json.dumps({"report": str(page)}) if as_json else page)

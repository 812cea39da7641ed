"""`preskip report`: make a run's HTML page again from its stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the page's path as JSON.")] = False,
) -> None:
    """Make RUN/report.html again from the stored results."""
    from preskip.report import build_report

    page = build_report(run)
    print(json.dumps({"report": str(page)}) if as_json else page)

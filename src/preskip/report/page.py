"""The self-contained HTML page of a run, from run.json, results.json and the training logs alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.report import facts, rows, verdicts
from preskip.report.claims import assess, power_text
from preskip.report.explain_page import explain_section, find_explains
from preskip.report.figures import make_figures, trend_rows
from preskip.report.frontier import assess_plane, planes
from preskip.report.load import Curve, load_curves, load_json, short
from preskip.report.lookup import is_pretraining, trained_arms
from preskip.report.plots.training import POINTS_PER_CURVE
from preskip.report.render import render, require_extra, write_page

DEPTH_SECTIONS = ("depth", "norms", "ablation")


def build_report(run: Path) -> Path:
    """Write RUN/report.html and return its path.

    The page opens offline from the file itself and makes no request: plots, style and scripts are inside, and a content
    security policy forbids anything else. The file is replaced atomically.

    Args:
        run: a run directory (schema_version 2) with run.json and results.json; training logs are shown where there are
            any, and what `preskip explain` measured: of the first arm in full, of the others as links.

    Raises:
        PreskipError: a file is missing, damaged or of another schema, the directory cannot be written, or the extra
            `report` is missing.
    """
    run = Path(run)
    record, results = load_json(run / "run.json"), load_json(run / "results.json")
    require_extra()
    try:
        curves = load_curves(run, results)
        explains = find_explains(run, results)
        section = explain_section(explains) if explains else None
        content = {**_content(run, record, results, curves), "explain": section.content if section else None}
        figures, data = make_figures(results, curves), {"run": record, "results": results}
        if section:
            figures, data = [*figures, *section.figures], {**data, "explain": section.data}
        content["has_depth"] = bool(content["trends"]) or any(f["section"] in DEPTH_SECTIONS for f in figures)
        html = render("report.html.j2", content, figures, data, section.bypass_map if section else None)
    except PreskipError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise PreskipError(
            f"{run}: run.json or results.json lacks what the report needs ({type(error).__name__}: {short(error)}): "
            f"run `preskip {record.get('kind') or 'probe'} --resume {shlex.quote(str(run))}` to write them again"
        ) from error
    return write_page(run / "report.html", html)


def _content(
    run: Path, record: Mapping[str, Any], results: Mapping[str, Any], curves: Sequence[Curve]
) -> dict[str, Any]:
    comparisons = results["comparisons"]
    trained = trained_arms(results)
    seeds = max((len(results["arms"][arm]["seeds"]) for arm in trained), default=1)
    groups = rows.arm_columns(results)
    return {
        "eyebrow": "Preskip report",
        "title": f"{record['model']['name']} on {record['corpus']['name']}",
        "file_name": "preskip-run.json",
        "status": record["status"],
        "version": record["preskip_version"],
        "created": record["created"],
        "planes": [assess_plane(results, home, abroad) for home, abroad in planes(results)] if comparisons else [],
        "claims": [_with_power(claim) for claim in assess(record, results)],
        "scoreboard": rows.scoreboard(results),
        "scope": verdicts.scope(comparisons, seeds),
        "family": facts.family_text(results),
        "declared": facts.declared_text(results),
        "several_seeds": seeds > 1,
        "confidence": _confidence(comparisons),
        "groups": groups,
        "arms": rows.arm_rows(results, record, groups),
        "costs": rows.cost_rows(results, record),
        "sizes": rows.size_rows(results),
        "from_scratch": is_pretraining(results),
        "sets": facts.set_rows(results),
        "comparisons": rows.comparison_groups(results),
        "power": rows.power_rows(results),
        "paper": rows.paper_rows(results),
        "search": rows.search_rows(results),
        "search_summary": rows.search_summary(results),
        "trends": trend_rows(results),
        "has_nulls": any((results.get("nulls") or {}).values()),
        "thinned": any(len(curve.lines) > POINTS_PER_CURVE for curve in curves),
        "crowded": len(trained) > 4,
        "facts": facts.facts(record),
        "command": shlex.join(record["command"]),
        "resume": f"preskip {record.get('kind') or 'probe'} --resume {shlex.quote(str(run))}",
        "settings": facts.settings(record),
        "limits": facts.limits(record, results, seeds),
    }


def _with_power(claim: Mapping[str, Any]) -> dict[str, Any]:
    return {**claim, "parts": [{**part, "power": power_text(part)} for part in claim["parts"]]}


def _confidence(comparisons: Sequence[Mapping[str, Any]]) -> str:
    levels = sorted({entry["confidence"] for entry in comparisons})
    return " and ".join(f"{100 * level:g} %" for level in levels) or "95 %"

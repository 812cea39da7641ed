"""The self-contained HTML page of a run, from run.json, results.json and the training logs alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preskip.report import comparison_tables, search_tables, tables
from preskip.report.diagrams import arm_lines
from preskip.report.explain.page import explain_section, find_explains
from preskip.report.load import Curve, clear_errors, load_curves, load_run, resume_command
from preskip.report.lookup import is_pretraining, trained_arms
from preskip.report.render import render, require_extra
from preskip.report.words import facts, verdicts
from preskip.report.words.answer import answer
from preskip.report.words.claims import assess, parts_text, power_text
from preskip.report.words.frontier import assess_plane, planes
from preskip.runs.files import write_bytes
from preskip.runs.schema import Manifest, Results

DEPTH_SECTIONS = ("depth", "norms", "ablation")


def build_report(run: Path) -> Path:
    """Write RUN/report.html and return its path.

    The page opens offline from the file itself and makes no request: plots, style and scripts are inside, and a content
    security policy forbids anything else. The file is replaced atomically.

    Args:
        run: a run directory with run.json and results.json; training logs are shown where there are any, and what
            `preskip explain` measured: of the first arm in full, of the others as links.

    Raises:
        PreskipError: a file is missing, damaged or of another schema, the directory cannot be written, or the extra
            `report` is missing.
    """
    run = Path(run)
    record, results = load_run(run)
    require_extra()
    from preskip.report.figures import make_figures

    with clear_errors(run, "the report needs", remedy=f": run `{resume_command(run)}` to write them again"):
        curves = load_curves(run, results)
        explains = find_explains(run, results)
        section = explain_section(explains) if explains else None
        content = {**_content(run, record, results, curves), "explain": section.content if section else None}
        figures = make_figures(results, curves) + (section.figures if section else [])
        data = {"run": record, "results": results, **({"explain": section.data} if section else {})}
        content["has_depth"] = bool(content["trends"].rows) or any(f["section"] in DEPTH_SECTIONS for f in figures)
        html = render("report.html.j2", content, figures, data, section.bypass_map if section else None)
    write_bytes(run / "report.html", html.encode(), mode=0o644)  # a report is there to be passed on
    return run / "report.html"


def _content(run: Path, record: Manifest, results: Results, curves: Sequence[Curve]) -> dict[str, Any]:
    from preskip.report.plots.training import MOST_RAW, POINTS_PER_CURVE

    comparisons = results["comparisons"]
    trained = trained_arms(results)
    seeds = max((len(results["arms"][arm]["seeds"]) for arm in trained), default=1)
    levels = sorted({entry["confidence"] for entry in comparisons})
    groups = tables.arm_columns(results)
    detail, other_detail = comparison_tables.detail_tables(results)
    harm = record["config"]["lr_harm"] if record["config"].get("lr_rule") == "frontier" else None
    return {
        "eyebrow": "Preskip report",
        "title": f"{record['model']['name']} on {record['corpus']['name']}",
        "file_name": "preskip-run.json",
        "status": record["status"],
        "version": record["preskip_version"],
        "created": record["created"],
        "answer": answer(results),
        "model_source": record["model"].get("source") or "",
        "lines": arm_lines(record, results),
        "declared_rows": comparison_tables.declared_table(results),
        "planes": [assess_plane(results, in_domain, out_of_domain) for in_domain, out_of_domain in planes(results)]
        if comparisons
        else [],
        "claims": [
            {
                **claim,
                "counted": parts_text(claim),
                "parts": [{**part, "power": power_text(part)} for part in claim["parts"]],
            }
            for claim in assess(record, results)
        ],
        "scoreboard": comparison_tables.scoreboard(results),
        "scope": verdicts.scope(comparisons, seeds),
        "family": facts.family_text(results),
        "declared": facts.declared_text(results),
        "several_seeds": seeds > 1,
        "one_training": any(entry["seeds"] == 1 for entry in comparisons),
        "confidence": " and ".join(f"{100 * level:g} %" for level in levels) or "95 %",
        "groups": groups,
        "headings": ["Weights", "Rate", *(f"{g['title']}: {m['name']}" for g in groups for m in g["metrics"])],
        "arms": tables.arm_rows(results, record, groups),
        "costs": tables.cost_table(results, record),
        "sizes": tables.size_table(results),
        "from_scratch": is_pretraining(results),
        "sets": tables.set_table(results),
        "comparisons": comparison_tables.comparison_groups(results),
        "power": comparison_tables.power_table(results),
        "detail": detail,
        "other_detail": other_detail,
        "paper": tables.paper_table(results),
        "paper_model": results["paper"]["model"] if results.get("paper") else None,
        "search": search_tables.search_table(results),
        "equal_harm": search_tables.equal_harm_table(results, harm) if harm is not None else None,
        "harm": harm,
        "rates": search_tables.rates_table(results),
        "trace": search_tables.trace_table(results),
        "trends": tables.trend_table(results),
        "has_nulls": any((results.get("nulls") or {}).values()),
        "thinned": any(len(curve.lines) > POINTS_PER_CURVE for curve in curves),
        "raw_losses": seeds == 1 and len(trained) <= MOST_RAW,
        "facts": facts.facts(record),
        "command": shlex.join(record["command"]),
        "resume": resume_command(run),
        "settings": facts.settings(record),
        "limits": facts.limits(record, results, seeds),
    }

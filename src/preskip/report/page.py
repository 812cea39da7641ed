"""The self-contained HTML page of a run, from run.json, results.json and the training logs alone."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from preskip.errors import PreskipError
from preskip.report import plots, verdicts
from preskip.version import __version__

if TYPE_CHECKING:
    from markupsafe import Markup

SCHEMA_VERSION = 1
TEMPLATES = Path(__file__).parent / "templates"


def build_report(run: Path) -> Path:
    """Write RUN/report.html and return its path.

    The page opens offline from the file itself and makes no request: plots, style and scripts are inside, and a content
    security policy forbids anything else. The file is replaced atomically.

    Args:
        run: a run directory (schema_version 1) with run.json and results.json; training logs are shown where there are
            any.

    Raises:
        PreskipError: a file is missing, damaged or of another schema, the directory cannot be written, or the extra
            `report` is missing.
    """
    run = Path(run)
    record, results = _load(run / "run.json"), _load(run / "results.json")
    try:
        curves = _curves(run, results)
        html = _render(run, record, results, curves)
    except PreskipError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise PreskipError(
            f"{run}: run.json or results.json lacks what the report needs ({type(error).__name__}: {_short(error)}): "
            f"run `preskip probe --resume {shlex.quote(str(run))}` to write them again"
        ) from error
    return _write(run / "report.html", html)


def _load(path: Path) -> dict[str, Any]:
    remedy = f"finish the run with `preskip probe --resume {shlex.quote(str(path.parent))}`"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise PreskipError(f"{path.parent} is not a directory: give a run directory of `preskip probe`") from None
        raise PreskipError(f"{path} is missing: {remedy}, or give another run directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PreskipError(f"{path} cannot be read ({_short(error)}): check the file") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PreskipError(f"{path} is not valid JSON ({_short(error)}): {remedy}") from None
    if not isinstance(value, dict):
        raise PreskipError(f"{path} holds a {type(value).__name__}, not an object: {remedy}")
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise PreskipError(
            f"{path} has schema_version {version!r}, this preskip {__version__} reads {SCHEMA_VERSION}: "
            "use the preskip version that wrote the run"
        )
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


def _curves(run: Path, results: Mapping[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(arm, seed, lines) of every training log that the results name."""
    curves = []
    for arm, summary in results["arms"].items():
        for seed in summary["seeds"]:
            path = run / "arms" / arm / f"seed-{seed}" / "train.jsonl"
            lines = _lines(path) if path.is_file() else []
            if lines:
                curves.append((arm, str(seed), lines))
    return curves


def _lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PreskipError(f"{path} cannot be read ({_short(error)}): check the file") from None
    for place, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line, parse_constant=lambda _: None)  # a NaN loss is a gap in the curve
            lines.append({"step": int(entry["step"]), "loss": _finite(entry.get("loss"))})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PreskipError(
                f"{path} line {place} is damaged ({_short(error)}): run the arm again, or move the file away to "
                "report without it"
            ) from None
    return lines


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _render(
    run: Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
    curves: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]],
) -> str:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise _missing_extra(error) from None
    figures = _figures(results, curves)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    bundle = _vega_bundle()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    data = {"run": record, "results": results}
    return environment.get_template("report.html.j2").render(
        **_context(run, record, results, curves, figures),
        style=Markup(style),
        bundle=Markup(bundle),
        script=Markup(script),
        script_hashes=Markup(" ".join(_script_hash(text) for text in (bundle, script))),
        specs=_embedded({figure["key"]: figure["spec"] for figure in figures}, Markup),
        data=_embedded(data, Markup),
    )


def _missing_extra(error: ImportError) -> PreskipError:
    return PreskipError(
        f"the report needs {error.name or 'a package'}, which is not installed: run pip install 'preskip[report]'"
    )


@functools.lru_cache(maxsize=1)
def _vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of the Vega-Lite version that Altair writes for."""
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise _missing_extra(error) from None
    wanted = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    offered = vl_convert.get_vegalite_versions()
    make_bundle: Callable[..., str] = vl_convert.javascript_bundle  # its stub lacks the default of `snippet`
    bundle = make_bundle(vl_version=wanted if wanted in offered else offered[-1])
    # Inside a script element only these end or nest it; in JavaScript strings the backslash changes nothing.
    # The parser turns "\r" into "\n", which would change the hash in the policy.
    return bundle.replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _embedded(value: Any, markup: type[Markup]) -> Markup:
    """JSON that no content can break out of a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only
    return markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _script_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _figures(
    results: Mapping[str, Any], curves: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]
) -> list[dict[str, Any]]:
    """The plots of the page: key, section, title, a description in words for who cannot see it, and the
    specification.
    """
    try:
        import altair  # noqa: F401
    except ImportError as error:
        raise _missing_extra(error) from None
    comparisons = results["comparisons"]
    arms = [arm for arm, summary in results["arms"].items() if summary["trainable_parameters"]]
    figures = []
    for metric in dict.fromkeys(entry["metric"] for entry in comparisons):
        named = verdicts.metric_named(metric)
        figures.append(
            {
                "key": f"forest-{metric}",
                "section": "comparisons",
                "title": named.name,
                "note": "lower is better" if named.lower_is_better else "higher is better",
                "alt": "; ".join(verdicts.sentence(entry) for entry in comparisons if entry["metric"] == metric),
                "spec": plots.forest(plots.forest_records(comparisons, metric), metric),
            }
        )
    if curves:
        last = "; ".join(
            f"{arm}, seed {seed}: {smooth:.3f}"
            for arm, seed, lines in curves
            if (smooth := plots.smoothed([line["loss"] for line in lines])[-1]) is not None
        )
        figures.append(
            {
                "key": "training",
                "section": "training",
                "title": "Training loss",
                "note": "",
                "alt": f"Smoothed training loss at the last step: {last}",
                "spec": plots.training(plots.training_records(curves), arms),
            }
        )
    titles = {
        "skip_to_attention": "Functional size of the skip",
        "enrichment": "Change of the attention's input",
        "skip_norm": "Norm of the skip's weight",
    }
    for measure, title in titles.items():
        records = plots.depth_records(results.get("depth") or {}, measure)
        if records:
            first, last_layer = min(r["layer"] for r in records), max(r["layer"] for r in records)
            largest = max(records, key=lambda r: r["value"])
            figures.append(
                {
                    "key": f"depth-{measure}",
                    "section": "depth",
                    "title": title,
                    "note": "",
                    "alt": f"{plots.DEPTH_MEASURES[measure]} for layers {first} to {last_layer}; largest at layer "
                    f"{largest['layer']} ({largest['value']:.3g}, {largest['arm']}, seed {largest['seed']})",
                    "spec": plots.depth(records, arms, measure),
                }
            )
    return figures


def _context(
    run: Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
    curves: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]],
    figures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    comparisons = results["comparisons"]
    seeds = max(
        (len(summary["seeds"]) for summary in results["arms"].values() if summary["trainable_parameters"]), default=1
    )
    model, corpus, environment = record["model"], record["corpus"], record["environment"]
    evaluation = results["evaluation"]
    return {
        "title": f"{model['name']} on {corpus['name']}",
        "status": record["status"],
        "version": record["preskip_version"],
        "created": record["created"],
        "verdicts": verdicts.verdicts(comparisons),
        "scope": verdicts.scope(comparisons, seeds),
        "several_seeds": seeds > 1,
        "confidence": _confidence(comparisons),
        "arms": [_arm_row(name, summary, record["arms"].get(name, {})) for name, summary in results["arms"].items()],
        "evaluation": evaluation,
        "evaluation_text": _evaluation_text(evaluation),
        "comparisons": [_comparison_row(entry) for entry in comparisons],
        "figures": figures,
        "thinned": any(len(lines) > plots.POINTS_PER_CURVE for _, _, lines in curves),
        "facts": _facts(record, model, corpus, environment),
        "command": shlex.join(record["command"]),
        "resume": f"preskip probe --resume {shlex.quote(str(run))}",
        "settings": [
            (name, _settings_text(arm))
            for name, arm in record["arms"].items()
            if arm.get("settings") or arm.get("description")
        ],
        "limits": _limits(record, results, seeds),
    }


def _confidence(comparisons: Sequence[Mapping[str, Any]]) -> str:
    levels = sorted({entry["confidence"] for entry in comparisons})
    return " and ".join(f"{100 * level:g} %" for level in levels) or "95 %"


def _arm_row(name: str, summary: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    metrics = summary["metrics"]
    step, peak, rate = (summary.get(k) for k in ("seconds_per_step", "peak_memory_bytes", "learning_rate"))
    cells = [
        {
            "sort": summary["trainable_parameters"],
            "value": verdicts.number(summary["trainable_parameters"], 0),
            "interval": "",
        },
        {"sort": rate, "value": "–" if rate is None else f"{rate:g}", "interval": ""},
    ]
    for key in ("bits_per_byte", "word_perplexity", "last_word_accuracy"):
        shown = verdicts.interval_text(key, metrics.get(key))
        cells.append(
            {"sort": metrics[key]["value"], **shown} if shown else {"sort": None, "value": "–", "interval": ""}
        )
    cells += [
        {"sort": step, "value": "–" if step is None else f"{step:.3g} s", "interval": ""},
        {"sort": peak, "value": _bytes(peak), "interval": ""},
    ]
    return {
        "name": name,
        "description": arm.get("description") or "",
        "seeds": ", ".join(str(seed) for seed in summary["seeds"]),
        "cells": cells,
    }


def _comparison_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    p = entry.get("p_value")
    discordant = ""
    if entry.get("gained") is not None and entry.get("lost") is not None:
        discordant = f"{entry['gained']} gained, {entry['lost']} lost"
    return {
        "metric": verdicts.metric_named(entry["metric"]).name,
        "pair": f"{entry['arm']} {verdicts.MINUS} {entry['reference']}",
        "outcome": verdicts.outcome(entry),
        **verdicts.difference_text(entry),
        "units": f"{entry['units']:,} {entry['unit']}s",
        "clusters": f"in {entry['clusters']:,} documents" if entry.get("clusters") else "",
        "seeds": entry["seeds"],
        "p": "–" if p is None else ("< 0.0001" if p < 0.0001 else f"{p:.2g}"),
        "discordant": discordant,
    }


def _evaluation_text(evaluation: Mapping[str, Any]) -> str:
    text = (
        f"{evaluation['documents']:,} held-out documents, {evaluation['tokens']:,} scored tokens, "
        f"{evaluation['bytes']:,} bytes, "
        f"{evaluation['words']:,} words; context {evaluation['context_length']:,} tokens, stride "
        f"{evaluation['stride']:,}"
    )
    if evaluation.get("last_word_items"):
        text += f"; {evaluation['last_word_items']:,} items of {evaluation.get('last_word_name') or 'last word'}"
    return text


def _facts(
    record: Mapping[str, Any], model: Mapping[str, Any], corpus: Mapping[str, Any], environment: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str]]]]:
    timings = record.get("timings") or {}
    versions = ("python", "torch", "transformers", "peft")
    groups: list[tuple[str, list[tuple[str, Any]]]] = [
        (
            "Model",
            [
                ("Name", model["name"]),
                ("Type", model.get("type")),
                ("Parameters", _count(model.get("parameters"))),
                ("Shape", _shape(model)),
                ("Data type", model.get("dtype")),
                ("Attention", model.get("attn_implementation")),
                ("Source", model.get("source")),
                ("SHA-256", model.get("sha256")),
            ],
        ),
        (
            "Corpus",
            [
                ("Name", corpus["name"]),
                ("Training", _training_text(corpus)),
                ("Held out", _join(corpus.get("heldout_documents"), "documents")),
                ("Source", corpus.get("source")),
                ("SHA-256", corpus.get("sha256")),
            ],
        ),
        (
            "Machine",
            [
                ("Device", environment.get("device")),
                ("Processor", environment.get("processor")),
                ("Cores", _count(environment.get("cores"))),
                ("Memory", _bytes(environment.get("memory_bytes"))),
                ("Platform", environment.get("platform")),
                ("Versions", ", ".join(f"{key} {environment[key]}" for key in versions if environment.get(key))),
                ("Peak memory", _bytes(record.get("peak_memory_bytes"))),
            ],
        ),
        (
            "Run",
            [
                ("Seeds", ", ".join(str(seed) for seed in record["seeds"])),
                ("Started", record["created"]),
                ("Finished", record.get("finished")),
                *((key.replace("_", " ").capitalize(), _seconds(value)) for key, value in timings.items()),
            ],
        ),
    ]
    return [
        (name, [(label, str(value)) for label, value in rows if value not in (None, "", "–")]) for name, rows in groups
    ]


def _settings_text(arm: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} = {value}" for key, value in (arm.get("settings") or {}).items())
    parts = [arm.get("description") or "", settings]
    if arm.get("adapter_dtype"):
        parts.append(f"adapter weights in {arm['adapter_dtype']}")
    return "; ".join(part for part in parts if part)


def _limits(record: Mapping[str, Any], results: Mapping[str, Any], seeds: int) -> list[str]:
    model, corpus, evaluation = record["model"], record["corpus"], results["evaluation"]
    limits = []
    if seeds <= 1:
        limits.append(
            "One training seed. The intervals say how the result varies over held-out documents; they say "
            "nothing about what "
            "another seed would give. Add seeds before relying on small differences."
        )
    limits.append(
        f"One model ({model['name']}) and one corpus ({corpus['name']}). What helps on the text it was "
        "trained on may hurt on "
        "other text; this page measures only the former."
    )
    limits.append(
        f"Word perplexity and bits per byte hold for a context of {evaluation['context_length']:,} tokens and "
        "cannot be set beside "
        "figures with another context length or another way of counting words."
    )
    limits.append(
        "Each trained arm used the learning rate it was given. Arms tuned to their best rates can rank differently."
    )
    if str(model.get("dtype")) not in ("float32", "torch.float32"):
        limits.append(
            f"The base model ran in {model.get('dtype')}: part of a gain may be repair of rounding damage. Repeat "
            "in float32 to "
            "tell the two apart."
        )
    if evaluation.get("last_word_items"):
        limits.append(
            f"{evaluation.get('last_word_name') or 'Last word'} is made from this corpus. It is not LAMBADA and "
            "compares with no "
            f"published figure. McNemar's p takes its {evaluation['last_word_items']:,} items as independent; the "
            "interval does not."
        )
    limits.append("Intervals and p-values are per comparison, not corrected for how many comparisons are shown.")
    return limits


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _join(value: Any, noun: str) -> str:
    return "" if value is None else f"{value:,} {noun}"


def _training_text(corpus: Mapping[str, Any]) -> str:
    parts = [_join(corpus.get("training_documents"), "documents"), _join(corpus.get("training_tokens"), "tokens")]
    return ", ".join(part for part in parts if part)


def _shape(model: Mapping[str, Any]) -> str:
    parts = [
        _join(model.get("layers"), "layers"),
        "" if model.get("hidden_size") is None else f"width {model['hidden_size']:,}",
    ]
    return ", ".join(part for part in parts if part)


def _bytes(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _seconds(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _write(path: Path, html: str) -> Path:
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=".report-", suffix=".tmp", delete=False
        ) as stream:
            temporary = stream.name
            stream.write(html)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # the temporary file is private; a report is there to be passed on
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise PreskipError(
            f"{path} cannot be written ({_short(error)}): free space or choose a writable run directory"
        ) from None
    return path

"""`preskip doctor`: what is installed, what this machine can do, and what is missing for which command."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

from packaging.version import Version

from preskip.cli.options import Json
from preskip.serve.versions import serving_problem
from preskip.version import __version__

# Modules that a command needs beyond the required dependencies, and what installs them.
EXTRAS = {
    "all commands but bake, serve, doctor and data without --fetch": (
        ("datasets", "gguf", "pyarrow", "scipy"),
        "pip install 'preskip[train]'",
    ),
    "--tasks": (("lm_eval",), "pip install 'preskip[eval]'"),
    "probe's report.html, report": (("altair", "vl_convert", "jinja2"), "pip install 'preskip[report]'"),
    "serve without vLLM": (("fastapi", "openai", "uvicorn"), "pip install 'preskip[serve]'"),
    "quantised bases": (("bitsandbytes",), "pip install 'preskip[quantized]'"),
}
OLDEST = {"torch": "2.6", "transformers": "5.17", "peft": "0.20"}


def doctor(*, as_json: Json = False) -> None:
    """Show versions, devices, dtype support and the cache, and what is missing for which command.

    Exits with 1 if a required package is missing or too old; what only an extra needs may be absent.
    """
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)
    if facts["problems"]:
        sys.exit(1)


def examine() -> dict[str, Any]:
    """Everything that `preskip doctor` shows, as one JSON value."""
    from preskip.runs.environment import PACKAGES, computes_in_bfloat16, describe, version_of

    optional = {module for modules, _ in EXTRAS.values() for module in modules}
    problems = [f"{name} is not installed" for name in PACKAGES if name not in optional and version_of(name) is None]
    for name, oldest in OLDEST.items():
        version = version_of(name)
        if version and Version(version) < Version(oldest):
            problems.append(f"{name} {version} is too old: {oldest} or newer is needed")
    facts: dict[str, Any] = {"preskip": __version__, "executable": sys.executable, "problems": problems}
    facts |= {"serving_problem": None, "adapter_problem": None}
    if version_of("torch") is None:
        return facts | {"environment": None, "devices": [], "cache": None, "missing": {}}
    import torch

    from preskip import assets

    devices = [{"name": "cpu", "bfloat16": computes_in_bfloat16("cpu")}]
    if torch.cuda.is_available():
        devices.append({"name": torch.cuda.get_device_name(), "bfloat16": computes_in_bfloat16("cuda")})
    missing = {
        command: {"modules": [name for name in modules if importlib.util.find_spec(name) is None], "mend": mend}
        for command, (modules, mend) in EXTRAS.items()
    }
    return facts | {
        "environment": describe("cpu"),
        "devices": devices,
        "cache": assets.status(),
        "missing": {command: entry for command, entry in missing.items() if entry["modules"]},
        "serving_problem": serving_problem(),
        "adapter_problem": adapter_problem(),
    }


def adapter_problem() -> str | None:
    """Why transformers' own methods for adapters refuse the installed PEFT, or None where they take it."""
    from preskip.runs.environment import version_of

    peft, transformers = version_of("peft"), version_of("transformers")
    if peft is None or transformers is None:
        return None
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft) >= Version(MIN_PEFT_VERSION):
        return None
    return (
        f"transformers {transformers} takes model.add_adapter and model.load_adapter with peft {MIN_PEFT_VERSION} or "
        f"newer, and peft {peft} is here: use get_peft_model and PeftModel.from_pretrained, or an older transformers"
    )


def extra_for(module: str | None) -> str | None:
    """The command that installs a missing module of an extra; None for any other module."""
    return next((mend for modules, mend in EXTRAS.values() if (module or "").split(".")[0] in modules), None)


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from preskip.progress import console

    out = console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("preskip", facts["preskip"])
    for name, value in (facts["environment"] or {}).items():
        text = f"{value / 2**30:.1f} GiB" if name == "memory_bytes" else str(value)
        table.add_row(name.removesuffix("_bytes"), text)
    for device in facts["devices"]:
        dtype = "bfloat16" if device["bfloat16"] else "float32 (no bfloat16 instructions)"
        table.add_row(f"device {device['name']}", f"default dtype {dtype}")
    for name, value in _flat(facts["cache"] or {}):
        table.add_row(name, value)
    out.print(table)
    for command, entry in facts["missing"].items():
        text = f" {', '.join(entry['modules'])}: {entry['mend']}"
        out.print(Text.assemble((f"optional, missing for {command}:", "yellow"), text), soft_wrap=True)
    for problem in facts["problems"]:
        out.print(Text.assemble(("problem:", "red"), f" {problem}"), soft_wrap=True)
    if facts["adapter_problem"]:
        out.print(Text.assemble(("note:", "yellow"), f" {facts['adapter_problem']}"), soft_wrap=True)
    if facts["serving_problem"]:
        text = f" {facts['serving_problem']}"
        out.print(Text.assemble(("preskip serve falls back to transformers:", "yellow"), text), soft_wrap=True)
    else:
        out.print("preskip serve works with vLLM", style="green")
    if not facts["problems"]:
        out.print("all required packages are here", style="green")


def _flat(value: dict[str, Any], prefix: str = "cache") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, entry in value.items():
        name = f"{prefix} {key}"
        rows += _flat(entry, name) if isinstance(entry, dict) else [(name, str(entry))]
    return rows

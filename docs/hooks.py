"""What mkdocs makes at build time: the page of stored files from the schema, the changelog, links in both."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "src" / "preskip" / "runs"
SCHEMAS = (RUNS / "schema.py", RUNS / "explain_schema.py")
TITLE = "# Stored files\n"
INTRODUCTION = """
Every stored file is JSON, or JSON in lines. This page is made from `schema.py` and `explain_schema.py` in
`src/preskip/runs`; the types below are named as there.

With `--json` a command prints one JSON document. A mistake is `{"error": ...}`.
`preskip serve` prints its document once the server answers. If the server then ends by itself, the reason is on stderr
alone and the exit code is 1.

| command | prints |
|---|---|
| `preskip probe`, `preskip pretrain` | `run`, `report`, and all of [Results](#results) |
| `preskip eval` | `out`, and all of [EvalResults](#evalresults) |
| `preskip compare` | `family` ([Family](#family)), `notes`, `comparisons` ([Comparison](#comparison)) |
| `preskip audit` | all of [DtypeAudit](#dtypeaudit) |
| `preskip explain` | `out`, `page`, `figures`, and all of [Explain](#explain) but `documents` |
| `preskip compare --combine` | `notes`, `combined`: of each pair and metric the estimate over runs and its `parts` |
| `preskip power` | `power`, `alpha`, `designs`: of each `metric`, `units`, `seeds`, `resolvable` and what it needs |
| `preskip report` | `report`: the page's path |
| `preskip bake` | `out`, `base`, `dtype`, `model_type`, `bytes`, `logits_difference`, `quantize` |
| `preskip bench` | `rows`, `left_out`, `layers`, `limits`, `rounds`, `work` and where it ran |
| `preskip data` | `directory`, `sets`, `remarks` |
| `preskip serve` | once it answers `url`, `model`, `models`, `engine`, `checkpoint`, `pid`, `log` |
| `preskip doctor` | `preskip`, `executable`, `problems`, `environment`, `devices`, `cache`, `missing`, ... |

"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not written by hand."""
    files.append(File.generated(config, "json.md", content=stored_files()))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def stored_files() -> str:
    """The page of stored files, from modules of TypedDicts with a comment behind the fields that need one."""
    sources = [path.read_text(encoding="utf-8") for path in SCHEMAS]
    modules = [(ast.parse(source), source.splitlines()) for source in sources]
    types = [part for module, lines in modules for node in module.body for part in [_type(node, lines)] if part]
    known = {name for name, *_ in types}
    parts = [TITLE, INTRODUCTION, (ast.get_docstring(modules[0][0]) or "").strip(), "\n\n"]
    files = [(name, about) for name, about, *_ in types if _file_of(about)]
    parts += ["| file | type |\n|---|---|\n"]
    parts += [f"| {_file_of(about)} | [{name}](#{name.lower()}) |\n" for name, about in files]
    parts += ["\n", *(constant for module, lines in modules for constant in _constants(module, lines))]
    for name, about, bases, fields in types:
        parts.append(f"\n## {name}\n\n{about}\n")
        if bases:
            parts.append(f"\nAll of {', '.join(_linked(base, known) for base in bases)}, and:\n")
        if fields:
            parts.append("\n| key | type | |\n|---|---|---|\n")
            parts += [f"| `{key}` | {_linked(kind, known)} | {note} |\n" for key, kind, note in fields]
    return "".join(parts)


def _file_of(about: str) -> str | None:
    """The file that a type's sentence begins with."""
    match = re.match(r"(?:A line of |An entry of )?([\w/-]+\.jsonl?)\b", about)
    return f"`{match.group(1)}`" if match else None


def _constants(module: ast.Module, lines: list[str]) -> list[str]:
    """Named alternatives and versions, one a line."""
    found = []
    for node in module.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and not _is_typed_dict(node):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                note = _note(node, lines)
                found.append(f"* `{target.id}`: `{ast.unparse(node.value)}`{f', {note}' if note else ''}\n")
    return found


def _is_typed_dict(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == "TypedDict"


def _type(node: ast.stmt, lines: list[str]) -> tuple[str, str, list[str], list[tuple[str, str, str]]] | None:
    """(name, sentence, bases, [(key, type, note)]) of a TypedDict; None for anything else."""
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) != "TypedDict"]
        fields = [
            (part.target.id, ast.unparse(part.annotation), _note(part, lines))
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]
        return node.name, ast.get_docstring(node) or "", bases, fields
    if isinstance(node, ast.Assign) and _is_typed_dict(node):
        call = node.value
        assert isinstance(call, ast.Call)
        assert isinstance(call.args[1], ast.Dict)
        above = lines[node.lineno - 2].lstrip("# ") if lines[node.lineno - 2].startswith("#") else ""
        fields = [
            (ast.literal_eval(key), ast.unparse(kind), "")
            for key, kind in zip(call.args[1].keys, call.args[1].values, strict=True)
            if key is not None
        ]
        return ast.literal_eval(call.args[0]), above, [], fields
    return None


def _note(node: ast.stmt, lines: list[str]) -> str:
    """The comment behind a statement."""
    rest = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :]
    return rest.partition("#")[2].strip().replace("|", "\\|")


def _linked(kind: str, known: set[str]) -> str:
    """A type as Markdown: optional ones said in words, other types of the page as links."""
    optional = kind.startswith("NotRequired[")
    inner = kind.removeprefix("NotRequired[").removesuffix("]") if optional else kind
    text = re.sub(r"([\[\]|])", r"\\\1", inner.replace("None", "null"))
    text = re.sub(r"\b[A-Z]\w+\b", lambda m: f"[{m[0]}](#{m[0].lower()})" if m[0] in known else m[0], text)
    return text + (", may be absent" if optional else "")

"""The rooms of CONTRIBUTING.md: imports go down only, and never in a circle; lazy ones and those of types count."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = re.findall(r"^\| ((?:`\w+` ?)+)\|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
ROWS = [re.findall(r"\w+", rooms) for rooms, _ in TABLE]
READS = {room: re.findall(r"`(\w+)`", reads) for (_, reads), row in zip(TABLE, ROWS, strict=True) for room in row}
# `import preskip` must stay light, so what it hooks in is imported by name when it is asked for.
BY_NAME = {
    "preskip": {"adapter", "baking", "branch", "branch_settings", "optimizing"},
    "preskip.registration": {"adapter", "architecture"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / "src" / "preskip").rglob("*.py")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(module: str) -> Iterator[str]:
    """The modules of preskip that a module imports anywhere."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inner]
        yield from (name for name in names if name.split(".")[0] == "preskip" and name != module)


def named(module: str) -> set[str]:
    """The rooms that a module names in strings, for importlib."""
    nodes = ast.walk(ast.parse(MODULES[module].read_text()))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return {room(text) for text in strings if text in MODULES and text != "preskip" and room(text) != room(module)}


IMPORTS = {module: sorted(set(imported(module))) for module in MODULES}


def test_every_room_is_in_the_table():
    rooms = {room(module) for module in MODULES} - {"", "__main__"}
    assert rooms == {name for row in ROWS for name in row}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) not in ("", "__main__")])
def test_imports_go_down(module):
    own = room(module)
    level = next(index for index, row in enumerate(ROWS) if own in row)
    below = {name for row in ROWS[level + 1 :] for name in row}
    allowed = {own} | (below & {*READS[own], *ROWS[-1]} if READS[own] else below)
    assert {name for name in IMPORTS[module] if room(name) not in allowed | {""}} == set()


def test_only_what_is_light_imports_by_name():
    found = {module: named(module) for module in MODULES}
    assert {module: rooms for module, rooms in found.items() if rooms} == BY_NAME


def test_no_circle():
    graph = {module: [name for name in names if name != "preskip"] for module, names in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(error.args[1])}")


def test_dependencies_are_what_is_imported():
    """Those of the extras may be missing; gguf, openai and uvicorn are what transformers needs; vLLM has two names."""
    text = (ROOT / "pyproject.toml").read_text()
    declared = {extra: set() for extra in ("", "train", "report", "ray", "eval", "serve")}
    for extra, names in declared.items():
        listed = re.search(rf"^{extra or 'dependencies'} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        names.update(set(re.findall(r'"([\w-]+)', listed[1])) - {"preskip"})
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found |= {str(name).split(".")[0] for name in names}
    package = {"huggingface-hub": "huggingface_hub", "vl-convert-python": "vl_convert", "pyyaml": "yaml"}
    known = {package.get(name, name.replace("-", "_")) for names in declared.values() for name in names}
    came_along = {"markupsafe": "jinja2", "tqdm": "datasets"}
    found -= sys.stdlib_module_names | {"preskip", "vllm"} | came_along.keys()
    assert found == known - {"gguf", "openai", "uvicorn"}

"""The table of what works with which model family, made from the tests' zoo and the package: docs/capabilities.md.

    python docs/capabilities.py

Adapter: the family has a row in the zoo, on which every test of the adapter runs. Architecture and bake: its model type
has a `preskip_<type>`. Serve: the package has a module for it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import transformers

from preskip.model_types import PREFIX, TYPES
from preskip.serve.versions import NOT_IN_VLLM

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "capabilities.md"
READS = {
    "text": "text", "seq2seq": "text, encoder-decoder", "image": "images", "image+text": "images and text",
    "pair": "images and text, two towers", "sound": "sound, encoder-decoder",
}  # fmt: skip
HEAD = """# What works

Every family here has a tiny model in the tests. At the default initialisation, disabled and
unloaded, the adapted model's logits equal the frozen base's exactly. Every self-attention of the
text decoder gets one branch, or an error prints what matched. Of an encoder-decoder both sides'
self-attentions are adapted, the cross-attention never. Of two towers the text tower is adapted,
the vision tower by `target_modules`. Of a hybrid the attention layers are adapted with
`layers_to_transform="attention"` (`--layers attention`); without it an error names the others.
Made by `python docs/capabilities.py` from the code; a test holds this page to it.

"""
REFUSED = """
## What is refused

A model outside the table is checked on a small input. These are refused, with this reason:

| family | reason |
|---|---|
"""


def zoo() -> ModuleType:
    """tests/support/zoo.py."""
    path = ROOT / "tests" / "support" / "zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page() -> str:
    """The page's Markdown."""
    rows = ["| family | reads | adapter | architecture | bake | serve |", "|---|---|---|---|---|---|"]
    known = zoo()
    for name, family in sorted(known.FAMILIES.items()):
        model_type = getattr(transformers, family.config).model_type
        built_in = model_type in TYPES and family.kind == "text" and family.causal
        adapter = "its attention layers" if family.chosen else "yes"
        rows.append(
            f"| `{name}` | {READS[family.kind]} | {adapter} | {f'`{PREFIX}{model_type}`' if built_in else '–'} | "
            f"{'yes' if built_in else '–'} | {_served(model_type) if built_in else '–'} |"
        )
    reasons = "".join(f"| {name} | {refused.why} |\n" for name, refused in sorted(known.REFUSED.items()))
    return HEAD + "\n".join(rows) + "\n" + REFUSED + reasons


def _served(model_type: str) -> str:
    """The engines that `preskip serve` can use."""
    return "transformers" if model_type in NOT_IN_VLLM else "vLLM, transformers"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

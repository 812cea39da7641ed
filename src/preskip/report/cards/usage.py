"""How an adapter is loaded, and on which base."""

from __future__ import annotations

import json
from collections.abc import Mapping

from preskip.model_types import PREFIX
from preskip.runs.schema import ModelFacts


def hub_id(model: ModelFacts) -> str | None:
    """The Hub id of a run's base, or None for one from elsewhere.

    Args:
        model: what run.json says of it.
    """
    name = model["name"]
    return name if model.get("source") == f"Hugging Face Hub {name}" else None


def adapter_usage(model: ModelFacts, dtype: str, types: Mapping[str | None, str], trust_remote_code: bool) -> str:
    """Code that loads a base and puts an adapter on it.

    Args:
        model: what run.json says of the base.
        dtype: of its weights.
        types: PEFT's type of each stacked adapter by its sub-folder; of a single one under None.
        trust_remote_code: whether the base needs code of its own.
    """
    identity = hub_id(model)
    more = ", trust_remote_code=True" if trust_remote_code else ""
    if identity and model.get("revision"):
        more += f", revision={json.dumps(model['revision'])}"
    loader = "AutoModelForCausalLM.from_pretrained" if identity else "load_model"
    name = json.dumps(model["name"], ensure_ascii=False)
    own = "adapter" if "PRESKIP" in types.values() else "model" if model["type"].startswith(PREFIX) else None
    lines = [
        *([f"import preskip  # registers the {own} type"] if own else []),
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM" if identity else "from preskip.assets import load_model",
        "",
        f"base = {loader}({name}, dtype=torch.{dtype}{more})",
    ]
    if None in types:
        return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "PATH_OR_ID")'])
    for folder in types:
        # PEFT keeps one table of names per base.
        options = f'subfolder="{folder}", adapter_name="part-{folder}"'
        lines.append(f'model = PeftModel.from_pretrained(base, "PATH_OR_ID", {options})')
    return "\n".join(lines)

"""The entry point in `vllm.general_plugins`: vLLM calls it in every one of its processes, perhaps more than once."""

from __future__ import annotations

# Named as text: vLLM imports the classes where they are needed, and no other model pays for them.
_CLASSES = "preskip.serve.vllm_model"
_EXPERTS = ("mixtral",)


def register() -> None:
    """Tell vLLM which class serves each `preskip_<type>` architecture, and transformers that they exist."""
    from vllm import ModelRegistry

    from preskip.architecture import TYPES, architecture

    for base_type in TYPES:
        name = "TransformersMoEForCausalLM" if base_type in _EXPERTS else "TransformersForCausalLM"
        ModelRegistry.register_model(architecture(base_type).causal_lm.__name__, f"{_CLASSES}:{name}")

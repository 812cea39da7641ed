"""What transformers reports after it has loaded weights: which it invented, and which it dropped."""

import re
from typing import Any

from preskip.errors import PreskipError, some
from preskip.model_types import PREFIX
from preskip.progress import say

# What an adapter leaves in the names of the weights of a base that was saved with it.
_ADAPTER = re.compile(
    r"\.preskip\.|^base_model\.model\.|\.(base_layer|lora_\w+|modules_to_save|original_module|ia3_l)\."
)


def check_loaded(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model that is another one than its weights say, of which transformers only warns.

    What its weights hold besides (heads of other tasks, vision towers, layers that predict several tokens) is named in
    one line, and changes nothing. Tied weights are not reported.

    Args:
        name: of the model, as the user wrote it.
        model: as loaded.
        report: transformers' loading report.

    Raises:
        PreskipError: an adapter was saved inside its base; weights are missing or of a wrong shape, so that they were
            initialised at random; or a module has a weight or bias that the model has no place for.
    """
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    broken = [str(message) for message in report.get("error_msgs", ())]
    extra = sorted(report["unexpected_keys"])
    if str(model.config.model_type).startswith(PREFIX) and (homeless := [key for key in extra if ".preskip." in key]):
        raise PreskipError(
            f"model {name}: its config.json has no place for {some(homeless, 3)}: config and weights do not belong "
            "together; bake it again"
        )
    if adapter := [key for key in extra if _ADAPTER.search(key)]:
        raise PreskipError(
            f"model {name}: an adapter was saved inside its weights ({some(adapter, 3)}), and would be left out: bake "
            "it, or save the PEFT model itself and give that with --adapter"
        )
    for keys, what in ((missing, "missing"), (mismatched, "of another shape than its config says"), (broken, "broken")):
        if keys:
            raise PreskipError(
                f"model {name}: weights {what}: {some(keys, 3)}; get a complete checkpoint of this architecture"
            )
    kind = type(model).__name__
    # A base model's own checkpoint has its names without the prefix that they have in a model with a head.
    modules = dict(model.base_model.named_modules()) | dict(model.named_modules())
    is_plain = getattr(model, "quantization_method", None) is None  # GPTQ's may hold biases that the base has not
    if is_plain and (dropped := [key for key in extra if _is_of_module(key, modules)]):
        raise PreskipError(
            f"model {name}: {kind} has no place for {some(dropped, 3)}: its config.json does not belong to these "
            "weights (attention_bias and the like); get both from one place"
        )
    if extra:
        say(f"model {name}: {kind} has no place for {len(extra):,} of its weights, left out: {some(extra, 3)}")


def _is_of_module(key: str, modules: dict[str, Any]) -> bool:
    """Whether a weight or bias belongs to a module of the model that has weights of its own.

    Attention has none: `attention.bias` of old checkpoints is a mask.
    """
    path, _, kind = key.rpartition(".")
    return path in modules and kind in ("weight", "bias") and any(True for _ in modules[path].parameters(recurse=False))

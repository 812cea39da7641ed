"""Tiny random instances of every supported model family: one row per family, and how to build and feed one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.integrations.peft import MIN_PEFT_VERSION

PEFT_VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])
asks_what_to_save = pytest.mark.skipif(
    PEFT_VERSION < (0, 21), reason="earlier versions do not ask the method what it saves"
)
IS_PEFT_TAKEN = tuple(int(part) for part in MIN_PEFT_VERSION.split(".")[:2]) <= PEFT_VERSION
takes_this_peft = pytest.mark.skipif(
    not IS_PEFT_TAKEN,
    reason=f"transformers' own methods for adapters need peft {MIN_PEFT_VERSION}",
)
WIDTH, LAYERS, VOCABULARY = 32, 2, 128
IMAGE_TOKEN, IMAGE_SIZE, PATCHES = 7, 16, 4
MEL_BINS = 8


class Looped(torch.nn.ModuleList):
    """Layers that a model runs twice in a pass, one round after the other; Llama takes its layers as a slice."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return [*found, *found] if isinstance(index, slice) else found


@dataclass(frozen=True)
class Family:
    """One row: transformers' classes, the settings of a tiny instance, and where its attention modules lie.

    Attributes:
        attention: path of an attention module with `{}` for the layer index; several where a layer index names several.
        kind: what the model reads: "text", "seq2seq", "image", "image+text", "pair" (a picture and a text) or "sound".
        dense: for BERT-like blocks, the path of the linear layer whose output the residual sum adds.
        layers: indices of the layers that have attention; a hybrid has others beside them.
    """

    model: str
    config: str
    settings: dict[str, Any]
    attention: tuple[str, ...] = ("model.layers.{}.self_attn",)
    kind: str = "text"
    causal: bool = True
    dense: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = tuple(range(LAYERS))

    @property
    def attention_names(self) -> set[str]:
        return {path.format(layer) for path in self.attention for layer in self.layers}

    @property
    def chosen(self) -> str | None:
        """The `layers_to_transform` that adapts every attention."""
        return None if len(self.layers) == LAYERS else "attention"


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
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
T5_ATTENTION = ("encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention")
WHISPER = {
    **BART, "num_mel_bins": MEL_BINS, "max_source_positions": 10, "max_target_positions": 64,
    "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
ENDED = {**FULL, "eos_token_id": 2}
TOWER = {**VISION, "hidden_size": WIDTH, "intermediate_size": 64}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
ONE_OF_TWO = ["linear_attention", "full_attention"]
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ONE_OF_TWO, "head_dim": 16,
}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
BERT_ATTENTION = "encoder.layer.{}.attention"


def _bert(prefix: str, name: str, **settings: Any) -> Family:
    """A masked language model of BERT's shape."""
    path = f"{prefix}.{BERT_ATTENTION}"
    return Family(
        f"{name}ForMaskedLM", f"{name}Config", {**FULL, **settings}, (f"{path}.self",), causal=False,
        dense=f"{path}.output.dense",
    )  # fmt: skip


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
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, T5_ATTENTION, "seq2seq"),
    "t5_gated": Family(
        "T5ForConditionalGeneration", "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, T5_ATTENTION, "seq2seq",
    ),
    "umt5": Family("UMT5ForConditionalGeneration", "UMT5Config", T5, T5_ATTENTION, "seq2seq"),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        ("model.encoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn"), "sound",
    ),
    "electra": _bert("electra", "Electra", embedding_size=16),
    "deberta": _bert("deberta", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": _bert(
        "deberta", "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True,
        position_buckets=8, norm_rel_ebd="layer_norm", conv_kernel_size=3,
    ),
    "clip_text": Family("CLIPTextModel", "CLIPTextConfig", ENDED, ("encoder.layers.{}.self_attn",), causal=False),
    "clip_vision": Family(
        "CLIPVisionModel", "CLIPVisionConfig", TOWER, ("encoder.layers.{}.self_attn",), "image", False
    ),
    "siglip_text": Family(
        "SiglipTextModel", "SiglipTextConfig", {**FULL, "projection_size": 16}, ("encoder.layers.{}.self_attn",),
        causal=False,
    ),
    "siglip_vision": Family(
        "SiglipVisionModel", "SiglipVisionConfig", TOWER, ("encoder.layers.{}.self_attn",), "image", False
    ),
    # Of both together, the text tower is adapted by default.
    "clip": Family(
        "CLIPModel", "CLIPConfig", {"projection_dim": 16}, ("text_model.encoder.layers.{}.self_attn",), "pair", False,
        extra={"vision_config": ("CLIPVisionConfig", VISION), "text_config": ("CLIPTextConfig", ENDED)},
    ),
    "siglip": Family(
        "SiglipModel", "SiglipConfig", {}, ("text_model.encoder.layers.{}.self_attn",), "pair", False,
        extra={
            "vision_config": ("SiglipVisionConfig", TOWER),
            "text_config": ("SiglipTextConfig", {**FULL, "projection_size": WIDTH}),
        },
    ),
    "gemma3n": _decoder(
        "Gemma3n",
        {
            **GROUPED, **PER_LAYER, "head_dim": 16, "sliding_window": 8, "layer_types": ["full_attention"] * 2,
            "num_kv_shared_layers": 1, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 2,
        },
        "Gemma3nTextConfig",
    ),
    "gemma4": _decoder(
        "Gemma4",
        {
            **GROUPED, **PER_LAYER, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8,
            "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1,
        },
        "Gemma4TextConfig",
    ),
    # Hybrids: the other layers have no attention, or none of softmax over tokens.
    "qwen3_next": _decoder(
        "Qwen3Next",
        {
            **GROUPED, **DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        layers=(1,),
    ),
    "lfm2": _decoder("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, layers=(1,)),
    "granite4": _decoder(
        "GraniteMoeHybrid",
        {
            **GROUPED, **EXPERTS, **MAMBA, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_head": 8,
            "mamba_chunk_size": 8, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"],
            "residual_multiplier": 0.5,
        },
        layers=(1,),
    ),
    "falcon_h1": _decoder(
        "FalconH1",
        {
            **GROUPED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
            "mamba_d_state": 8, "mamba_chunk_size": 8, "attention_in_multiplier": 0.5,
            "attention_out_multiplier": 0.7, "ssm_out_multiplier": 0.9,
        },
    ),
    "jamba": _decoder(
        "Jamba",
        {
            **GROUPED, **MAMBA, "mamba_dt_rank": 4, "num_experts": 2, "num_experts_per_tok": 1,
            "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        layers=(1,),
    ),
    "nemotron_h": _decoder(
        "NemotronH",
        {
            **GROUPED, "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
            "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        },
        attention=("model.layers.{}.mixer",), layers=(1,),
    ),
    "recurrent_gemma": _decoder(
        "RecurrentGemma",
        {
            **SMALL, "intermediate_size": 64, "num_key_value_heads": 1, "lru_width": WIDTH, "head_dim": 8,
            "attention_window_size": 8, "block_types": ["recurrent", "attention"],
        },
        attention=("model.layers.{}.temporal_block",), layers=(1,),
    ),
    "minimax": _decoder(
        "MiniMax",
        {**GROUPED, **EXPERTS, "layer_types": ONE_OF_TWO, "block_size": 4, "full_attn_alpha_factor": 1.5}, layers=(1,),
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


@dataclass(frozen=True)
class Refused:
    """A model that cannot have a branch, and a part of the message that says why."""

    model: str
    config: str
    settings: dict[str, Any]
    why: str


RESIDUAL = "its output depends on its input also where all its projections give 0"
NO_SOFTMAX = "it mixes tokens without a softmax, so it is another kind of layer"
REFUSED: dict[str, Refused] = {
    "albert": Refused("AlbertModel", "AlbertConfig", {**FULL, "embedding_size": 16}, RESIDUAL),
    "mpnet": Refused("MPNetModel", "MPNetConfig", FULL, RESIDUAL),
    "squeezebert": Refused(
        "SqueezeBertModel", "SqueezeBertConfig", {**FULL, "embedding_size": 32}, "its output is dict"
    ),
    "funnel": Refused(
        "FunnelModel", "FunnelConfig",
        {"vocab_size": 64, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
        "it is given the hidden states once more, as its argument 2",
    ),
    "mobilebert": Refused(
        "MobileBertModel", "MobileBertConfig", {**FULL, "embedding_size": 32, "intra_bottleneck_size": 16},
        "it is given the hidden states once more, as its argument 2",
    ),
    "zamba2": Refused(
        "Zamba2ForCausalLM", "Zamba2Config",
        {
            **GROUPED, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8,
            "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "chunk_size": 8,
            "adapter_rank": 4,
        },
        "its output is (1, 4, 32), its input (1, 4, 64)",
    ),
    "zamba": Refused(
        "ZambaForCausalLM", "ZambaConfig",
        {
            **GROUPED, "num_key_value_heads": 4, "num_hidden_layers": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
            "n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid"] * 2,
        },
        "its output is (1, 4, 32), its input (1, 4, 64)",
    ),
    "rwkv": Refused("RwkvModel", "RwkvConfig", {**SMALL, "attention_hidden_size": WIDTH}, NO_SOFTMAX),
    "mamba": Refused(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8},
        "no self-attention found in MambaForCausalLM",
    ),
    "minimax, linear layers only": Refused(
        "MiniMaxForCausalLM", "MiniMaxConfig", {**GROUPED, **EXPERTS, "layer_types": ["linear_attention"] * 2},
        "no self-attention found in MiniMaxForCausalLM",
    ),
}  # fmt: skip


def build_refused(name: str) -> Any:
    """A tiny model of `REFUSED`, in eval mode."""
    refused = REFUSED[name]
    torch.manual_seed(0)
    config = getattr(transformers, refused.config)(**refused.settings)
    return getattr(transformers, refused.model)(config).eval()


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
    if kind == "sound":
        sound = torch.randn(batch, MEL_BINS, 20, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids}
    if kind == "pair":
        return {"input_ids": ids, "pixel_values": pixels}
    if kind == "image+text":
        ids[:, 1 : 1 + PATCHES] = IMAGE_TOKEN
        return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: Any, name: str, **kwargs: Any) -> torch.Tensor:
    """The model's logits on `inputs(name)`; a tower's last hidden states, a pair's similarities."""
    output = model(**inputs(name, **kwargs))
    for key in ("logits", "last_hidden_state", "logits_per_text"):
        if key in output:
            return output[key]
    raise AssertionError(f"{name} gives {list(output)}")


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

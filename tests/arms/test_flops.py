"""What a model costs: against torch's own counter, and against differences of models."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import preskip.architecture  # noqa: F401
from preskip.arms.flops import (
    active_weights,
    embedding_parameters,
    forward_flops_per_token,
    matrix_weights,
    training_flops_per_token,
)

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": None,
}  # fmt: skip


def model(model_type="preskip_llama", **changes):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}))


@pytest.mark.parametrize(
    "model_type", ["llama", "preskip_llama", "preskip_gpt_neox", "gpt2", "qwen3", "preskip_gemma2"]
)
def test_flops_are_those_that_torch_counts(model_type):
    """Torch's own counter on the real forward pass; its attention is eager, so that both products are seen."""
    net = model(model_type, attn_implementation="eager", **({"head_dim": 16} if "q" in model_type else {}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(input_ids=torch.zeros(1, 16, dtype=torch.long))
    counted = counter.get_total_flops() / 16
    # Torch sees the rotary frequencies' product, too: a few tenths of a per cent of so small a model.
    assert forward_flops_per_token(net, 16) == pytest.approx(counted, rel=0.01)
    assert training_flops_per_token(net, 16) == 3 * forward_flops_per_token(net, 16)


def test_a_mixture_of_experts_counts_what_a_token_visits():
    one = model("mixtral", num_local_experts=2, num_experts_per_tok=1)
    two = model("mixtral", num_local_experts=2, num_experts_per_tok=2)
    assert forward_flops_per_token(two, 16) - forward_flops_per_token(one, 16) == 2 * 2 * 3 * 32 * 64
    four = model("mixtral", num_local_experts=4, num_experts_per_tok=1)
    assert forward_flops_per_token(four, 16) - forward_flops_per_token(one, 16) == 2 * 2 * 2 * 32  # the router


def test_a_convolution_is_no_stack_of_experts():
    """Each of its weights meets each token."""
    net = model("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
    (convolution, *_) = [p for p in net.parameters() if p.ndim == 3]
    assert tuple(convolution.shape) == (32 + 2 * 8, 1, 4)
    assert active_weights(convolution, net.config) == 48 * 4
    matrices = sum(p.numel() for p in net.parameters() if p.ndim >= 2) - 96 * 32
    assert matrix_weights(net) == (matrices, 96 * 32)


def test_experts_go_by_the_names_that_configs_give_them():
    stack, other = torch.empty(8, 6, 5), torch.empty(7, 6, 5)
    for config in (
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {"n_routed_experts": 8, "num_experts_per_tok": 2},
        {"num_experts": 8, "top_k_experts": 2},  # Gemma 4
    ):
        assert active_weights(stack, SimpleNamespace(**config)) == 2 * 6 * 5
        assert active_weights(other, SimpleNamespace(**config)) == 7 * 6 * 5
    dense = SimpleNamespace(num_experts=None, top_k_experts=None)  # Gemma 4, too
    assert active_weights(stack, dense) == 8 * 6 * 5


def test_embeddings_are_counted_once():
    assert embedding_parameters(model()) == 96 * 32
    assert embedding_parameters(model(tie_word_embeddings=False)) == 96 * 32
    assert embedding_parameters(model("gpt2", n_positions=64)) == (96 + 64) * 32

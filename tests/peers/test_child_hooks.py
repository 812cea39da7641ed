"""Peers whose layers an adapter wraps: what the adapter adds passes the peer, as once it is merged."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import zoo
from preskip.peers.insert import attach_peers, detach_peers, peers_off
from tiny_model import tiny_llama

IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))

CASES = {
    "canon": ("llama", {"canon": {"sites": "ABCD"}}, ["q_proj", "v_proj", "up_proj"]),
    "canon-neox": ("gpt_neox", {"canon": {"sites": "BD"}}, ["query_key_value", "dense_h_to_4h"]),
    "value-residual": ("llama", {"value-residual": {}}, ["v_proj"]),
    "value-embed": ("llama", {"value-embed": {"layers": [1]}}, ["v_proj"]),
    "gated-attention": ("llama", {"gated-attention": {}}, ["o_proj"]),
    "two on one layer": ("llama", {"canon": {"sites": "B"}, "value-residual": {}}, ["v_proj"]),
}


def lora(model, layers):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=layers, init_lora_weights=False)).eval()


@pytest.mark.parametrize(("family", "peers", "layers"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_what_lora_adds_passes_the_peer_as_once_it_is_merged(family, peers, layers):
    model = zoo.build(family).eval()
    attach_peers(model, peers)
    plain = model(IDS).logits
    tuned = lora(model, layers)
    added = tuned(IDS).logits
    assert (added - plain).abs().max() > 1e-2
    with tuned.disable_adapter():
        assert torch.equal(tuned(IDS).logits, plain)
    merged = copy.deepcopy(tuned).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, added, atol=1e-5, rtol=1e-4)
    assert torch.equal(tuned(IDS).logits, added)  # the copy moved its own hooks
    assert torch.equal(tuned.unload()(IDS).logits, plain)


@torch.no_grad()
def test_peers_are_put_on_layers_of_an_adapter_and_taken_out_of_them():
    torch.manual_seed(0)
    tuned = lora(tiny_llama(num_hidden_layers=3), ["v_proj", "up_proj"])
    before = tuned(IDS).logits
    attach_peers(tuned, {"canon": {"sites": "ABCD"}, "value-residual": {}})
    with_peers = tuned(IDS).logits
    merged = copy.deepcopy(tuned).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, with_peers, atol=1e-5, rtol=1e-4)
    with peers_off(tuned):
        assert torch.equal(tuned(IDS).logits, before)
    merged = tuned.merge_and_unload()
    merged(IDS)
    detach_peers(merged)
    assert not [module for module in merged.modules() if module._forward_hooks or module._forward_pre_hooks]
    torch.testing.assert_close(merged(IDS).logits, before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_pass_compiled_before_the_adapter_came_is_compiled_anew():
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=2).eval()
    attach_peers(model, {"canon": {"sites": "BD"}})
    compiled = torch.compile(model, backend="eager")
    compiled(IDS)
    tuned = lora(model, ["q_proj", "up_proj"])
    first, second = compiled(IDS).logits, compiled(IDS).logits
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(tuned.merge_and_unload()(IDS).logits, first, atol=1e-5, rtol=1e-4)

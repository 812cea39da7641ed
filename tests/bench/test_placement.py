"""Where the branch's tensors are on a CUDA device, checked without one: fake tensors know theirs and refuse to mix.

A torch without CUDA can neither index fake tensors nor build graphs on them: the attention here is a plain one, and
runs without gradients.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

import preskip
from preskip import BranchSettings, PreskipBranch
from preskip.attach import CHILD, attach
from preskip.optimizing import copies
from preskip.quantizing import quantize_layers

D = 64
FIELDS = [
    {},
    {"gated": True, "skip_rank": 4},
    {"enrich_attention": False},
    {"enrich_attention": False, "content_skip": False},
    {"preprojection": False},
]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


def build(dtype: torch.dtype, branch_dtype: torch.dtype, int8: bool = False, **fields) -> nn.Module:
    """An attention with a branch, every tensor a fake one on CUDA."""
    with unset_fake_temporarily(), torch.device("meta"):
        attention = Attention().to(dtype)
        branch = PreskipBranch(D, BranchSettings(**fields))
        if int8:
            quantize_layers(branch)
        branch.to(branch_dtype)
    attach(attention, branch)
    for module in attention.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in ((name, tensor) for name, tensor in held.items() if tensor is not None):
                fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                held[name] = nn.Parameter(fresh) if held is module._parameters else fresh
    return attention


def check(attention: nn.Module, dtype: torch.dtype) -> None:
    x = torch.empty(2, 7, D, dtype=dtype, device="cuda")
    with torch.no_grad():
        for train in (True, False):
            out = attention.train(train)(hidden_states=x)
            assert (out.device.type, out.dtype, out.shape) == ("cuda", dtype, x.shape)
    with preskip.optimize(attention) as handle, torch.no_grad():
        assert handle.attentions == 1
        assert attention(hidden_states=x).device.type == "cuda"


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_branches_beside_any_base(dtype, fields):
    with FakeTensorMode():
        check(build(dtype, torch.float32, **fields), dtype)


@pytest.mark.parametrize("int8", [False, True])
def test_baked_branches(int8):
    with FakeTensorMode():
        check(build(torch.bfloat16, torch.bfloat16, int8=int8, skip_rank=4), torch.bfloat16)


def test_a_weight_left_on_the_cpu_is_found():
    with FakeTensorMode():
        attention = build(torch.bfloat16, torch.float32)
        getattr(attention, CHILD).skip.weight = nn.Parameter(torch.empty(D, D))
        with pytest.raises(RuntimeError, match="device"):
            check(attention, torch.bfloat16)


def test_int8_weights_have_no_copy_where_no_kernel_reads_one():
    with FakeTensorMode(), torch.no_grad():
        attention = build(torch.bfloat16, torch.bfloat16, int8=True, skip_rank=4)
        with preskip.optimize(attention):
            attention(hidden_states=torch.empty(2, 7, D, dtype=torch.bfloat16, device="cuda"))
            assert not [copy for copy in copies(attention) if copy.dtype == torch.int8]

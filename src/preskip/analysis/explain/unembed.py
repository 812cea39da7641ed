"""What the skip writes, read as the model reads its last layer: through the final norm and the unembedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from preskip.adapter import base_model
from preskip.analysis.branches import LiveBranch
from preskip.runs.explain_schema import PromotedTokens, Token

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "final_norm")
MOST = 10


@torch.inference_mode()
def promoted_tokens(model: nn.Module, branch: LiveBranch, written: torch.Tensor, tokenizer: Any) -> PromotedTokens:
    """The tokens whose logits a layer's mean skip output raises and lowers most, in the manner of the logit lens.

    Where attention's output and the skip pass a norm together before the residual sum (Gemma), so does it here. What
    the norm and the head give for a vector of zeros (their biases) is taken off. A soft cap of the logits is not
    applied. `written` is the mean skip output, [d].
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    parent = base.get_submodule(branch.site.stack.rpartition(".")[0])
    vectors = torch.stack([written, torch.zeros_like(written)]).to(head.weight.device, head.weight.dtype)[None]
    for norm in (branch.post_norm, final_norm(parent)):
        if norm is not None:
            vectors = norm(vectors)
    projection = getattr(parent, "project_out", None)  # OPT-350m: the head is narrower than the blocks
    if projection is not None:
        vectors = projection(vectors)
    logits = head(vectors)[0].float()
    change = (logits[0] - logits[1])[: len(tokenizer)]

    def strongest(signed: torch.Tensor) -> list[Token]:
        order = signed.topk(min(MOST, len(change))).indices.tolist()
        return [[token_text(token, tokenizer), change[token].item()] for token in order]

    return {"promoted": strongest(change), "demoted": strongest(-change)}


def final_norm(parent: nn.Module) -> nn.Module | None:
    """The norm behind the last block, a sibling of the stack of blocks, or None (a post-norm model)."""
    return next((child for name, child in parent.named_children() if name in FINAL_NORMS), None)


def token_text(token: int, tokenizer: Any) -> str:
    """A token as text; as the tokenizer writes it where it is a part of a character."""
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if not text or "\ufffd" in text else text

"""A tiny pretrained-like model in a folder, with its tokenizer, and a corpus: what the command line needs to run."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_text import PROSE, tiny_tokenizer


def tiny_llama(**settings) -> LlamaForCausalLM:
    """A random 2-layer Llama of width 32 with the vocabulary of `tiny_tokenizer`."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings})).eval()


def save_tiny_llama(folder: Path, **settings) -> Path:
    """Save model and tokenizer into a folder."""
    tiny_llama(**settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(path: Path, documents: int = 12) -> Path:
    """A JSONL corpus of different documents made of the tiny prose."""
    sentences = PROSE.replace("\n\n", " ").split(". ")
    with path.open("w") as file:
        for index in range(documents):
            turned = sentences[index % len(sentences) :] + sentences[: index % len(sentences)]
            text = ". ".join([f"This is record {index}", *turned, *turned]).strip(". ") + "."
            file.write(json.dumps({"id": f"d{index}", "text": text}) + "\n")
    return path

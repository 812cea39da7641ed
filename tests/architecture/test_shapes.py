"""Named shapes: their parameter counts, against the paper's figures and Pythia's published ones."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from preskip.architecture.shapes import SHAPES, shape_config
from preskip.branch import BranchSettings
from preskip.errors import PreskipError


def count(name: str, branch: BranchSettings | None = None) -> dict[str, int]:
    """Parameters by kind, without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name, branch=branch))
    kinds = {"branch": 0, "embedding": 0, "body": 0}
    for key, parameter in model.named_parameters():
        embedding = any(part in key for part in ("embed_in", "embed_out", "embed_tokens", "lm_head"))
        kinds["branch" if ".preskip." in key else "embedding" if embedding else "body"] += parameter.numel()
    return kinds


# Layers, width, heads and vocabulary of each size, and non-embedding parameters as the Pythia paper prints them.
PYTHIA = {
    "pythia-14m": (6, 128, 4, 50304, 1_189_888),
    "pythia-31m": (6, 256, 8, 50304, 4_739_072),
    "pythia-70m": (6, 512, 8, 50304, 18_915_328),
    "pythia-160m": (12, 768, 12, 50304, 85_056_000),
    "pythia-410m": (24, 1024, 16, 50304, 302_311_424),
    "pythia-1b": (16, 2048, 8, 50304, 805_736_448),
    "pythia-1.4b": (24, 2048, 16, 50304, 1_208_602_624),
    "pythia-2.8b": (32, 2560, 32, 50304, 2_517_652_480),
    "pythia-6.9b": (32, 4096, 32, 50432, 6_444_163_072),
    "pythia-12b": (36, 5120, 40, 50688, 11_327_027_200),
}


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia_has_its_published_sizes(name):
    layers, width, heads, vocabulary, body = PYTHIA[name]
    config = shape_config(name, branch=None)
    assert config.model_type == "gpt_neox"
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert (config.vocab_size, config.intermediate_size) == (vocabulary, 4 * width)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    # 12 d² + 13 d per layer (matrices; biases and norms), and the last norm.
    assert body == layers * (12 * width**2 + 13 * width) + 2 * width
    assert count(name) == {"branch": 0, "body": body, "embedding": 2 * vocabulary * width}


def test_the_papers_new_weights():
    """17.69M + 7.08M at 160M and 62.9M + 25.2M at 410M (arXiv 2604.10791)."""
    assert count("pythia-160m", BranchSettings())["branch"] == 17_694_720 + 7_077_888
    assert count("pythia-410m", BranchSettings())["branch"] == 62_914_560 + 25_165_824
    assert count("pythia-160m", BranchSettings(content_skip=False))["branch"] == 17_694_720
    with_branch, without = count("pythia-160m", BranchSettings()), count("pythia-160m")
    assert with_branch["body"] == without["body"]
    assert with_branch["branch"] / with_branch["body"] == pytest.approx(0.29, abs=0.005)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("llama")])
def test_llama_shapes_have_about_the_size_in_their_name(name):
    if name == "llama-3-8b":
        # As published: 8,030,261,248 with both of its embeddings, 128,256 x 4,096 each.
        assert count(name)["body"] + 2 * 128256 * 4096 == pytest.approx(8_030_261_248, rel=1e-6)
        return
    millions = float(name.removeprefix("llama-").removesuffix("m"))
    assert count(name)["body"] / 1e6 == pytest.approx(millions, rel=0.08)


def test_overrides():
    config = shape_config("llama-1m", branch=BranchSettings(expansion=2.0), num_hidden_layers=3, preskip_layers=[2])
    assert (config.model_type, config.num_hidden_layers, config.preskip_layers) == ("preskip_llama", 3, [2])
    assert config.preskip_expansion == 2.0


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("pythia-71m", {}, "did you mean pythia-70m"),
        ("mamba", {}, "choose one of pythia-14m"),
        ("llama-1m", {"width": 64}, "width is no field"),
        ("llama-1m", {"hidden_size": 130}, "not a multiple of the number of attention heads"),
        ("pythia-70m", {"num_hidden_layers": "six"}, "num_hidden_layers"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(name, overrides, words):
    with pytest.raises(PreskipError, match=words) as caught:
        shape_config(name, branch=None, **overrides)
    assert "\n" not in str(caught.value)

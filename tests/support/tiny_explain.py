"""A tiny adapted model, texts and their tokens for the tests of explain."""

from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import preskip.architecture  # noqa: F401
import zoo
from preskip import PreskipConfig
from preskip.analysis.explain import Text
from tiny_model import tiny_llama
from tiny_text import PROSE

SENTENCES = PROSE.replace("\n\n", " ").split(". ")


def texts(count: int = 4, given: bool = False) -> list[Text]:
    made = [Text(f"d{i}", f"Record {i}", f"Record {i}. " + ". ".join(SENTENCES[i : i + 4]) + ".") for i in range(count)]
    return [Text("given-1", "a note", "An old NATO ship, 1945!", "given"), *made] if given else made


def adapted_llama(std: float = 0.1, **settings):
    """`tiny_llama`, every weight moved by noise, with a random adapter."""
    model = tiny_llama(num_hidden_layers=3)
    zoo.randomise(model, std=0.1, seed=5)
    model = get_peft_model(model, PreskipConfig(**settings))
    zoo.randomise(model, std=std)
    return model.eval()


def crossed_llama(peer: str, **settings):
    """A random 3-layer Llama with branches of its own and a peer in every block."""
    plain = {k: v for k, v in tiny_llama(num_hidden_layers=3).config.to_dict().items() if k != "model_type"}
    config = AutoConfig.for_model("preskip_llama", **plain, preskip_peers={peer: settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    zoo.randomise(model, std=0.3)
    return model


def adapted(name: str, **settings):
    config = PreskipConfig(**{"layers_to_transform": zoo.FAMILIES[name].chosen, **settings})
    model = get_peft_model(zoo.build(name), config)
    zoo.randomise(model)
    return model.eval()

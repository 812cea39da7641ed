"""The K/V cache is found under the name that the installed transformers has for it."""

import inspect

import pytest
from transformers import DynamicCache, GPTNeoXModel, LlamaForCausalLM

from preskip.kv_cache import cache_name, given_cache


@pytest.mark.parametrize("model", [LlamaForCausalLM, GPTNeoXModel])
def test_the_name_is_that_of_the_models(model):
    assert cache_name() in inspect.signature(model.forward).parameters


def test_an_empty_cache_is_found_under_both_names():
    cache = DynamicCache()
    assert given_cache({"cache": cache}) is given_cache({"cache": None, "past_key_values": cache}) is cache
    assert given_cache({"past_key_values": cache, "input_ids": None}) is cache
    assert given_cache({"use_cache": True}) is None

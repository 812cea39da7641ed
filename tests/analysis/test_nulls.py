import math

import numpy as np
import pytest
import torch
from peft import get_peft_model

from preskip import PreskipConfig
from preskip.analysis.depth import depth_profile
from preskip.analysis.depth_results import norms
from preskip.train.controls import train_on_noise
from preskip.train.settings import TrainingSettings
from tiny_model import tiny_llama

SETTINGS = TrainingSettings(steps=40, batch_size=4, micro_batch_size=4, learning_rate=1e-3, seed=3)


def model(**settings):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(num_hidden_layers=4), PreskipConfig(**settings))


def noise_rows():
    peft_model = model()
    train_on_noise(peft_model, SETTINGS)
    return norms(depth_profile(peft_model.get_base_model(), []))


def test_a_null_stores_the_norms_alone():
    rows = noise_rows()
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert all(set(row) == {"layer", "up_norm", "down_norm", "skip_norm"} for row in rows)


def test_noise_gives_every_layer_the_same_norm_which_an_independent_random_walk_predicts():
    """‖W‖ = √(n · E[w²]) with w the sum of AdamW steps on N(0, 1), simulated weight by weight in plain NumPy."""
    rows = noise_rows()
    generator = np.random.default_rng(0)
    m = v = w = np.zeros(20_000)
    for step in range(1, 41):
        rate = 1e-3 * ((step - 1) / 4 if step <= 4 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 36)))
        g = generator.normal(size=w.shape)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    expected = math.sqrt(32 * 32 * (w**2).mean())
    found = [row["skip_norm"] for row in rows]
    assert found == pytest.approx([expected] * 4, rel=0.06)
    assert np.mean(found) == pytest.approx(expected, rel=0.03)

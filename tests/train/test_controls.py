"""Controls against written-out equations, the trainer itself, and what the noise null is known to give."""

from collections import Counter

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from preskip import PreskipConfig
from preskip.errors import PreskipError
from preskip.train.controls import EqualStep, noise_seed, shuffle_targets, train_on_noise
from preskip.train.frozen import train_frozen
from preskip.train.settings import TrainingSettings
from preskip.train.steps import BlockDataset
from tiny_model import tiny_llama

BLOCKS = np.random.default_rng(0).integers(2, 400, (8, 16)).astype(np.int32)


def settings(**changes) -> TrainingSettings:
    defaults = {"steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3, "seed": 1, "save_steps": 2}
    return TrainingSettings(**{**defaults, **changes})


def model(init_weights="paper", layers=3):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(num_hidden_layers=layers), PreskipConfig(init_weights=init_weights, init_std=0.1))


def trainable(peft_model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in peft_model.named_parameters() if p.requires_grad}


def weights(peft_model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(peft_model).values()])


def train(peft_model, folder, advance=lambda step, note="": None, **changes):
    return train_frozen(
        peft_model,
        BLOCKS,
        settings(**changes),
        arm="preskip",
        checkpoints=folder / "checkpoints",
        log=folder / "train.jsonl",
        advance=advance,
    )


@pytest.mark.parametrize("equal_step", [False, True])
def test_noise_is_the_trainer_with_its_gradients_overwritten(tmp_path, equal_step):
    by_trainer, by_loop = model(), model()
    parameters = list(trainable(by_trainer).values())
    generator = torch.Generator().manual_seed(noise_seed(1))
    noise = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(6)]
    step = {"now": 0}
    for index, p in enumerate(parameters):
        p.register_hook(lambda gradient, index=index: noise[step["now"]][index])
    rows = train(by_trainer, tmp_path / "a", advance=lambda now, note="": step.update(now=now), equal_step=equal_step)
    loop = train(by_loop, tmp_path / "b", control="noise", equal_step=equal_step)
    assert torch.allclose(weights(by_trainer), weights(by_loop), atol=1e-7)
    assert [row["learning_rate"] for row in loop] == pytest.approx([row["learning_rate"] for row in rows])
    assert [row["grad_norm"] for row in loop] == pytest.approx([row["grad_norm"] for row in rows])
    assert {row["loss"] for row in loop} == {None}
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_noise_depends_on_the_seed_alone_and_reads_no_text(tmp_path):
    first, again, other = model(), model(), model()
    train(first, tmp_path, control="noise")
    train_frozen(
        again, BLOCKS[:4] + 1, settings(control="noise"), arm="x", checkpoints=tmp_path, log=tmp_path / "train.jsonl"
    )
    train(other, tmp_path, control="noise", seed=2)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def skip_norm(d: int, size: int, dtype: torch.dtype) -> float:
    """‖W‖ of a d × d matrix after the paper's schedule on noise, from a size × size one: AdamW is elementwise."""
    torch.manual_seed(0)
    linear = nn.Linear(size, size, bias=False)
    nn.init.normal_(linear.weight, std=1e-4)
    schedule = settings(steps=500, learning_rate=1e-5, seed=0)
    assert schedule.warmup_steps == 50
    train_on_noise(linear.to(dtype), schedule)
    return linear.weight.float().norm().item() * d / size


@pytest.mark.parametrize(
    ("d", "dtype", "norm"),
    [(768, torch.bfloat16, 0.127), (1024, torch.bfloat16, 0.169), (768, torch.float32, 0.1295)],
)
def test_noise_ends_at_the_norms_the_paper_shows_for_its_early_layers(d, dtype, norm):
    """The paper trains its weights in bfloat16; ours are fp32 and end 2 % higher."""
    assert skip_norm(d, 128, dtype) == pytest.approx(norm, rel=0.01)


@pytest.mark.slow
def test_noise_of_a_large_matrix():
    """The norm of so many elements varies by 0.2 %."""
    assert skip_norm(768, 384, torch.bfloat16) == pytest.approx(0.127, abs=0.0005)


def test_noise_is_another_stream_than_the_initialisation():
    torch.manual_seed(1)
    start = torch.randn(64)
    assert not torch.equal(start, torch.randn(64, generator=torch.Generator().manual_seed(noise_seed(1))))
    assert noise_seed(1) != noise_seed(2)


def test_shuffled_targets_keep_their_frequencies_and_lose_their_order():
    plain, shuffled = BlockDataset(BLOCKS, 20, seed=3), BlockDataset(BLOCKS, 20, seed=3, shuffled=True)
    for index in range(20):
        item = shuffled[index]
        ids, labels = item["input_ids"], item["labels"]
        assert torch.equal(ids, plain[index]["input_ids"])
        assert not torch.equal(labels, ids)
        assert labels[0] == ids[0]  # never predicted, so the predicted tokens are the same multiset
        assert Counter(labels[1:].tolist()) == Counter(ids[1:].tolist())
        assert torch.equal(labels, shuffled[index]["labels"])
    padded = torch.cat([torch.arange(8), torch.full((4,), -100)])
    labels = shuffle_targets(padded, 0, 0)
    assert sorted(labels[1:8].tolist()) == list(range(1, 8))
    assert labels[8:].tolist() == [-100] * 4
    ids = torch.arange(64)
    assert not torch.equal(shuffle_targets(ids, 0, 0), shuffle_targets(ids, 0, 1))
    assert not torch.equal(shuffle_targets(ids, 0, 0), shuffle_targets(ids, 1, 0))


def test_shuffled_trains_on_the_shuffled_labels(tmp_path):
    rows = train(model(), tmp_path, control="shuffled")
    data = BlockDataset(BLOCKS, 24, seed=1, shuffled=True)
    ids = torch.stack([data[i]["input_ids"] for i in range(4)])
    labels = torch.stack([data[i]["labels"] for i in range(4)])
    assert rows[0]["loss"] == pytest.approx(model()(input_ids=ids, labels=labels).loss.item(), abs=1e-5)


@pytest.mark.parametrize("init_weights", ["paper", "identity"])
def test_equal_step_gives_every_layer_the_same_ratio(tmp_path, init_weights):
    peft_model = model(init_weights)
    before = {name: p.detach().clone() for name, p in trainable(peft_model).items()}
    ratios: list[dict[str, list[float]]] = []

    def observe(step, note=""):
        parts = {"up": [], "down": [], "skip": []}
        for name, p in trainable(peft_model).items():
            part, size = name.split(".")[-3], before[name].norm()
            parts[part].append(((p - before[name]).norm() / (size if size > 0 else 1.0)).item())
            before[name] = p.detach().clone()
        ratios.append(parts)

    rows = train(peft_model, tmp_path, advance=observe, equal_step=True)
    for row, step in zip(rows, ratios, strict=True):
        for part, values in step.items():
            assert len(values) == 3
            assert values == pytest.approx([values[0]] * 3, rel=1e-5, abs=1e-12)
            (common,) = [value for name, value in row["step_ratio"].items() if f".{part}." in name]
            assert common == pytest.approx(values[0], rel=1e-5, abs=1e-12)
    assert all(values[0] > 0 for values in ratios[-1].values())


def test_equal_step_keeps_direction_and_mean_of_the_proposed_updates():
    stack = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))})
    old = [layer.weight.detach().clone() for layer in stack["layers"]]
    control = EqualStep(stack)
    proposed = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) * 10.0**-i for i in range(3)]
    control.before_step()
    with torch.no_grad():
        for layer, update in zip(stack["layers"], proposed, strict=True):
            layer.weight.add_(update)
    control.after_step()
    mean = np.mean([(update.norm() / w.norm()).item() for update, w in zip(proposed, old, strict=True)])
    assert control.ratios == {"layers.*.weight": pytest.approx(mean, rel=1e-5)}
    for layer, update, w in zip(stack["layers"], proposed, old, strict=True):
        expected = w + update / update.norm() * mean * w.norm()
        assert torch.allclose(layer.weight, expected, atol=1e-5)


def test_equal_step_leaves_a_layer_without_an_update_alone():
    stack = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))})
    old = [layer.weight.detach().clone() for layer in stack["layers"]]
    control = EqualStep(stack)
    control.before_step()
    with torch.no_grad():
        stack["layers"][0].weight.add_(0.5)
        stack["layers"][1].weight.mul_(1.5)
    control.after_step()
    ratios = [((layer.weight - w).norm() / w.norm()).item() for layer, w in zip(stack["layers"], old, strict=True)]
    assert ratios[2] == 0.0
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


@pytest.mark.parametrize("changes", [{"equal_step": True}, {"control": "shuffled"}])
def test_resume_is_bit_identical(tmp_path, changes):
    whole = model()
    rows = train(whole, tmp_path / "whole", **changes)

    class Stopped(Exception):
        pass

    def stop(step, note=""):
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(model(), tmp_path / "parts", advance=stop, **changes)
    resumed = model()
    rows_resumed = train(resumed, tmp_path / "parts", **changes)
    assert torch.equal(weights(resumed), weights(whole))
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in r] for r in (rows, rows_resumed)]
    assert untimed[0] == untimed[1]


def test_an_unknown_control_is_refused():
    with pytest.raises(PreskipError, match="control='random' is not possible: choose none, noise, shuffled"):
        settings(control="random")

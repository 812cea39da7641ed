"""Reuse of frozen first layers: every loss, weight and score has the bits of a training and scoring without it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import zoo
from preskip import PreskipConfig
from preskip.data.blocks import Window
from preskip.evaluate.likelihood import score_sequences
from preskip.train.frozen import train_frozen
from preskip.train.kept_states import KeptStates
from preskip.train.prefix import FrozenPrefix
from preskip.train.settings import TrainingSettings

LAYERS, FIRST = 4, 3
SETTINGS = {
    "llama": {},
    "gpt_neox": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4},
    "gpt2": {"n_layer": LAYERS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "falcon": {},  # its layers give tuples
}
BLOCKS = np.random.default_rng(0).integers(2, zoo.VOCABULARY, (16, 16)).astype(np.int32)
WINDOWS = [Window(row[: 4 + number].tolist(), 1 + number % 3) for number, row in enumerate(BLOCKS[:8])]


def late(family: str, first: int = FIRST, **settings):
    """A model with 4 layers, an adapter in the last, and its prefix."""
    own = {"num_hidden_layers": LAYERS} if family != "gpt2" else {}
    base = zoo.build(family, **{**own, **SETTINGS.get(family, {}), **settings})
    prefix = FrozenPrefix(base, "base")
    torch.manual_seed(0)
    config = PreskipConfig(
        layers_to_transform=list(range(first, LAYERS)), init_weights="paper", init_std=0.1, dropout=0.1
    )
    return get_peft_model(base, config).eval(), prefix


def train(model, folder, advance=None, **changes):
    options = {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "seed": 1, "save_steps": 1}
    settings = TrainingSettings(**{**options, **changes})
    more = {} if advance is None else {"advance": advance}
    where = {"arm": "preskip", "checkpoints": folder / "checkpoints", "log": folder / "train.jsonl"}
    rows = train_frozen(model, BLOCKS, settings, **where, **more)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def scores(model):
    return [(score.nll, score.greedy) for score in score_sequences(model, WINDOWS, batch_tokens=32)]


@pytest.mark.parametrize("family", SETTINGS)
def test_trainings_and_scores_have_the_same_bits(family, tmp_path):
    """A training that keeps, one that reads, and one that goes on from a checkpoint in the middle."""
    model, _ = late(family)
    weights, rows = train(model, tmp_path / "plain")
    model.eval()
    expected = scores(model)
    kept = KeptStates(tmp_path / "kept")

    class Stopped(Exception):
        pass

    def stop(step, note=""):
        if step == 2:
            raise Stopped

    for number, (advance, reused) in enumerate([(stop, 0), (None, 2), (None, 8)]):
        model, prefix = late(family)
        assert prefix.untrained_layers(model) == FIRST
        folder = tmp_path / f"reused-{max(1, number)}"  # the second goes on where the first was stopped
        with prefix.reused(kept, training=FIRST, scoring=FIRST) as passes:
            if advance is not None:
                with pytest.raises(Stopped):
                    train(model, folder, advance)
                continue
            own, own_rows = train(model, folder)
            assert passes.reused == reused  # of 2 passes per step; step 2 had been begun
            trained = passes.passes
            model.eval()
            assert scores(model) == expected
        assert torch.equal(own, weights)
        assert own_rows == rows
        assert passes.reused - reused == (0 if number == 1 else passes.passes - trained)
    model.eval()
    assert scores(model) == expected  # outside, nothing is left of it


def test_gradient_checkpointing_and_one_large_batch(tmp_path):
    changes = {"gradient_checkpointing": True, "micro_batch_size": 4, "steps": 3}
    model, _ = late("llama")
    plain = train(model, tmp_path / "plain", **changes)
    for number in range(2):
        model, prefix = late("llama")
        with prefix.reused(KeptStates(tmp_path / "kept"), training=FIRST) as passes:
            weights, rows = train(model, tmp_path / str(number), **changes)
        assert torch.equal(weights, plain[0])
        assert rows == plain[1]
        assert passes.reused == 3 * number


def test_what_is_damaged_is_computed_again(tmp_path):
    kept = KeptStates(tmp_path / "kept")
    model, prefix = late("llama")
    with prefix.reused(kept, scoring=FIRST):
        expected = scores(model)
    files = {path: path.read_bytes() for path in kept.folder.iterdir()}
    for path, content in files.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with prefix.reused(kept, scoring=FIRST) as passes:
        assert scores(model) == expected
    assert (passes.passes, passes.reused) == (len(files), 0)
    assert {path: path.read_bytes() for path in kept.folder.iterdir()} == files


def test_the_untouched_base_keeps_what_arms_of_several_depths_read(tmp_path):
    kept = KeptStates(tmp_path)
    base = zoo.build("llama", num_hidden_layers=LAYERS)
    with FrozenPrefix(base, "base").reused(kept, keep={2, 3}) as passes:
        scores(base)
    assert len(list(tmp_path.iterdir())) == 2 * passes.passes
    for first in (2, 3):
        model, prefix = late("llama", first)
        expected = scores(model)
        with prefix.reused(kept, scoring=first) as passes:
            assert scores(model) == expected
        assert passes.passes == passes.reused > 0


def test_other_texts_bases_dtypes_depths_and_threads_have_other_names(tmp_path):
    def names(prefix, model, ids, **depth):
        kept = KeptStates(tmp_path / str(len(list(tmp_path.iterdir()))))
        with prefix.reused(kept, **depth), torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        return {path.name for path in kept.folder.iterdir()}

    ids = torch.from_numpy(BLOCKS[:2].astype(np.int64))
    model, prefix = late("llama")
    own = names(prefix, model, ids, scoring=FIRST)
    assert names(prefix, model, ids, scoring=FIRST) == own
    others = [names(prefix, model, ids, scoring=FIRST - 1), names(prefix, model, ids.flip(0), scoring=FIRST)]
    others += [names(prefix, model, ids.view(1, -1), scoring=FIRST)]
    others += [names(FrozenPrefix(model.get_base_model(), "other"), model, ids, scoring=FIRST)]
    model.train()
    others += [names(prefix, model, ids, training=FIRST)]
    model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others += [names(prefix, model, ids, scoring=FIRST)]
    torch.set_num_threads(threads)
    assert len(own.union(*others)) == len(own) + len(others) == 7


def test_passes_that_depend_on_more_than_the_tokens_are_computed_as_they_are(tmp_path):
    model, prefix = late("llama")
    ids = torch.from_numpy(BLOCKS[:2].astype(np.int64))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    calls = [
        {"input_ids": ids, "attention_mask": mask, "use_cache": False},
        {"input_ids": ids, "position_ids": torch.arange(3, 19)[None], "use_cache": False},
        {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "use_cache": False},
        {"input_ids": ids, "output_hidden_states": True, "use_cache": False},
        {"input_ids": ids},  # with a cache
    ]
    with torch.inference_mode():
        expected = [model(**call).logits for call in calls]
        written = model.generate(ids, max_new_tokens=4, do_sample=False)
        with prefix.reused(KeptStates(tmp_path), scoring=FIRST) as passes:
            model(input_ids=ids, use_cache=False)
            assert all(torch.equal(model(**call).logits, own) for call, own in zip(calls, expected, strict=True))
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
    assert (passes.passes, passes.reused) == (1, 0)


def test_who_watches_the_layers_sees_them_computed(tmp_path):
    model, prefix = late("llama")
    ids, seen = torch.from_numpy(BLOCKS[:2].astype(np.int64)), []
    with prefix.reused(KeptStates(tmp_path), scoring=FIRST) as passes, torch.inference_mode():
        for watched in (False, True, False):
            handle = prefix.blocks[0].mlp.register_forward_hook(lambda *args: seen.append(args[-1]))
            if not watched:
                handle.remove()
            model(input_ids=ids, use_cache=False)
            handle.remove()
    assert len(seen) == 1
    assert (passes.passes, passes.reused) == (2, 1)


def test_where_the_first_trained_weight_is():
    base = zoo.build("llama", num_hidden_layers=LAYERS)
    prefix = FrozenPrefix(base, "base")
    base.requires_grad_(False)
    assert prefix.untrained_layers(base) == 0  # nothing is trained
    base.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    assert prefix.untrained_layers(base) == 2
    base.model.norm.weight.requires_grad_(True)
    assert prefix.untrained_layers(base) == 0
    lora = get_peft_model(zoo.build("llama", num_hidden_layers=LAYERS), LoraConfig(target_modules=["q_proj"]))
    assert FrozenPrefix(lora.get_base_model(), "base").untrained_layers(lora) == 0


def fault(family, training, around=nullcontext, **settings):
    model, prefix = late(family, **settings)
    before = torch.random.get_rng_state()
    with around(model):
        found = prefix.fault(model, FIRST, training=training)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    return found


@pytest.mark.parametrize("family", [*SETTINGS, "mixtral", "bloom", "opt_post_norm"])
def test_models_whose_scores_can_be_reused(family):
    assert fault(family, False) is None


def test_random_layers_are_found():
    assert fault("gpt2", True, attn_pdrop=0.1) == "they give other states for the same tokens, as with dropout"
    assert fault("gpt2", False, attn_pdrop=0.1) is None
    assert fault("gpt2", True) is None


class Sharing:
    """The last layer reads what the first one leaves, beside the hidden states."""

    def __init__(self, model):
        first, *_, last = model.get_base_model().model.layers
        left = []
        hooks = [first.register_forward_hook(lambda block, args, output: left.append(output))]
        hooks += [last.register_forward_hook(lambda block, args, output: output + left[-1])]
        self.hooks = hooks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


class MoreGiven:
    """The decoder is given one thing more beside the token ids, as Gemma 4's is from transformers 5.18 on."""

    def __init__(self, model):
        add = lambda decoder, args, kwargs: (args, {**kwargs, "per_layer_inputs": torch.zeros(1)})  # noqa: E731
        decoder = model.get_base_model().model
        self.hook = decoder.register_forward_pre_hook(add, with_kwargs=True, prepend=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def test_a_decoder_that_is_given_more_than_tokens_is_found():
    assert fault("llama", False, around=MoreGiven) == "the decoder is given more than token ids"


@pytest.mark.parametrize("training", [True, False])
def test_later_layers_that_read_more_than_the_states_are_found(training):
    assert fault("llama", training, around=Sharing) == "later layers need more of them than their output"
    shared = {
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention"] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    assert fault("gemma3n", training, **shared) is not None  # keys and values of an earlier layer


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_run_again_after_later_ones_are_found(training):
    """While the adapter is the identity, what is read back equals what is computed; once it is trained it does not."""
    model, prefix = late("llama")
    decoder = model.get_base_model().model
    decoder.layers = zoo.Looped(decoder.layers)
    found = prefix.fault(model, FIRST, training=training)
    assert found == "layers run several times in a pass, and read what later ones gave"


def test_a_routers_term_over_all_layers_is_found():
    model, prefix = late("mixtral", output_router_logits=True, router_aux_loss_coef=5.0)
    assert prefix.fault(model, FIRST, training=True) is not None

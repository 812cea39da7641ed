"""Two processes over gloo: DDP equals one process, FSDP2 equals DDP, and half a model on each reads like the whole."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ddp_loop
import killing
import two_processes as jobs
from preskip import PreskipConfig, bake
from preskip.errors import PreskipError

pytestmark = pytest.mark.slow

CASES = [f"{kind}/{family}" for family in jobs.FAMILIES for kind in ("probe", "scratch")]
CASES += ["probe/bf16", "probe/accumulated"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the results of one process (one/), and of two with DDP (ddp/) and FSDP2 (fsdp/)."""
    folder = tmp_path_factory.mktemp("strategies")
    with torch.random.fork_rng():
        for family in jobs.FAMILIES:
            jobs.tiny_model(f"preskip_{family}").save_pretrained(folder / "saved" / family)
        adapted = get_peft_model(jobs.tiny_model("llama"), PreskipConfig(init_weights="paper", skip_init_std=0.1))
        bake(adapted, folder / "saved" / "baked")
        jobs.train_all(folder / "one")
    assert killing.crew(jobs.train_and_read, folder, killing.DDP) == [0, 0], killing.log(folder)
    return folder


def rows(folder, strategy, case):
    return json.loads((folder / strategy / "rows.json").read_text())[case]


def weights(folder, strategy, case):
    (file,) = (folder / strategy / case / "model").glob("*.safetensors")
    return load_file(file)


def assert_equal(folder, case, strategy, other, tolerance=1e-5):
    for row, expected in zip(rows(folder, strategy, case), rows(folder, other, case), strict=True):
        assert row["step"] == expected["step"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=tolerance)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], abs=tolerance)
        assert row["tokens"] == expected["tokens"] == jobs.BATCH * jobs.BLOCKS.shape[1]
    trained, expected = weights(folder, strategy, case), weights(folder, other, case)
    assert trained.keys() == expected.keys()
    for name, weight in trained.items():
        assert torch.allclose(weight, expected[name], atol=tolerance), name


@pytest.mark.parametrize("case", CASES)
def test_ddp_equals_one_process(done, case):
    # In bfloat16 each process rounds the gradient of its share of the batch before they are added.
    assert_equal(done, case, "ddp", "one", tolerance=1e-3 if case.endswith("bf16") else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_equals_ddp(done, case):
    assert_equal(done, case, "fsdp", "ddp")


def test_the_trainings_move(done):
    """Equal because nothing happened would prove nothing."""
    for case in CASES:
        losses = [row["loss"] for row in rows(done, "one", case)]
        assert len(losses) == jobs.STEPS
        assert max(losses) - min(losses) > 1e-3
        before = load_file(done / "one" / case / "checkpoints" / "checkpoint-2" / checkpoint_file(case))
        after = load_file(done / "one" / case / "checkpoints" / "checkpoint-4" / checkpoint_file(case))
        assert any((after[name] - before[name]).abs().max() > 1e-3 for name in after)


def checkpoint_file(case):
    return "adapter_model.safetensors" if case.startswith("probe") else "model.safetensors"


def test_a_block_is_sharded_with_its_branch(done):
    units = json.loads((done / "units.json").read_text())
    for kind, prefix in (("probe", "base_model.model.model."), ("scratch", "model.")):
        assert {f"{prefix}layers.0", f"{prefix}layers.1", ""} <= set(units[kind])
        assert not [unit for unit in units[kind] if "self_attn" in unit]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpoints_of_two_processes_are_read_by_one(done, strategy):
    """Checkpoints within the training and what is saved at its end are plain safetensors of whole weights."""
    for case in ("scratch/gemma3_text", "probe/gpt_neox"):
        checkpoint = done / strategy / case / "checkpoints" / f"checkpoint-{jobs.STEPS}"
        stored = load_file(checkpoint / checkpoint_file(case))
        final = weights(done, strategy, case)
        assert all(torch.equal(stored[name], final[name]) for name in final)
        assert stored.keys() - final.keys() <= {"lm_head.weight"}  # FSDP's holds the tied head, too
        ids = torch.from_numpy(jobs.BLOCKS[:2]).long()
        logits = []
        for folder in (checkpoint, done / strategy / case / "model", done / "one" / case / "model"):
            if case.startswith("probe"):
                model = PeftModel.from_pretrained(jobs.tiny_model("gpt_neox"), str(folder)).eval()
            else:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                logits.append(model(input_ids=ids).logits)
        assert torch.equal(logits[0], logits[1])
        assert torch.allclose(logits[0], logits[2], atol=1e-4)


def test_one_process_goes_on_where_two_stopped(done, tmp_path):
    for kind, train in (("probe", jobs.probe), ("scratch", jobs.scratch)):
        begun = done / "ddp" / kind / "llama" / "checkpoints" / "checkpoint-2"
        shutil.copytree(begun, tmp_path / kind / "checkpoints" / "checkpoint-2")
        with torch.random.fork_rng():
            resumed = train("llama", tmp_path / kind)
        expected = rows(done, "one", f"{kind}/llama")
        assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
        (file,) = (tmp_path / kind / "model").glob("*.safetensors")
        for name, weight in load_file(file).items():
            assert torch.allclose(weight, weights(done, "one", f"{kind}/llama")[name], atol=1e-5), name


def test_a_sharded_training_does_not_go_on_unsharded(done, tmp_path):
    begun = done / "fsdp" / "probe" / "llama" / "checkpoints" / "checkpoint-2"
    shutil.copytree(begun, tmp_path / "checkpoints" / "checkpoint-2")
    with pytest.raises(PreskipError, match="began with FSDP: start it the same way again"), torch.random.fork_rng():
        jobs.probe("llama", tmp_path)


@pytest.mark.parametrize("name", [*jobs.FAMILIES, "baked"])
def test_tensor_parallel_reads_like_the_whole(done, name):
    told = json.loads((done / "halves.json").read_text())[name]
    model = AutoModelForCausalLM.from_pretrained(done / "saved" / name, dtype=torch.float32).eval()
    ids = torch.from_numpy(jobs.BLOCKS[:2]).long()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.allclose(torch.tensor(told["logits"]), logits, atol=1e-5)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == told["generated"]
    attention = "query_key_value" if name == "gpt_neox" else "q_proj"
    assert any(attention in weight for weight in told["split"])
    assert not any(".preskip." in weight for weight in told["split"])


def test_a_loop_of_ones_own_in_two_processes_equals_one_with_twice_the_batch(tmp_path):
    model = ddp_loop.adapted()
    alone = torch.tensor(ddp_loop.train_steps(model, slice(0, 4)))
    assert killing.crew(ddp_loop.train_half, tmp_path, killing.DDP) == [0, 0], killing.log(tmp_path)
    two = torch.load(tmp_path / "results.pt")
    assert (two["losses"] - alone).abs().max() < 1e-5
    for key, weight in ddp_loop.branch_weights(model).items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-4, msg=key)

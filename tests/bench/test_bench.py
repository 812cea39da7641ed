"""`preskip bench` on tiny models: what each row is, that it is checked, and the counts beside it; never a time."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.cache_utils import StaticLayer

import zoo
from commands import preskip
from preskip import PreskipConfig, PreskipError, optimizing
from preskip.bench import models, run
from preskip.bench.counts import Limits, free_memory
from preskip.bench.models import Row, random_base
from preskip.bench.run import bench
from preskip.bench.runners import Runner
from preskip.bench.settings import COMPILED, ROWS, BenchSettings, Work
from preskip.cli.bench import print_bench
from preskip.peers.insert import attach_peers

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LIMITS = Limits(flops_per_second=1e9, bytes_per_second=1e9)
WORK = (
    Work(kind="prefill", batch=1, tokens=7),
    Work(kind="decode", batch=1, tokens=7, new_tokens=3, cache="dynamic"),
    Work(kind="decode", batch=2, tokens=7, new_tokens=3, cache="static"),
    Work(kind="decode", batch=1, tokens=7, new_tokens=3, cache="quantized"),
    Work(kind="scoring", batch=2, tokens=9),
    Work(kind="training", batch=2, tokens=9),
)


def base(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | changes), dtype=dtype).eval()


def settings(*rows, work=WORK):
    return BenchSettings(rows=rows, work=work, rounds=2)


@pytest.fixture(scope="module")
def found():
    """All rows that are not compiled, in bfloat16."""
    return bench(base(), settings(*(name for name in ROWS if name not in COMPILED)), LIMITS)


def test_every_row_passes_the_check_of_its_logits_on_every_work(found):
    assert found["left_out"] == {}
    for work in found["work"]:
        assert work["left_out"] == {}, work["title"]
        rows = {"adapter", "lora"} if work["work"] == "training" else set(ROWS) - set(COMPILED)
        assert set(work["rows"]) == rows


def test_work_that_no_row_takes_part_in_is_left_out_and_named():
    found = bench(base(), settings("base", "baked"), LIMITS)
    (title,) = found["left_out"]
    assert title.startswith("training, ")
    assert found["left_out"][title] == "only adapter and lora train"
    assert [work["title"] for work in found["work"] if work["work"] == "training"] == []
    assert all(set(work["rows"]) == {"base", "baked"} for work in found["work"])


def test_the_cache_of_a_model_with_canon_is_read_with_its_last_tokens():
    plain, mixing = base(), base()
    attach_peers(mixing, {"canon-a": {}}, identity=True)
    work = tuple(one for one in WORK if one.cache in ("dynamic", "static"))
    its, own = (bench(model, settings("base", work=work), LIMITS)["work"] for model in (plain, mixing))
    of_tails = 3 * SIZES["hidden_size"] * SIZES["num_hidden_layers"] * plain.dtype.itemsize
    assert own[0]["rows"]["base"]["cache_bytes"] == its[0]["rows"]["base"]["cache_bytes"] + of_tails
    assert own[1]["left_out"] == {"base": "this model's static cache cannot be set back to a length"}


def test_weights_bytes_and_flops_of_the_rows(found):
    rows = found["rows"]
    branch = 3 * int(3.5 * 64**2)
    assert rows["adapter"]["weights"] - rows["base"]["weights"] == branch
    assert rows["baked"]["weights"] == rows["adapter"]["weights"] == rows["int8"]["weights"]
    for name in ("adapter", "optimized", "baked"):
        assert rows[name]["weight_bytes_read"] - rows["base"]["weight_bytes_read"] == 2 * branch
        assert rows[name]["flops_per_token"] - rows["base"]["flops_per_token"] == 2 * branch
    scales = 3 * (80 + 64 + 64)
    assert rows["int8"]["weight_bytes_read"] - rows["base"]["weight_bytes_read"] == branch + 2 * scales
    assert rows["lora"]["weights"] - rows["base"]["weights"] == pytest.approx(branch, rel=0.005)
    assert rows["lora"]["weight_bytes_read"] - rows["base"]["weight_bytes_read"] == pytest.approx(4 * branch, rel=0.01)
    assert rows["lora-merged"]["weight_bytes_read"] == rows["base"]["weight_bytes_read"]
    assert rows["last-third"]["weights"] - rows["base"]["weights"] == branch // 3
    assert rows["skip"]["weights"] - rows["base"]["weights"] == 3 * 64**2
    assert rows["low-rank"]["weights"] - rows["base"]["weights"] == 3 * (2 * 80 * 64 + 2 * 64 * 8)
    assert rows["bottleneck"]["weights"] - rows["base"]["weights"] == 3 * (2 * 16 * 64 + 2 * 64 * 8)
    assert rows["baked"]["file_bytes"] < rows["adapter"]["file_bytes"]  # the branch in the base's dtype


def test_each_ratio_is_paired_and_beside_what_is_owed(found):
    for work in found["work"]:
        for name, entry in work["rows"].items():
            against = "lora" if work["work"] == "training" else "base"
            if name == against:
                assert "ratio" not in entry
                continue
            assert entry["held_against"] == against
            owed = max(entry["flops"], entry["bytes"]) / 1e9
            other = work["rows"][against]
            assert entry["seconds_owed"] == pytest.approx(owed)
            assert entry["ratio_owed"] == pytest.approx(owed / other["seconds_owed"])
            assert entry["times_of_limit"] == pytest.approx(entry["ratio"] / entry["ratio_owed"])
            assert entry["ratio_low"] <= entry["ratio"] <= entry["ratio_high"]


def test_a_branch_leaves_the_cache_as_it_is_and_adds_these_operations(found):
    decode = next(work for work in found["work"] if work["work"] == "decode")
    rows = decode["rows"]
    assert {entry["cache_bytes"] for entry in rows.values()} == {2 * 7 * 2 * 3 * 2 * 16 + 3 * 2 * 3 * 2 * 2 * 16}
    # Per layer: three products, the activation, and two sums.
    for name in ("adapter", "optimized", "baked"):
        assert rows[name]["operations"] - rows["base"]["operations"] == 3 * 6
    assert rows["lora-merged"]["operations"] == rows["base"]["operations"]
    assert rows["lora"]["operations"] - rows["base"]["operations"] >= 3 * 4 * 4  # four layers: A, B, scale, sum


def test_peak_memory_has_the_copies_of_the_branches(found):
    """Beside a bfloat16 base the adapter keeps a cast one, the optimised adapter a packed one, too."""
    branch = 3 * int(3.5 * 64**2)
    rows = next(work for work in found["work"] if work["work"] == "decode")["rows"]
    base = rows["base"]["peak_bytes"]
    packed = optimizing._packs_bfloat16()
    activations = 2_000  # of a branch, about as much in every row
    assert rows["baked"]["peak_bytes"] - base == pytest.approx(2 * branch, abs=activations)
    assert rows["adapter"]["peak_bytes"] - base == pytest.approx((4 + 2) * branch, abs=activations)
    assert rows["optimized"]["peak_bytes"] - base == pytest.approx((4 + 2 + 2 * packed) * branch, abs=activations)
    # The inner width of 80 is padded to 128, and every output has a scale.
    padded = 3 * (2 * 128 * 64 + 64**2)
    scales = 3 * 2 * (80 + 64 + 64 + 128 + 64 + 64)
    assert rows["int8"]["peak_bytes"] - base == pytest.approx(branch + padded + scales, abs=activations)


def test_compiled_rows_are_one_graph_that_decoding_does_not_compile_again(monkeypatch):
    torch.compiler.reset()
    real = models.compile_model
    monkeypatch.setattr(models, "compile_model", lambda model, device: real(model, device, backend="eager"))
    work = (Work(kind="decode", batch=1, tokens=7, new_tokens=4, cache="static"),)
    found = bench(base(torch.float32, num_hidden_layers=1), settings("base", *COMPILED, work=work), LIMITS)
    rows = found["work"][0]["rows"]
    assert set(rows) == {"base", *COMPILED}
    for name in COMPILED:
        assert rows[name]["recompiles"] == 0
        assert rows[name].get("held_against") == (None if name == "base-compiled" else "base-compiled")


def test_a_row_that_does_not_compile_is_left_out_and_the_others_are_kept(monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    torch.compiler.reset()
    real = models.compile_model
    monkeypatch.setattr(models, "compile_model", lambda model, device: real(model, device, backend=no_compiler))
    work = (Work(kind="decode", batch=1, tokens=7, new_tokens=2, cache="static"),)
    (found,) = bench(base(torch.float32), settings("base", "adapter", "base-compiled", work=work), LIMITS)["work"]
    assert set(found["rows"]) == {"base", "adapter"}
    assert set(found["left_out"]) == {"base-compiled"}
    told = found["left_out"]["base-compiled"]
    assert told.startswith("does not compile: ")
    assert "No working C++ compiler found" in told
    assert "\n" not in told


def test_a_compiled_row_is_captured_before_it_is_timed_on_cuda():
    def runs(name, device):
        done = []
        row = models.Row(name=name, model=None, forward=done.append, kind="base", held_against="base")
        ids = SimpleNamespace(device=torch.device(device))
        steps = {"before": lambda: done.append("before"), "run": lambda: done.append("run")}
        run._warm_up(SimpleNamespace(row=row, ids=ids, **steps))
        return done

    assert runs("base", "cuda") == runs("base-compiled", "cpu") == ["before", "run"]
    assert runs("base-compiled", "cuda") == 3 * ["before", "run"]


@pytest.mark.parametrize(
    ("name", "error"), [("base", RuntimeError("why")), ("base-compiled", torch.OutOfMemoryError("why"))]
)
def test_what_else_fails_in_a_first_run_is_not_said_of_compiling(name, error):
    def fails():
        raise error

    row = models.Row(name=name, model=None, forward=fails, kind="base", held_against="base")
    with pytest.raises(type(error), match="why"):
        run._warm_up(SimpleNamespace(row=row, ids=torch.zeros(1, 1), before=lambda: None, run=fails))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_wrong_logits_gets_no_time(dtype, monkeypatch):
    real = models.Rows._baked

    def broken(self):
        model = real(self)
        with torch.no_grad():
            model.model.layers[1].self_attn.preskip.skip.weight.mul_(-2)
        return model

    monkeypatch.setattr(models.Rows, "_baked", broken)
    work = (WORK[0], WORK[1], WORK[4])
    found = bench(base(dtype), settings("base", "adapter", "baked", work=work), LIMITS)
    for entry in found["work"]:
        assert set(entry["rows"]) == {"base", "adapter"}
        assert "wrong logits" in entry["left_out"]["baked"]


def test_caches_of_other_sizes_are_an_error(monkeypatch):
    sizes = iter(range(100))
    monkeypatch.setattr(run, "cache_bytes", lambda cache: next(sizes))
    with pytest.raises(PreskipError, match="K/V caches differ"):
        bench(base(), settings("base", "adapter", work=WORK[:1]), LIMITS)


def test_the_float32_reference_is_made_without_another_copy_in_the_dtype_of_the_base():
    model = base()
    model.model.layers[1].self_attn.q_proj.float()  # as a branch's weights beside a bfloat16 base
    found = models.sharing(model, float32=True)
    ours, theirs = dict(found.named_parameters()), dict(model.named_parameters())
    assert {p.dtype for p in ours.values()} == {torch.float32}
    assert all(torch.equal(p, theirs[name].float()) for name, p in ours.items())
    assert found.lm_head.weight is found.model.embed_tokens.weight
    shared = "model.layers.1.self_attn.q_proj.weight"
    assert [name for name, p in ours.items() if p.data_ptr() == theirs[name].data_ptr()] == [shared]
    assert model.dtype == torch.bfloat16


def test_training_a_loaded_adapter_owes_what_a_random_one_does(tmp_path):
    get_peft_model(base(), PreskipConfig()).save_pretrained(tmp_path)
    work = (Work(kind="training", batch=1, tokens=5),)
    loaded, random = (
        bench(base(), settings("adapter", work=work), LIMITS, adapter=adapter) for adapter in (tmp_path, None)
    )
    (ours,), (theirs,) = ([work["rows"]["adapter"] for work in found["work"]] for found in (loaded, random))
    assert ours["flops"] == theirs["flops"]


def test_a_static_cache_that_was_copied_to_its_device_is_set_back(monkeypatch):
    """On CUDA `.to` copies its counts, in inference mode, where a clone stands for it here."""
    plain = StaticLayer.lazy_initialization

    def as_on_cuda(layer, *states):
        plain(layer, *states)
        layer.cumulative_length = layer.cumulative_length.clone()

    monkeypatch.setattr(StaticLayer, "lazy_initialization", as_on_cuda)
    (work,) = bench(base(), settings("base", "adapter", work=WORK[2:3]), LIMITS)["work"]
    assert set(work["rows"]) == {"base", "adapter"}


@pytest.mark.parametrize("steps", [2, 6])
def test_a_static_cache_with_a_sliding_window_is_set_back(steps):
    """Also where the steps before have passed the window, which then holds later tokens."""
    model = zoo.build("mistral", sliding_window=8).eval()
    row = Row(name="base", model=model, forward=model, kind="base", held_against="base")
    ids = torch.arange(2, 2 + 5 + steps)[None]
    runner = Runner(row, Work(kind="decode", batch=1, tokens=5, new_tokens=steps, cache="static"), ids)
    step, found = model.forward, []
    row.forward = lambda **given: found.append(step(**given)) or found[-1]
    for _ in range(3):
        runner.before()
        runner.run()
    logits = torch.stack([out.logits[0, -1] for out in found]).view(3, steps, -1)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("work", [*WORK[:3], *WORK[4:]], ids=lambda work: work.title)
def test_no_row_keeps_the_logits_of_every_position(work):
    row = Row(name="base", model=base(), forward=base(), kind="base", held_against="base")
    runner = Runner(row, work, torch.arange(work.batch * 10).view(work.batch, 10) % 96)
    runner.before()
    runner.run()
    assert runner.logits.untyped_storage().nbytes() == 96 * 2


def test_memory_that_torch_holds_for_later_is_free(monkeypatch):
    for name, value in (("mem_get_info", (5, 9)), ("memory_reserved", 4), ("memory_allocated", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 5 + 4 - 1


def test_a_shape_too_large_for_this_machine_is_refused_before_it_is_made(monkeypatch, capsys):
    monkeypatch.setattr(models, "free_memory", lambda device: 6 * 2**30)
    monkeypatch.setattr(models, "_SHARE_OF_MEMORY", 1.0)
    made: list[torch.device] = []
    real = AutoModelForCausalLM.from_config

    def from_config(*args, **more):
        made.append(torch.get_default_device())
        return real(*args, **more)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    monkeypatch.setattr("preskip.bench.counts.measure_limits", lambda *args: LIMITS)
    assert preskip("bench", "--model-shape", "llama-3-8b", "--dtype", "bfloat16", "--json") == 1
    assert {device.type for device in made} == {"meta"}
    told = capsys.readouterr().err
    assert "one layer of this shape takes 11.7 GiB with its 11 rows, and 6.0 GiB may be used" in " ".join(told.split())


def test_what_does_not_fit_has_fewer_layers_and_its_limits_are_scaled(monkeypatch):
    config = AutoConfig.for_model("llama", **{**SIZES, "num_hidden_layers": 12})
    layer = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64)
    rest = 2 * (96 * 64 + 64)
    own = layer + 2 * 3 * int(3.5 * 64**2)  # merged LoRA's, and of two rows
    monkeypatch.setattr(models, "free_memory", lambda device: (4 * rest + 5.5 * (4 * layer + own)) / 0.8)
    model = random_base(config, torch.bfloat16, torch.device("cpu"), 2)
    assert model.config.num_hidden_layers == 5
    assert random_base(config, torch.bfloat16, torch.device("cpu"), 20).config.num_hidden_layers < 5
    monkeypatch.setattr(models, "free_memory", lambda device: layer)
    with pytest.raises(PreskipError, match=r"one layer of this shape takes .* with its 2 rows"):
        random_base(config, torch.bfloat16, torch.device("cpu"), 2)
    found = bench(model, settings("base", "adapter", work=WORK[:1]), LIMITS, layers=12)
    assert found["layers"] == {"measured": 5, "of": 12}
    whole = AutoModelForCausalLM.from_config(config)
    assert found["rows"]["base"]["weights"] == whole.num_parameters()
    assert found["rows"]["adapter"]["weights"] - whole.num_parameters() == 12 * int(3.5 * 64**2)
    assert found["rows"]["base"]["weight_bytes_read"] == pytest.approx(2 * whole.num_parameters(), rel=1e-2)
    entry = found["work"][0]["rows"]["base"]
    assert entry["seconds_owed_by_all_layers"] / entry["seconds_owed"] == pytest.approx(12 / 5, rel=0.05)


def hybrid(model_type, **more):
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 2}, **more)
    return AutoModelForCausalLM.from_config(config).eval()


def test_layers_without_attention_are_refused_with_what_can_be_done():
    with pytest.raises(PreskipError) as refused:
        bench(hybrid("lfm2", layer_types=["conv", "full_attention"]), settings("base", "adapter"), LIMITS)
    assert "layers_to_transform" not in str(refused.value)
    assert "`preskip probe MODEL --layers attention`" in str(refused.value)


def test_attention_beside_mamba_is_measured_without_lora():
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    found = bench(hybrid("falcon_h1", **sizes), settings("base", "adapter", "lora", work=WORK[:2]), LIMITS)
    assert set(found["rows"]) == {"base", "adapter"}
    assert found["left_out"]["lora"].startswith("PEFT puts no LoRA into this model: ")
    assert all(set(work["rows"]) == {"base", "adapter"} for work in found["work"])


TINY = [
    "bench", "--device", "cpu", "--model-shape", "pythia-14m", "--num-layers", "1", "--dtype", "float32",
    "--rounds", "2",
]  # fmt: skip
SHAPES = {
    "prefill": ["--prompt", "5"],
    "decode": ["--batch", "1", "--context", "5", "--new-tokens", "2"],
    "scoring": ["--scoring", "1x5"],
    "training": ["--training", "1x5"],
}
ALL_SHAPES = [option for options in SHAPES.values() for option in options]


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr("preskip.bench.counts.measure_limits", lambda *args: LIMITS)
    assert preskip(*TINY, *ALL_SHAPES, "--rows", "base,adapter,lora", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"] == {"measured": 1, "of": 6}
    assert [work["work"] for work in printed["work"]] == ["prefill", *3 * ["decode"], "scoring", "training"]
    assert preskip(*TINY, *ALL_SHAPES, "--rows", "base,adapter,lora") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("scaled to all of them" in line for line in lines)
    assert max(len(line) for line in lines if "wrong" not in line) <= 80


def test_a_share_of_layers_that_the_measured_ones_do_not_have_is_left_out():
    """Of 32 layers a third is 11, which no smaller number of layers has; a quarter is 1 of 4, and none of 2."""
    for layers, left_out in ((4, {"last-third"}), (2, {"last-third", "last-quarter"})):
        wanted = settings("base", "last-third", "last-quarter", work=WORK[:1])
        found = bench(base(num_hidden_layers=layers), wanted, LIMITS, layers=32)
        assert set(found["left_out"]) == left_out
        assert set(found["rows"]) == {"base", "last-third", "last-quarter"} - left_out
        told = f"branches in 11 of 32 layers are a share that {layers} layers do not have"
        assert found["left_out"]["last-third"] == told
    assert bench(base(), settings("last-third", work=WORK[:1]), LIMITS)["left_out"] == {}
    found = bench(base(num_hidden_layers=4), settings("base", "last-quarter", work=WORK[:1]), LIMITS, layers=32)
    branch = int(3.5 * 64**2)
    assert found["rows"]["last-quarter"]["weights"] - found["rows"]["base"]["weights"] == 8 * branch


def test_ratios_of_a_cut_model_are_printed_as_those_of_all_layers(capsys):
    """What is owed is that of the whole model, as if all of it had been made."""
    work = (Work(kind="scoring", batch=1, tokens=5),)
    whole, cut = (
        bench(base(num_hidden_layers=layers), settings("base", "adapter", work=work), LIMITS, layers=8)
        for layers in (8, 2)
    )
    environment = {"device": "cpu", "threads": 1}
    owed = []
    for found in (whole, cut):
        (work_found,) = found["work"]
        for entry in work_found["rows"].values():  # a time that is what is owed
            entry |= {"seconds": entry["seconds_owed"]}
        entry = work_found["rows"]["adapter"]
        entry |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"), entry["ratio_owed"]) | {"times_of_limit": 1.0}
        print_bench({"model": "m", "dtype": "bfloat16", "environment": environment, **found})
        table = capsys.readouterr().out.partition("scoring, 1 x 5 tokens")[2]
        cells = {line.split()[0]: line.split() for line in table.splitlines() if line.split()}
        owed.append(cells["adapter"][2:6])
    assert owed[0] == owed[1]
    ratio = owed[0][0]
    assert owed[0] == [ratio, f"[{float(ratio):.2f},", f"{float(ratio):.2f}]", ratio]
    assert float(ratio) > cut["work"][0]["rows"]["adapter"]["ratio_owed"] + 0.02


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model with 32 learned positions, in a folder."""
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_work_beyond_the_models_positions_is_left_out_and_said(short, monkeypatch, capsys):
    monkeypatch.setattr("preskip.bench.counts.measure_limits", lambda *args: LIMITS)
    more = [
        "--device", "cpu", "--dtype", "float32", "--rows", "base,adapter", "--cache", "dynamic", "--batch", "1",
        "--rounds", "2", "--work", "prefill,decode", "--new-tokens", "4",
    ]  # fmt: skip
    assert preskip("bench", short, *more, "--prompt", "8,32,33", "--context", "28", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(work["work"], work["tokens"]) for work in printed["work"]] == [
        ("prefill", 8),
        ("prefill", 32),
        ("decode", 28),
    ]
    assert printed["left_out"] == {"prefill, 1 x 33 tokens": "the model reads at most 32"}
    assert preskip("bench", short, *more, "--prompt", "8", "--context", "29") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "decode per token, batch 1, dynamic cache of 29 tokens: the model reads at most 32" in out
    assert preskip("bench", short, *more, "--prompt", "33", "--context", "29") == 1
    assert capsys.readouterr().err.endswith("error: the model reads at most 32 tokens: give fewer for each work\n")


def test_a_base_with_dropout_is_trained(short):
    model = AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32).eval()
    (work,) = bench(model, settings("base", "adapter", "lora", work=WORK[-1:]), LIMITS)["work"]
    assert (set(work["rows"]), work["left_out"]) == ({"adapter", "lora"}, {})


def test_a_row_without_enough_memory_is_left_out_of_that_work_alone(monkeypatch):
    real = run.Runner

    def runner(row, work, ids):
        if (row.name, work.kind) == ("lora", "training"):
            row.model.train()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(row, work, ids)

    monkeypatch.setattr(run, "Runner", runner)
    work = (WORK[0], WORK[5], WORK[4])
    found = bench(base(), settings("base", "adapter", "lora", work=work), LIMITS)["work"]
    assert [set(entry["rows"]) for entry in found] == [
        {"base", "adapter", "lora"},
        {"adapter"},
        {"base", "adapter", "lora"},
    ]
    assert [entry["left_out"] for entry in found] == [{}, {"lora": "out of memory"}, {}]


def test_a_row_that_runs_out_of_memory_between_others_is_left_out_alone(monkeypatch):
    real, runs = run.synchronise, []

    def limited(device):
        runs.append(device)
        if len(runs) == 5:  # twice around each timed run: before the third row's
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(device)

    monkeypatch.setattr(run, "synchronise", limited)
    (found,) = bench(base(), settings("base", "adapter", "lora", work=WORK[:1]), LIMITS)["work"]
    assert set(found["rows"]) == {"base", "adapter"}
    assert found["left_out"] == {"lora": "out of memory"}
    assert all(entry["seconds"] > 0 for entry in found["rows"].values())


def test_a_row_held_against_nothing_has_no_ratio(monkeypatch, capsys):
    monkeypatch.setattr("preskip.bench.counts.measure_limits", lambda *args: LIMITS)
    for rows, work, expected in (
        ("adapter,optimized", "scoring", {"adapter": "–", "optimized": "–"}),
        ("base,adapter", "training", {"adapter": "–"}),
        ("lora,adapter", "training", {"lora": "1"}),
        ("base,adapter", "scoring", {"base": "1"}),
    ):
        assert preskip(*TINY, *SHAPES[work], "--rows", rows, "--work", work) == 0
        table = capsys.readouterr().out.partition(f"{work}, 1 x 5 tokens")[2]
        cells = {line.split()[0]: line.split()[2:4] for line in table.splitlines() if line.split()}
        for name, text in expected.items():
            assert cells[name] == [text, text], (rows, work, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "base,fast"], "--rows 'fast': choose of base"),
        (["--work", ""], "--work '': choose of prefill"),
        (["--batch", "0"], "--batch '0' is not possible"),
        (["--scoring", "8"], "--scoring '8' is not possible: give rows x tokens"),
        (["--model-shape", "pythia-9b"], "there is no shape 'pythia-9b'"),
        (["--model-shape", "pythia-14m", "--adapter", "."], "give either --adapter or --model-shape"),
        (["gpt2", "--model-shape", "pythia-14m"], "give either the model gpt2 or --model-shape pythia-14m"),
        (["--num-layers", "2"], "--num-layers is for a --model-shape"),
        (["--compiled-work", "decode,training"], "--compiled-work 'training': choose of prefill, decode, scoring"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys):
    assert preskip("bench", *options) == 1
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]


def test_a_model_whose_class_is_code_of_its_repository(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    base(torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    few = ("--rows", "base,adapter", "--work", "prefill", "--prompt", "8", "--rounds", "2")
    given = ("--device", "cpu", "--dtype", "float32", "--trust-remote-code", *few)
    assert preskip("bench", tmp_path, *given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["work"][0]["rows"]) == {"base", "adapter"}

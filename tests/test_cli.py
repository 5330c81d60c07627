"""The command line: exit statuses, one-line errors, JSON alone on stdout. The model is tiny, saved by transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, _core, bench
from sparse_marlin import testing as smt
from sparse_marlin.cli import app
from sparse_marlin.quantize import prune_24_magnitude

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it while the sun goes down " * 20


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def only_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A two-block Llama with random weights and a word tokenizer, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(TEXT.split()))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs(model_folder, capsys):
    whole_model, weights_from_elsewhere, faster = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    name = re.search(r'^name = "(.*)"', whole_model, re.MULTILINE).group(1)
    here: dict[str, object] = {}
    exec(whole_model.replace(name, str(model_folder)), here)
    exec(faster, here)
    names = {type(module).__name__ for module in here["model"].modules()}
    assert names >= {"MergedWeight", "SparseMarlinLinear"}
    assert "14 of 15 linear layers converted" in capsys.readouterr().out
    codes = smt.random_codes(72, 384)
    names = {"torch": torch, "sparse_marlin": sparse_marlin, "codes": codes, "scales": smt.random_scales(72, 384)}
    names |= {"bias": torch.ones(72), "a": torch.randn(2, 3, 384)}
    exec(weights_from_elsewhere, names)
    torch.testing.assert_close(names["layer"](names["a"]), names["out"] + names["bias"])


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_info_names_versions():
    result = run("info")
    assert result.exit_code == 0
    assert sparse_marlin.__version__ in result.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["version"] == sparse_marlin.__version__
    assert str(_core.FORMAT_VERSION) in found["format"]


def test_bench_times_both_and_checks_shapes(monkeypatch):
    monkeypatch.setattr(bench, "MIN_SECONDS", 0.01)
    asked = ("bench", "--shape", "128,96", "--shape", "64,32", "--tokens", 1, "--tokens", 3, "--device", "cpu")
    result = run(*asked, "--group-size", 64, "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)["measured"]
    assert [(row["in_features"], row["out_features"], row["tokens"]) for row in measured] == [
        (128, 96, 1), (128, 96, 3), (64, 32, 1), (64, 32, 3),
    ]  # fmt: skip
    for row in measured:
        assert row["sparse_us"] > 0
        assert row["dense_us"] > 0
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
        assert row["dense_bytes"] == 4 * row["in_features"] * row["out_features"]
    refused = run("bench", "--shape", "10,64", "--device", "cpu")
    assert refused.exit_code == 1
    assert "in_features: expected a positive multiple of 4" in refused.stderr
    assert run("bench", "--shape", "10").exit_code == 2


def test_the_layers_of_bench_are_valid():
    layer = bench.random_layer(128, 96, 64, 4, torch.device("cpu"), torch.float32)
    quads = layer.codes().view(96, -1, 4)
    assert int((quads != 0).sum(dim=-1).max()) == 2
    out = layer(torch.randn(200, 128))
    assert 0.3 < float(out.std()) < 3


def test_version_and_help():
    assert run("--version").stdout == f"sparse-marlin {sparse_marlin.__version__}\n"
    shown = run("--help")
    assert shown.exit_code == 0
    for command in ("demo", "generate", "eval", "compress", "import", "export", "inspect", "bench", "info"):
        assert command in shown.stdout
        assert run(command, "--help").exit_code == 0


def test_module_and_entry_point_are_the_same_program():
    environment = {**os.environ, "PYTHONPATH": str(Path(sparse_marlin.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "sparse_marlin", "info", "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["torch"] == torch.__version__
    assert done.stderr == ""


def test_demo_reports_both_models(model_folder, text_file):
    options = ["--text", text_file, "--prompt", "the quick", "--seq-len", 32, "--max-tokens", 64, "--max-new-tokens", 6]
    result = run("demo", model_folder, "--device", "cpu", "--json", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["report"]["num_converted"] == 14
    assert found["report"]["group_size"] == 64
    assert found["dense"]["scored_tokens"] == found["sparse"]["scored_tokens"] == 62
    assert 1 < found["dense"]["perplexity"] < 200
    assert found["sparse"]["linear_bytes"] < found["dense"]["linear_bytes"]
    assert found["dense"]["linear_bytes"] == found["report"]["bytes_before"]
    assert set(found["seconds"]) == {"load", "dense", "convert", "sparse"}
    for extra, row in (((), "gate_proj"), (("--all",), "model.layers.1.mlp.gate_proj")):
        shown = run("demo", model_folder, "--device", "cpu", *options, *extra)
        assert shown.exit_code == 0, shown.stderr
        assert row in shown.stdout
        assert "perplexity" in shown.stdout
        assert "Converting linears" not in shown.stdout


def test_eval_of_a_dense_and_a_sparse_model(model_folder, text_file):
    options = ["--text", text_file, "--seq-len", 32, "--max-tokens", 96, "--device", "cpu", "--json"]
    dense = json.loads(run("eval", model_folder, "--dense", *options).stdout)
    sparse = json.loads(run("eval", model_folder, "--sparse", "--num-bits", 8, "--group-size", 32, *options).stdout)
    assert (dense["sparse"], sparse["sparse"]) == (False, True)
    assert dense["conversion"] is None
    assert sparse["conversion"]["num_bits"] == 8
    assert sparse["conversion"]["group_size"] == 32
    assert dense["windows"] == 3
    assert dense["perplexity"] != sparse["perplexity"]
    assert "perplexity" in run("eval", model_folder, *options[:-1]).stdout


def test_generate_continues_the_prompt(model_folder):
    options = ["--prompt", "the quick brown", "--max-new-tokens", 5, "--device", "cpu"]
    found = json.loads(run("generate", model_folder, "--json", *options).stdout)
    assert 1 <= len(found["tokens"]) <= 5
    plain = run("generate", model_folder, *options)
    assert plain.stdout.startswith("the quick brown")
    assert found["text"].strip() in plain.stdout


def test_inspect_a_model_folder(model_folder):
    found = json.loads(run("inspect", model_folder, "--json").stdout)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert found["num_convertible"] == 14
    assert layers["lm_head"]["reason"] == "ignored by 'lm_head'"
    down = layers["model.layers.0.mlp.down_proj"]
    assert down["shape"] == [64, 96]
    assert down["is_24"] is False
    assert down["bytes_before"] == 4 * 64 * 96
    assert down["bytes_after"] == 4 * (_core.packed_shape(64, 96, 4)[0] * _core.packed_shape(64, 96, 4)[1] + 64)
    assert "14 of 15 linear layers would be converted" in run("inspect", model_folder).stdout


def test_inspect_a_state_dict_sees_sparsity_and_packed_layers(tmp_path):
    torch.manual_seed(0)
    dense, pruned = nn.Linear(64, 16, bias=False), nn.Linear(64, 16)
    with torch.no_grad():
        pruned.weight.mul_(prune_24_magnitude(pruned.weight))
    model = nn.ModuleDict(
        {
            "dense": dense,
            "pruned": pruned,
            "odd": nn.Linear(30, 16),
            "embed": nn.Embedding(10, 64),
            "four": SparseMarlinLinear.from_linear(nn.Linear(576, 80), group_size=64),
            "eight": SparseMarlinLinear.from_linear(nn.Linear(384, 80), group_size=128, num_bits=8),
            "rows": SparseMarlinLinear.from_linear(nn.Linear(1024, 80), group_size=-1),
        }
    )
    state = model.state_dict()
    state["broken.weight_packed"] = torch.zeros_like(state["four.weight_packed"])
    state["broken.scales"] = state["four.scales"]
    torch.save(state, tmp_path / "state.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in state.items()}, str(tmp_path / "state.safetensors"))
    for name in ("state.pt", "old.pt", "state.safetensors"):
        result = run("inspect", tmp_path / name, "--json")
        assert result.exit_code == 0, result.stderr
        layers = {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]}
        assert "embed" not in layers
        assert (layers["dense"]["is_24"], layers["dense"]["convertible"]) == (False, True)
        assert layers["pruned"]["is_24"] is True
        assert layers["odd"]["reason"] == "in_features 30 is not divisible by 4"
        assert (layers["four"]["num_bits"], layers["four"]["group_size"]) == (4, 64)
        assert (layers["eight"]["num_bits"], layers["eight"]["group_size"]) == (8, 128)
        assert (layers["rows"]["num_bits"], layers["rows"]["group_size"]) == (4, -1)
        assert layers["broken"]["state"] == "unreadable"
        shown = run("inspect", tmp_path / name).stdout
        assert "packed: 8-bit, group size 128" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{folder}", "--text", "nothing-here.txt"], "nothing-here.txt: text: expected a readable file"),
        (["eval", "{empty}"], "expected a directory with config.json or one .gguf file"),
        (
            ["generate", "./no/such/model", "--prompt", "x"],
            "./no/such/model: expected a file or directory, got nothing",
        ),
        (["inspect", "missing.safetensors"], "missing.safetensors: expected a file or directory"),
        (["inspect", "{text}.pt"], "expected a state dict written by torch.save"),
        (["inspect", "{text}.safetensors"], "expected a state dict written by safetensors"),
        (["demo", "./no-model.gguf"], "./no-model.gguf: expected a file or directory"),
        (["generate", "{folder}", "--prompt", "", "--device", "cpu"], "prompt: expected some text"),
        (
            ["generate", "{folder}", "--prompt", "x", "--device", "cuda:99"],
            "--device: expected a device of this machine",
        ),
    ],
)
def test_failures_are_one_line_and_status_one(model_folder, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    for ending in ("pt", "safetensors"):
        (tmp_path / f"text.{ending}").write_text("this is not a checkpoint")
    places = {"folder": model_folder, "empty": tmp_path / "empty", "text": tmp_path / "text"}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("sparse-marlin: ")]
    assert message in only_line("\n".join(errors))
    assert errors[0].startswith("sparse-marlin: error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["inspect"],
        ["generate", "somewhere"],
        ["inspect", "x.pt", "--group-size", "100"],
        ["inspect", "x.pt", "--num-bits", "5"],
        ["eval", "x", "--seq-len", "1"],
        ["eval", "x", "--dtype", "int8"],
        ["eval", "x", "--device", "toaster"],
        ["demo", "--no-such-option"],
    ],
)
def test_wrong_calls_are_status_two(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.strip()


def test_a_text_that_is_not_utf8_is_refused(tmp_path, model_folder):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    result = run("eval", model_folder, "--text", path)
    assert result.exit_code == 1
    assert "expected UTF-8, got a byte that is not at position 3" in result.stderr

"""sparse-marlin compress: the folder that it writes, what it prints, what it refuses, and that it continues."""

import collections
import json
import shutil

import pytest
import torch
from test_cli import TEXT, model_folder, only_line, run  # noqa: F401

import sparse_marlin
from sparse_marlin import SparseMarlinLinear
from sparse_marlin.compress import command

pytestmark = pytest.mark.filterwarnings("ignore:compress. calibration")
OPTIONS = ("--group-size", 32, "--seq-len", 16, "--num-sequences", 32, "--device", "cpu", "--eval-seq-len", 64)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(model_folder, text_file, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("compressed") / "small"
    rank = ("--rank", 8, "--shared-correction")
    done = run("compress", model_folder, out, "--calibration", text_file, *OPTIONS, *rank, "--json")
    assert done.exit_code == 0, done.output
    return out, done


def test_the_folder_opens_and_generates(compressed, model_folder):  # noqa: F811
    out, done = compressed
    result = json.loads(done.stdout)
    assert (result["report"]["num_converted"], result["report"]["num_dense"]) == (14, 1)
    assert result["dense"]["scored_tokens"] == result["compressed"]["scored_tokens"]
    assert result["compressed"]["perplexity"] < 1.5 * result["dense"]["perplexity"]
    assert result["bytes_after"] > 0
    assert not out.with_name("small.unfinished").exists()
    model = sparse_marlin.from_pretrained(out)
    layers = [module for module in model.modules() if isinstance(module, SparseMarlinLinear)]
    assert len(layers) == 14
    assert {layer.rank for layer in layers} == {8}
    assert True in {layer.packed_correction for layer in layers}
    mlp = model.model.layers[0].mlp
    assert torch.equal(mlp.gate_proj.correction_down, mlp.up_proj.correction_down)
    assert {layer.scales.dtype for layer in layers} == {torch.bfloat16}
    again = run("eval", out, "--text", out / "README.md", "--device", "cpu", "--seq-len", 32, "--json")
    assert again.exit_code == 0, again.output


def test_what_is_said_on_the_way(compressed):
    _, done = compressed
    said = done.stderr
    assert "14 of 15 linear layers will be compressed" in said
    assert "stays dense: lm_head" in said
    assert "model.layers.1.mlp.down_proj: output error 0." in said


def test_model_card_and_config(compressed):
    out, done = compressed
    card, config = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
    assert "import sparse_marlin" in card
    assert f"| perplexity | {json.loads(done.stdout)['dense']['perplexity']:.3f} |" in card
    assert "rank 8, one first factor for linears of the same input" in card
    assert "/" not in card.partition("base_model: ")[2].splitlines()[0]  # no folder of this machine
    assert config["quantization_config"]["quant_method"] == "sparse_marlin"
    assert config["compression"]["quality"] == "joint"
    assert config["compression"]["shared_correction"] is True


def test_out_that_exists_is_refused_and_kept(model_folder, text_file, tmp_path):  # noqa: F811
    out = tmp_path / "there"
    out.mkdir()
    (out / "precious").write_text("x")
    done = run("compress", model_folder, out, "--calibration", text_file, *OPTIONS)
    assert done.exit_code == 1
    assert "pass --overwrite" in only_line(done.stderr)
    assert (out / "precious").read_text() == "x"
    done = run("compress", model_folder, model_folder, "--calibration", text_file, "--overwrite", *OPTIONS)
    assert done.exit_code == 1
    assert "expected another path than that of the model" in only_line(done.stderr)


def test_overwrite_replaces_the_folder_at_the_end(model_folder, text_file, tmp_path):  # noqa: F811
    out = tmp_path / "there"
    out.mkdir()
    (out / "old").write_text("x")
    quick = ("--quality", "magnitude", "--overwrite")
    done = run("compress", model_folder, out, "--calibration", text_file, *OPTIONS, *quick)
    assert done.exit_code == 0, done.output
    assert not (out / "old").exists()
    assert "saved and verified" in done.stdout
    assert "warning: compress: calibration: expected at least 128 sequences" in done.stderr
    assert "perplexity of" in done.stdout


def test_a_compressed_model_is_refused(compressed, text_file, tmp_path):
    done = run("compress", compressed[0], tmp_path / "again", "--calibration", text_file, *OPTIONS)
    assert done.exit_code == 1
    assert "compressed already" in only_line(done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quality", "best"), "expected one of magnitude"),
        (("--seq-len", 100_000), "expected at least one sequence of 100000 tokens"),
        (("--ignore", "re:.*"), "expected a linear layer to convert"),
        (("--fallback", "int5", "--max-error", 0.5), "expected one of dense, int4"),
        (("--masks", "no.safetensors"), "no.safetensors: masks: expected a .safetensors file"),
        (("--keep-pattern",), "expected at most 2 non-zero of every 4"),
        (("--eval-text", "no.txt"), "no.txt: text: expected a readable file"),
    ],
    ids=str,
)
def test_wrong_calls_leave_nothing(model_folder, text_file, tmp_path, options, message):  # noqa: F811
    done = run("compress", model_folder, tmp_path / "out", "--calibration", text_file, *OPTIONS, *options)
    assert done.exit_code == 1
    assert message in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_the_work(model_folder, text_file, tmp_path, monkeypatch):  # noqa: F811
    full = collections.namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    done = run("compress", model_folder, tmp_path / "out", "--calibration", text_file, *OPTIONS)
    assert done.exit_code == 1
    assert "MB of free disk space, got 0 MB" in done.stderr.strip().splitlines()[-1]


def test_an_interrupted_command_continues(model_folder, text_file, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    arguments = ("compress", model_folder, out, "--calibration", text_file, *OPTIONS)
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError("No space left on device")

        patch.setattr(command, "save_checkpoint", full)
        done = run(*arguments)
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert not out.exists()
    assert len(list(out.with_name("out.unfinished").iterdir())) == 2
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "model.layers.1: 7 linears finished before" in done.stderr
    assert not out.with_name("out.unfinished").exists()

"""`sparse-marlin import`, `export`, and what generate, eval and inspect make of packed and old checkpoints."""

import json

import old_models as om
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparse_marlin
from sparse_marlin.cli import app
from sparse_marlin.testing import assert_same_bits

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it while the sun goes down " * 20


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in three old formats, with a word tokenizer beside it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(TEXT.split()))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    root, model = tmp_path_factory.mktemp("old"), om.make_model()
    model.extra_files.clear()
    for name, writer in (("a", om.gptq_marlin_24), ("b", om.compressed_marlin_24), ("q", om.pack_quantized)):
        om.write(root / name, model, writer, shards=2)
        tokenizer.save_pretrained(root / name)
    made = run("import", root / "a", root / "ours", "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["num_converted"] == len(model.layers)
    return root


def test_import_says_what_it_did(folders, tmp_path):
    done = run("import", folders / "b", tmp_path / "out", "--shard-gb", "0.001")
    assert done.exit_code == 0, done.stderr
    assert "14 of 14 linear layers converted (imported from marlin-24 (compressed-tensors)" in done.stdout
    assert f"verified and written to {tmp_path / 'out'}" in done.stdout
    ours, other = (load_file(folders / "ours" / "model.safetensors"), {})
    for path in (tmp_path / "out").glob("*.safetensors"):
        other |= load_file(path)
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert_same_bits(other[name], tensor, name)


def test_export_and_import_again(folders, tmp_path):
    for kind in ("marlin-24", "gptq-marlin-24"):
        done = run("export", folders / "ours", tmp_path / kind, "--format", kind, "--json")
        assert done.exit_code == 0, done.stderr
        assert len(json.loads(done.stdout)["layers"]) == 14
        assert (tmp_path / kind / "tokenizer.json").exists()
        assert run("import", tmp_path / kind, tmp_path / f"{kind}-again").exit_code == 0
        a, b = (load_file(p / "model.safetensors") for p in (folders / "ours", tmp_path / f"{kind}-again"))
        for name, tensor in a.items():
            assert_same_bits(b[name], tensor, name)


@pytest.mark.parametrize("name", ["ours", "a", "b"])
def test_generate_and_eval_take_packed_models(folders, name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    made = run("generate", folders / name, "--prompt", "the quick brown", "--max-new-tokens", 4, "--device", "cpu",
               "--json")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["sparse"] is True
    assert result["conversion"] is None
    reference = run("generate", folders / "ours", "--prompt", "the quick brown", "--max-new-tokens", 4, "--device",
                    "cpu", "--json")  # fmt: skip
    assert result["tokens"] == json.loads(reference.stdout)["tokens"]
    scored = run("eval", folders / name, "--text", text, "--seq-len", 32, "--max-tokens", 128, "--device", "cpu")
    assert scored.exit_code == 0, scored.stderr
    assert scored.stdout.startswith("perplexity ")


def test_a_packed_model_is_not_dense(folders):
    done = run("generate", folders / "ours", "--prompt", "the", "--dense")
    assert done.exit_code == 1
    assert "--dense: expected a dense model, got" in done.stderr


def test_inspect_names_the_format(folders):
    for name, state in (("a", "marlin-24 (gptq)"), ("b", "marlin-24 (compressed-tensors)"), ("ours", "packed")):
        done = run("inspect", folders / name, "--json")
        assert done.exit_code == 0, done.stderr
        layers = {layer["name"]: layer for layer in json.loads(done.stdout)["layers"]}
        assert len(layers) == 15
        up = layers["model.layers.0.mlp.up_proj"]
        assert (up["state"], up["shape"], up["is_24"]) == (state, [384, 256], True)
        assert (up["num_bits"], up["group_size"], up["exact"]) == (4, 128, True)
        assert up["convertible"] is (name != "ours")
        assert layers["lm_head"]["state"] == "dense"
        assert state in run("inspect", folders / name).stdout
    layers = sparse_marlin.inspection.inspect_source(str(folders / "q"))
    assert {layer.state for layer in layers} == {"pack-quantized", "dense"}
    assert next(layer for layer in layers if layer.state != "dense").is_24 is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["import", "{root}/nowhere", "{tmp}/out"], 1, "nowhere: expected a folder or a file of tensors, got nothing"),
        (["import", "{root}/ours", "{tmp}/out"], 1, "a model that sparse_marlin saved; it needs no import"),
        (["import", "{root}/a", "{root}/ours"], 1, "ours: expected a name that does not exist yet"),
        (["export", "{root}/a", "{tmp}/out", "--format", "marlin-24"], 1, "got marlin-24 (gptq); import it first"),
        (["export", "{root}/ours", "{tmp}/out", "--format", "marlin"], 2, "--format"),
        (["export", "{root}/ours", "{tmp}/out"], 2, "--format"),
        (["import", "{root}/a"], 2, "OUT"),
        (["import", "{root}/a", "{tmp}/out", "--scales", "odd"], 2, "--scales"),
    ],
)
def test_failures(folders, tmp_path, arguments, status, message):
    done = run(*(argument.format(root=folders, tmp=tmp_path) for argument in arguments))
    assert done.exit_code == status
    if status == 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("sparse-marlin: error: ")]
        assert len(lines) == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())

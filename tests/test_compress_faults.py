"""What compress refuses, with one clear error and the model as it was; texts and tokens it takes for calibration."""

import warnings

import pytest
import torch
from compress_models import llama, same, tensors, tokens

from sparse_marlin import compress, replace_linears
from sparse_marlin.compress.calibration import calibration_tokens
from sparse_marlin.compress.solvers import magnitude

pytestmark = pytest.mark.filterwarnings("ignore:compress. calibration")


def test_a_failure_in_a_later_block_changes_nothing():
    model = llama()
    before, modules = tensors(model), [id(module) for module in model.modules()]
    calls = []

    def fails(problem):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("no more")
        return magnitude(problem)

    with pytest.raises(RuntimeError, match="no more"):
        compress(model, tokens(), quality=fails, group_size=32)
    assert same(before, tensors(model))
    assert modules == [id(module) for module in model.modules()]
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def damaged(name, value):
    def damage(model):
        with torch.no_grad():
            model.get_parameter(name)[3, 5] = value

    return damage


def already_compressed(model):
    replace_linears(model, group_size=32)


def shared_block(model):
    model.model.layers[1] = model.model.layers[0]


def overflow(model):
    """Activations that are NaN although every weight is finite."""
    model.model.layers[0].input_layernorm.weight.data[7] = float("inf")


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (damaged("model.layers.1.mlp.up_proj.weight", torch.nan), {}, ValueError, "up_proj: weight: .* nan at row 3"),
        (overflow, {}, ValueError, r"layers\.0\.self_attn\.q_proj: activations: expected finite inputs, .* feature 7"),
        (already_compressed, {}, ValueError, "expected a dense model, got one that is compressed already"),
        (shared_block, {}, ValueError, "its block model.layers.0 is used again as model.layers.1"),
        (None, {"ignore": ["Linear"]}, ValueError, "expected a linear layer to convert, got 15 that stay dense"),
        (None, {"quality": "best"}, ValueError, "quality: expected one of magnitude, .*, joint, got 'best'"),
        (None, {"group_size": 48}, ValueError, "group_size: expected one of"),
        (None, {"num_bits": 3}, ValueError, "num_bits: expected one of"),
        (None, {"rank": -1}, ValueError, "rank: expected 0"),
        (None, {"shared_correction": True}, ValueError, "shared_correction: expected a rank > 0 .*, got rank=0"),
        (None, {"max_error": 0.0}, ValueError, "max_error: expected a number > 0"),
        (None, {"fallback": "int8"}, ValueError, "fallback: expected one of dense, int4"),
        (None, {"calibration": torch.zeros(0, 8, dtype=torch.long)}, ValueError, "at least one sequence of 8 tokens"),
        (None, {"calibration": torch.rand(4, 8)}, TypeError, "expected integer token ids, got torch.float32"),
        (None, {"calibration": tokens() + 300}, ValueError, "expected token ids below 320"),
        (None, {"calibration": tokens() - 300}, ValueError, "expected token ids from 0"),
        (None, {"calibration": ["some text"]}, ValueError, "tokenizer: expected one, since calibration is text"),
        (None, {"calibration": 7}, TypeError, "calibration: expected a file, a text, token ids"),
        (None, {"calibration": "no/such/file.txt"}, ValueError, "no/such/file.txt: expected a file"),
        (None, {"calibration": tokens(1, 8)[0], "seq_len": 9}, ValueError, "one sequence of 9 tokens, got 8 tokens"),
        (None, {"seq_len": 0, "calibration": ["x"]}, ValueError, "tokenizer|seq_len"),
    ],
)
def test_bad_input_is_one_clear_error(change, options, error, message):
    model = llama()
    if change:
        change(model)
    before = tensors(model)
    arguments = {"calibration": tokens(), "group_size": 32, **options}
    with pytest.raises(error, match=message) as caught:
        compress(model, arguments.pop("calibration"), **arguments)
    assert len(str(caught.value).splitlines()) == 1
    now = tensors(model)
    assert all(torch.equal(now[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_tied_and_odd_linears_stay_dense():
    model = llama(intermediate_size=102)
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight
    report = compress(model, tokens(), group_size=32)
    reasons = {layer.name: layer.reason for layer in report.skipped}
    assert reasons["model.layers.0.mlp.down_proj"] == "in_features 102 is not divisible by 4"
    assert "shared with model.layers.0.self_attn.v_proj" in reasons["model.layers.1.self_attn.v_proj"]
    assert len(report.converted) == 14 - 4


# --- calibration ------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text, **_):
        return {"input_ids": [1 + len(word) for word in text.split()]}


@pytest.mark.filterwarnings("default:compress. calibration")
def test_few_sequences_are_a_warning():
    with pytest.warns(UserWarning, match="at least 128 sequences for a good result, got 127 of 8 tokens"):
        calibration_tokens(tokens(127, 8), seq_len=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration_tokens(tokens(128, 8), seq_len=8).shape == (128, 8)


def test_calibration_from_text_files_and_lists(tmp_path):
    file = tmp_path / "my text.txt"
    file.write_text("one three eleven five " * 100)
    wanted = torch.tensor([4, 6, 7, 5] * 100)[:396].view(-1, 6)
    for given in (file, str(file), file.read_text(), [file.read_text()], ["one three eleven five"] * 100):
        found = calibration_tokens(given, Words(), seq_len=6)
        assert torch.equal(found, wanted)
    drawn = [calibration_tokens(tokens(64, 8), seq_len=8, num_sequences=5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (5, 8)

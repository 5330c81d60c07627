"""replace_linears: what is converted, what stays dense and why, and that a failure changes nothing."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from sparse_marlin import ConversionReport, SparseMarlinLinear, replace_linears
from sparse_marlin.quantize import QuantizedWeight, quantize_weight_only, relative_error
from sparse_marlin.replace import convert_linears, survey


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 40, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class PlainSubclass(nn.Linear):
    pass


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def reasons(report):
    return {layer.name: layer.reason for layer in report}


def state_of(model):
    return {name: (id(module), [id(p) for p in module._parameters.values()]) for name, module in model.named_modules()}


def tiny_llama(device, dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval().to(device=device, dtype=dtype)


def dense_twin(model, make):
    """The same model with nn.Linear layers that hold the dequantized weights."""
    twin = make()
    twin.load_state_dict(model.state_dict(), strict=False)
    for name, module in model.named_modules():
        if isinstance(module, SparseMarlinLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, module.to_linear())
    return twin


def greedy(model, ids):
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)


def decided_prompt(twin, exact, device):
    """A prompt on which the twin's greedy path depends on no rounding.

    At every step its first choice leads the second by four times what rounding moves that lead: the difference to
    `exact`, the same model in float32. With random weights the lead is small, and two correct models of 16-bit
    activations part where it is below their rounding.
    """
    for seed in range(100):
        ids = torch.randint(1, 320, (1, 9), generator=torch.Generator().manual_seed(seed)).to(device)
        out = greedy(twin, ids)
        logits = torch.stack(out.logits, 1)[0].float()
        with torch.inference_mode():
            wanted = exact(out.sequences).logits[0, ids.shape[1] - 1 : -1]
        places = logits.topk(2).indices
        lead, exact_lead = (-x.gather(1, places).diff(dim=1)[:, 0] for x in (logits, wanted))
        if lead.min() > 4 * (lead - exact_lead).abs().max():
            return ids, out.sequences
    pytest.fail("no prompt of 100 has a greedy path above rounding")


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_llama_generates_the_same_tokens_as_its_dequantized_twin(device, num_bits, group_size):
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    model = tiny_llama(device, dtype)
    report = replace_linears(model, group_size=group_size, num_bits=num_bits)
    assert len(report.converted) == 3 * 7
    assert reasons(report)["lm_head"] == "ignored by 'lm_head'"
    twin = dense_twin(model, lambda: tiny_llama(device, dtype))
    ids, tokens = decided_prompt(twin, copy.deepcopy(twin).float(), device)
    assert torch.equal(greedy(model, ids).sequences, tokens)


def test_replaced_model_saves_and_loads_its_state(tmp_path):
    model = seeded(Net)
    replace_linears(model, group_size=32)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = seeded(Net, 1)
    replace_linears(other, group_size=32)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(other(ids), model(ids))


def test_report_has_the_numbers_of_every_layer():
    model = seeded(Net)
    weights = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    report = replace_linears(model, group_size=64)
    assert isinstance(report, ConversionReport)
    assert [layer.name for layer in report] == [
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
        "lm_head",
    ]
    for layer in report.converted:
        module = model.get_submodule(layer.name)
        weight = weights[layer.name]
        assert layer.shape == tuple(weight.shape)
        error = float((weight - module.dequantize()).norm() / weight.norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-5)
        assert layer.bytes_before == 4 * (weight.numel() + (0 if module.bias is None else weight.shape[0]))
        tensors = [*module.buffers(), *module.parameters()]
        assert layer.bytes_after == sum(tensor.nbytes for tensor in tensors)
    assert report.bytes_before == sum(layer.bytes_before for layer in report.converted)
    assert 0.3 < report.mean_error < 0.45


def test_report_prints_and_serializes():
    report = replace_linears(seeded(Net))
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "N", "x", "K", "state", "rel.", "error", "MB", "before", "MB", "after"]
    assert "dense: ignored by 'lm_head'" in text
    assert "4 of 5 linear layers converted (weight-only magnitude 2:4, 4-bit, group size 128)" in text
    assert len({len(line) for line in lines[2:7]}) == 1
    found = json.loads(report.to_json())
    assert found == report.to_dict()
    assert (found["num_converted"], found["num_dense"]) == (4, 1)
    assert found["layers"][0]["shape"] == [128, 64]
    assert [(kind.kind, kind.count) for kind in report.by_kind()] == [("up", 2), ("down", 2)]
    assert report.worst(1)[0].relative_error == max(layer.relative_error for layer in report.converted)


@pytest.mark.parametrize(
    ("ignore", "dense"),
    [
        ((), set()),
        (("lm_head",), {"lm_head"}),
        (("down",), {"blocks.0.down", "blocks.1.down"}),
        (("blocks.0.up",), {"blocks.0.up"}),
        (("blocks.1",), {"blocks.1.up", "blocks.1.down"}),
        (("Block",), {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}),
        ((r"re:blocks\.\d+\.up$",), {"blocks.0.up", "blocks.1.up"}),
        ((r"re:.*down", "lm_head"), {"blocks.0.down", "blocks.1.down", "lm_head"}),
        ("lm_head", {"lm_head"}),
        (["own"], set()),
    ],
)
def test_ignore_entries(ignore, dense):
    report = replace_linears(seeded(Net), ignore=ignore)
    assert {layer.name for layer in report.skipped} == dense
    assert all(layer.reason.startswith("ignored by '") for layer in report.skipped)


def test_an_ignore_entry_that_matches_nothing_is_noted():
    report = replace_linears(seeded(Net), ignore=("lm_head", "router"))
    assert report.notes == ["ignore entry 'router' matches no module"]
    assert "note: ignore entry 'router'" in str(report)


def test_layers_that_stay_dense_say_why():
    model = nn.ModuleDict(
        {
            "good": nn.Linear(32, 16),
            "odd": nn.Linear(30, 16),
            "wide": nn.Linear(32, 16).double(),
            "own": OwnForward(32, 16),
            "patched": nn.Linear(32, 16),
            "hooked": nn.Linear(32, 16),
            "meta": nn.Linear(32, 16, device="meta"),
            "lazy": nn.LazyLinear(16),
            "parametrized": torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 16)),
            "subclass": PlainSubclass(32, 16),
            "done": SparseMarlinLinear(32, 16),
            "attention": nn.MultiheadAttention(32, 2),
            "layer": nn.TransformerEncoderLayer(32, 2, 64, batch_first=True),
        }
    )
    model["patched"].forward = lambda x: x
    model["hooked"].register_forward_hook(lambda *_: None)
    report = replace_linears(model)
    found = reasons(report)
    assert found["good"] is None
    assert found["subclass"] is None
    assert found["odd"] == "in_features 30 is not divisible by 4"
    assert found["wide"] == "weight is float64, not float32, float16 or bfloat16"
    assert found["own"] == "OwnForward has a forward of its own"
    assert found["patched"] == "Linear has a forward of its own"
    assert found["hooked"].startswith("it has hooks")
    assert found["meta"].startswith("weight is on the meta device")
    assert found["lazy"].startswith("it is lazy")
    assert found["parametrized"].startswith("its weight is parametrized")
    assert found["done"] == "already a SparseMarlinLinear"
    assert found["attention.out_proj"] == "its parent MultiheadAttention reads the weight directly"
    assert found["layer.linear1"] == "its parent TransformerEncoderLayer reads the weight directly"
    assert model["layer"].eval()(torch.randn(1, 3, 32)).shape == (1, 3, 32)


def test_tied_weights_stay_dense():
    model = seeded(Net)
    model.lm_head.weight = model.embed.weight
    model.blocks[1].up.weight = model.blocks[0].up.weight
    report = replace_linears(model, ignore=())
    found = reasons(report)
    assert found["lm_head"] == "weight is shared with embed"
    assert found["blocks.0.up"] == "weight is shared with blocks.1.up"
    assert found["blocks.1.up"] == "weight is shared with blocks.0.up"
    assert model.lm_head.weight is model.embed.weight
    assert len(report.converted) == 2


def test_a_module_registered_twice_is_converted_once():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"first": shared, "inner": nn.Sequential(shared, nn.ReLU())})
    report = replace_linears(model)
    assert [layer.name for layer in report] == ["first"]
    assert isinstance(model["first"], SparseMarlinLinear)
    assert model["inner"][0] is model["first"]


def test_converting_twice_is_an_error_that_says_so():
    model = seeded(Net)
    replace_linears(model)
    with pytest.raises(ValueError, match="already a SparseMarlinLinear"):
        replace_linears(model)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(32, 16), ValueError, "got a Linear itself; use SparseMarlinLinear.from_linear"),
        (
            nn.Sequential(nn.ReLU()),
            ValueError,
            "expected a linear layer to convert, got a model without torch.nn.Linear layers",
        ),
        (
            nn.Sequential(nn.Linear(6, 4)),
            ValueError,
            r"got 1 that stay dense \(0: in_features 6 is not divisible by 4\)",
        ),
        ("text", TypeError, "expected an eager torch.nn.Module, got str"),
    ],
)
def test_models_without_anything_to_convert(model, error, message):
    with pytest.raises(error, match=f"^replace_linears: model: .*{message}"):
        replace_linears(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group_size": 100}, ValueError, r"group_size: expected one of \[-1, 32, 64, 128, 256\]"),
        ({"num_bits": 2}, ValueError, r"num_bits: expected one of \[4, 8\], got 2"),
        ({"ignore": ("re:(",)}, ValueError, r"ignore: expected a regular expression after 're:', got 're:\('"),
        ({"ignore": (3,)}, TypeError, "ignore: expected strings, got int"),
    ],
)
def test_wrong_settings_change_nothing(arguments, error, message):
    model = seeded(Net)
    before = state_of(model)
    with pytest.raises(error, match=message):
        replace_linears(model, **arguments)
    assert state_of(model) == before


def test_a_failure_in_the_last_layer_changes_nothing_and_names_it():
    model = seeded(Net)
    with torch.no_grad():
        model.blocks[1].down.weight[5, 9] = float("nan")
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"^blocks\.1\.down: weight: expected finite values, got nan at row 5, column 9"
    ):
        replace_linears(model)
    assert state_of(model) == before


def test_another_method_plugs_into_the_same_conversion():
    """The seam: codes and scales from elsewhere, and their errors carry the layer's name."""
    model = seeded(Net)
    chosen = {}

    def keep_first_two(name, linear):
        mask = torch.tensor([True, True, False, False]).repeat(linear.weight.shape[1] // 4)
        kept = quantize_weight_only(linear.weight.detach() * mask, group_size=32, num_bits=8, name=name)
        chosen[name] = relative_error(linear.weight, kept)
        return kept

    report = convert_linears(model, keep_first_two, method="first two", group_size=32, num_bits=8)
    assert {layer.name: layer.relative_error for layer in report.converted} == chosen
    assert not bool(model.blocks[0].up.codes()[:, 2::4].any())

    def not_sparse(name, linear):
        codes = torch.ones_like(linear.weight, dtype=torch.int8)
        return QuantizedWeight(codes, torch.ones(1, codes.shape[0]), -1, 4)

    with pytest.raises(RuntimeError, match=r"^blocks\.0\.up: .*weight"):
        convert_linears(seeded(Net), not_sparse, method="broken", group_size=-1, num_bits=4)


def test_training_flag_and_dtype_follow_the_layer():
    model = seeded(Net).bfloat16().eval()
    model.blocks[0].train()
    replace_linears(model)
    assert model.blocks[0].up.training
    assert not model.blocks[1].up.training
    assert model.blocks[0].up.scales.dtype == torch.bfloat16
    assert model(torch.arange(6).unsqueeze(0)).dtype == torch.bfloat16


def test_survey_names_candidates_without_touching_the_model():
    model = seeded(Net)
    before = state_of(model)
    candidates = survey(model)
    assert [(c.name, c.shape) for c in candidates][:2] == [("blocks.0.up", (128, 64)), ("blocks.0.down", (64, 128))]
    assert state_of(model) == before


def test_progress_goes_to_stderr(capsys):
    replace_linears(seeded(Net), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search("Converting linears", err)

"""text-generation-inference's interface: every naming, whole and sharded, against the dense computation."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import run_processes
from safetensors.torch import load_file, save_file
from tgi_weights import NAMINGS, Checkpoint, Group, Weights
from torch import nn

from sparse_marlin.testing import activations, assert_accepted, assert_same_bits
from sparse_marlin.tgi import DenseWeight, SparseMarlinWeight, SparseMarlinWeightsLoader

HEAD, HEADS, KV_HEADS, HIDDEN, INNER = 64, 8, 4, 512, 768
SHAPES = {
    "q": (HEADS * HEAD, HIDDEN),
    "k": (KV_HEADS * HEAD, HIDDEN),
    "v": (KV_HEADS * HEAD, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD),  # K / 4 is one scale group
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),  # N / 8 is no multiple of a tile
    "down": (HIDDEN, INNER),
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "two_groups": (128, 256),
}
BIASES = ("q", "k", "v", "o", "qkv")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(naming, num_bits=4, group_size=128):
        key = (naming, num_bits, group_size)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            made[key] = Checkpoint(folder, {**SHAPES, "head": (96, HIDDEN)}, *key, biases=BIASES, dense=("head",))
        return made[key]

    return make


def weights_classes():
    """Ours for tests, and that project's own where it is installed."""
    yield Weights
    if importlib.util.find_spec("text_generation_server"):
        from text_generation_server.utils.weights import Weights as Original

        yield lambda *arguments: Original(*arguments, weights_loader=None)


def ranks(checkpoint, world_size, device="cpu", dtype=torch.float16, make=Weights):
    loader = SparseMarlinWeightsLoader(checkpoint.config)
    for rank in range(world_size):
        yield loader, make(checkpoint.files, torch.device(device), dtype, Group(rank, world_size))


def float_dtype(device):
    return torch.float32 if device.type == "cpu" else torch.float16


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("num_bits", "group_size"), [(4, 128), (4, -1), (8, 128)])
def test_every_layer_of_a_block(device, checkpoint, naming, num_bits, group_size, world_size):
    made, dtype = checkpoint(naming, num_bits, group_size), float_dtype(device)
    if world_size == 8 and group_size != -1:
        kinds = {"columns": ["gate"], "rows": []}  # 8 rows of less than a scale group are tested below
    else:
        kinds = {"columns": ["q", "k", "v", "gate", "up", "two_groups"], "rows": ["o", "down", "two_groups"]}
    for make in weights_classes():
        each = list(ranks(made, world_size, device, dtype, make))
        for name in kinds["columns"]:
            x = activations(3, SHAPES[name][1], dtype=dtype, device=device)
            bias = made.bias[name].to(device, dtype) if name in made.bias else None
            parts = [
                loader.get_weights_col(weights, name).get_linear(
                    weights.get_sharded(f"{name}.bias", dim=0) if bias is not None else None
                )(x)
                for loader, weights in each
            ]
            assert_accepted(torch.cat(parts, -1), x, *made.wanted(name, dtype, device), bias, f"{name} columns")
        for name in kinds["rows"]:
            x = activations(3, SHAPES[name][1], dtype=dtype, device=device)
            bias = made.bias[name].to(device, dtype) if name in made.bias else None
            total = torch.zeros(3, SHAPES[name][0], dtype=dtype, device=device)
            for rank, (loader, weights) in enumerate(each):
                linear = loader.get_weights_row(weights, name).get_linear(bias if rank == 0 else None)
                total += linear(x.chunk(world_size, -1)[rank])
            assert_accepted(total, x, *made.wanted(name, dtype, device), bias, f"{name} rows")


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("naming", NAMINGS)
def test_fused_layers(device, checkpoint, naming, world_size):
    made, dtype = checkpoint(naming), float_dtype(device)
    x = activations(3, HIDDEN, dtype=dtype, device=device)
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    for rank, (loader, weights) in enumerate(ranks(made, world_size, device, dtype)):
        # Separate layers, made one.
        bias = torch.cat([weights.get_sharded(f"{name}.bias", dim=0) for name in heads])
        out = loader.get_multi_weights_col(weights, list(heads), 0).get_linear(bias)(x)
        sizes = [count * HEAD // world_size for count in heads.values()]
        for name, size, part in zip(heads, sizes, out.split(sizes, -1), strict=True):
            rows = slice(rank * size, (rank + 1) * size)
            wanted = made.wanted(name, dtype, device, rows)
            assert_accepted(part, x, *wanted, made.bias[name][rows].to(device, dtype), f"{name} of rank {rank}")
        gate_up = loader.get_multi_weights_col(weights, ["gate", "up"], dim=0).get_linear(None)(x)
        for name, part in zip(("gate", "up"), gate_up.chunk(2, -1), strict=True):
            rows = slice(rank * INNER // world_size, (rank + 1) * INNER // world_size)
            assert_accepted(part, x, *made.wanted(name, dtype, device, rows), None, f"{name} of rank {rank}")
        # One layer that was fused when it was packed: query heads, then key heads, then value heads.
        out = loader.get_weights_col_packed(weights, "qkv", [HEADS, KV_HEADS, KV_HEADS]).get_linear(None)(x)
        start = 0
        for size, part in zip(sizes, out.split(sizes, -1), strict=True):
            rows = slice(start + rank * size, start + (rank + 1) * size)
            assert_accepted(part, x, *made.wanted("qkv", dtype, device, rows), None, f"qkv block at {start}")
            start += size * world_size
        halves = loader.get_weights_col_packed(weights, "qkv", 2).get_linear(None)(x)
        assert halves.shape == (3, SHAPES["qkv"][0] // world_size)


def test_a_part_that_is_one_group_of_many_has_its_scales_in_plain_order(checkpoint):
    # Files with several groups hold the scales of eight features in another order; one group alone does not show it.
    for naming in NAMINGS:
        made = checkpoint(naming)
        for rank, (loader, weights) in enumerate(ranks(made, 4)):
            weight = loader.get_weights_row(weights, "o")
            assert weight.packed.size_k == 128
            assert torch.equal(weight.packed.scales, made.scales["o"][rank : rank + 1])
            assert torch.equal(weight.packed.codes(), made.codes["o"][:, rank * 128 : (rank + 1) * 128])


def test_parts_smaller_than_a_scale_group_keep_the_weight(checkpoint):
    for naming in NAMINGS:
        made = checkpoint(naming)
        for rank, (loader, weights) in enumerate(ranks(made, 8)):
            part = slice(rank * 96, (rank + 1) * 96)  # of 768 input features in groups of 128
            packed = loader.get_weights_row(weights, "down").packed
            assert torch.equal(packed.codes(), made.codes["down"][:, part])
            spread = made.scales["down"].repeat_interleave(128, 0)[part]
            assert torch.equal(packed.scales.repeat_interleave(packed.group_size, 0)[:96], spread)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_converted_once_from_what_the_file_holds(device, checkpoint, dtype):
    made = checkpoint("gptq")
    loader, weights = next(ranks(made, 1, device, dtype))
    weight = loader.get_weights(weights, "q")
    assert weight.packed.scales.dtype == torch.float16
    linear = weight.get_linear(made.bias["q"].to(device))
    assert linear.scales.dtype == linear.bias.dtype == dtype
    assert_same_bits(linear.scales, made.scales["q"].to(device, dtype))
    x = activations(3, HIDDEN, dtype=dtype, device=device)
    assert_accepted(linear(x), x, *made.wanted("q", dtype, device), linear.bias)
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_layers_that_stayed_dense(device, checkpoint):
    made, dtype = checkpoint("gptq"), float_dtype(device)
    x = activations(3, HIDDEN, dtype=dtype, device=device)
    weight = made.dense["head"].to(device, dtype)
    for rank, (loader, weights) in enumerate(ranks(made, 2, device, dtype)):
        column = loader.get_weights_col(weights, "head")
        assert isinstance(column, DenseWeight)
        assert_same_bits(column.get_linear(None)(x), nn.functional.linear(x, weight[rank * 48 : (rank + 1) * 48]))
        row = loader.get_weights_row(weights, "head").get_linear(torch.ones(96, device=device))
        half = slice(rank * 256, (rank + 1) * 256)
        assert_same_bits(row.weight.detach(), weight[:, half].contiguous())
        packed = loader.get_weights_col_packed(weights, "head", [2, 1, 1]).get_linear(None)
        rows = torch.cat(
            [weight[start + rank * n : start + (rank + 1) * n] for start, n in ((0, 24), (48, 12), (72, 12))]
        )
        assert_same_bits(packed.weight.detach(), rows)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_rank_reads_its_part_of_the_files(checkpoint, naming):
    made = checkpoint(naming)
    for loader, weights in ranks(made, 4):
        loader.get_weights_col(weights, "q")
        assert weights.bytes_read == made.bytes["q"] // 4
        weights.bytes_read = 0
        loader.get_weights_row(weights, "o")
        assert weights.bytes_read == made.bytes["o"] // 4


def block(files, config, x):
    """A rank's part of attention projections and feed-forward, summed over gloo; who sums is the model, as in TGI."""
    loader = SparseMarlinWeightsLoader(config)
    weights = Weights(files, torch.device("cpu"), torch.float32, dist.group.WORLD)
    first = dist.get_rank() == 0

    def summed(out):
        dist.all_reduce(out)
        return out

    bias = torch.cat([weights.get_sharded(f"{name}.bias", dim=0) for name in "qkv"])
    qkv = loader.get_multi_weights_col(weights, ["q", "k", "v"], 0).get_linear(bias)(x)
    query = qkv.split([size * HEAD // dist.get_world_size() for size in (HEADS, KV_HEADS, KV_HEADS)], -1)[0]
    hidden = summed(
        loader.get_weights_row(weights, "o").get_linear(weights.get_tensor("o.bias") if first else None)(query)
    )
    gate, up = loader.get_multi_weights_col(weights, ["gate", "up"], 0).get_linear(None)(hidden).chunk(2, -1)
    return hidden, summed(loader.get_weights_row(weights, "down").get_linear(None)(nn.functional.silu(gate) * up))


def blocks(sources, x):
    return [block(files, config, x) for files, config in sources]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_over_processes_against_the_dense_computation(checkpoint, world_size):
    sources = [checkpoint(naming) for naming in NAMINGS]
    x = activations(5, HIDDEN)
    found = run_processes(world_size, blocks, [(made.files, made.config) for made in sources], x)
    for index, made in enumerate(sources):

        def dense(name, x, made=made):
            weight = made.codes[name].double() * made.scales[name].double().t().repeat_interleave(128, 1)
            out = x.double() @ weight.t()
            return out + made.bias[name].double() if name in made.bias else out

        hidden = dense("o", dense("q", x))
        wanted = dense("down", nn.functional.silu(dense("gate", hidden)) * dense("up", hidden))
        for got_hidden, got in (rank[index] for rank in found):
            for out, exact in ((got_hidden, hidden), (got, wanted)):
                assert bool(((out - exact).abs() <= 1e-5 * exact.abs().max()).all())


def test_the_config_is_found_in_a_folder(tmp_path, checkpoint):
    import json

    config = checkpoint("own").config
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert set(SparseMarlinWeightsLoader.from_pretrained(tmp_path).layers) == set(SHAPES)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"checkpoint_format": "marlin_24", "bits": 4}))
    assert not SparseMarlinWeightsLoader.from_pretrained(tmp_path).layers
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"quantize_config\.json: expected JSON"):
        SparseMarlinWeightsLoader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tgi, w: tgi.get_weights(w, "nothing"), "nothing: expected tensors named B_24, B_meta, s, or"),
        (
            lambda tgi, w: tgi.get_weights_col(w, "q"),
            r"q: output features: expected a multiple of 3 \(ranks\), got 512",
        ),
        (
            lambda tgi, w: tgi.get_weights_row(w, "o"),
            r"o: input features: expected a multiple of 3 \(ranks\), got 512",
        ),
        (
            lambda tgi, w: tgi.get_weights_col_packed(w, "qkv", [8, 4, 4]),
            "qkv: block at 0: output features: expected a mul",
        ),
        (
            lambda tgi, w: tgi.get_weights_col_packed(w, "qkv", [7, 4]),
            r"qkv: block_sizes: expected blocks that divide 1024",
        ),
        (
            lambda tgi, w: tgi.get_multi_weights_col(w, ["gate", "head"], 0),
            "gate, head: expected all of them packed",
        ),
        (
            lambda tgi, w: tgi.get_multi_weights_col(w, ["gate", "down"], 0),
            "down: K and bits: expected 512 and 4 as in gate",
        ),
        (lambda tgi, w: tgi.get_multi_weights_col(w, ["gate", "up"], 1), "dim: expected 0"),
    ],
)
def test_what_cannot_be_loaded_says_why(checkpoint, call, message):
    loader, weights = list(ranks(checkpoint("gptq"), 3))[1]
    if "K and bits" in message:
        loader, weights = next(ranks(checkpoint("gptq"), 1))
    with pytest.raises(ValueError, match=message):
        call(loader, weights)


def test_our_own_format_needs_its_config(checkpoint):
    _, weights = next(ranks(checkpoint("own"), 1))
    with pytest.raises(ValueError, match="q: expected the layer in the config's layers"):
        SparseMarlinWeightsLoader({"quant_method": "gptq"}).get_weights(weights, "q")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: {**t, "q.s": t["q.s"] * float("nan")}, ValueError, "q: scales: expected finite values > 0"),
        (lambda t: {**t, "q.s": t["q.s"][:3]}, ValueError, "q: scales: expected whole groups of K = 512, got 3"),
        (lambda t: {**t, "q.B_meta": t["q.B_meta"] * 0}, RuntimeError, "q: .*metadata"),
        (lambda t: {**t, "q.B_24": t["q.B_24"][:, :-64]}, ValueError, "q: meta: expected int16"),
        (lambda t: {**t, "q.s": t["q.s"][0]}, ValueError, "q: gptq tensors: expected 2 dimensions each"),
    ],
)
def test_damaged_files_name_the_layer(tmp_path, checkpoint, change, error, message):
    tensors = {}
    for file in checkpoint("gptq").files:
        tensors.update(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, tmp_path / "model.safetensors")
    weights = Weights([tmp_path / "model.safetensors"], torch.device("cpu"), torch.float16, Group())
    with pytest.raises(error, match=message):
        SparseMarlinWeightsLoader().get_weights(weights, "q")


def test_the_layer_is_one_of_ours(checkpoint):
    loader, weights = next(ranks(checkpoint("compressed-tensors"), 1))
    weight = loader.get_weights(weights, "q")
    assert isinstance(weight, SparseMarlinWeight)
    linear = weight.get_linear(None)
    assert (linear.in_features, linear.out_features, linear.group_size, linear.num_bits) == (512, 512, 128, 4)

"""Tensor parallelism with 2 and 4 processes over gloo: layers against the whole layer, models against one process."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import random_layer, run_processes, tiny_llama
from torch import nn

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, save_checkpoint
from sparse_marlin.checkpoint import LayerSpec
from sparse_marlin.legacy import export_checkpoint
from sparse_marlin.low_rank import quantize_up
from sparse_marlin.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel,
    cut_linear,
    row_parallel,
    tensor_parallel,
)
from sparse_marlin.shard_plan import split_evenly, split_layer
from sparse_marlin.sharded_loading import from_pretrained
from sparse_marlin.slicing import PackedLayer, slice_in, slice_out
from sparse_marlin.stored import OwnLayer
from sparse_marlin.testing import activations, assert_accepted, assert_same_bits

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(900)  # processes that import as much as this one, on machines with few cores

N, K, GROUP = 320, 640, 128
IDS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
SHAPES = [(N, K, 4, 128), (100, 516, 8, 64), (N, 512, 4, -1), (70, 300, 4, 256)]


def tiny_dense(**changes):
    settings = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **heads, **changes}))


# --- one process a rank, emulated on one device -----------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_a_layer_make_the_layer(device, shape, world_size):
    n, k, num_bits, group_size = shape
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = random_layer(n, k, True, group_size, num_bits, dtype=dtype, device=device)
    x = activations(5, k, dtype=dtype, device=device)
    columns = [cut_linear(layer, True, part)(x) for part in split_layer(layer, world_size, True)]
    assert_accepted(torch.cat(columns, -1), x, layer.codes(), layer.scales, group_size, layer.bias, "columns")
    total = torch.zeros(5, n, device=device, dtype=dtype)
    for rank, part in enumerate(split_layer(layer, world_size, False)):
        local = cut_linear(layer, False, part, bias=rank == 0)
        assert (local.bias is None) == (rank > 0)
        total += local(x[:, slice(*part)])
    assert_accepted(total, x, layer.codes(), layer.scales, group_size, layer.bias, "rows")


@pytest.mark.parametrize("packed", [False, True])
def test_a_low_rank_correction_is_cut_with_its_layer(device, packed):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = random_layer(N, K, dtype=dtype, device=device)
    torch.manual_seed(0)
    up = torch.randn(N, 8, device=device) * 0.1
    if packed:
        up = quantize_up(up, layer.group_size, layer.num_bits, scale_dtype=dtype)
    layer._set_correction("layer", up, torch.randn(8, K) * 0.1)
    assert layer.packed_correction == packed
    x = activations(5, K, dtype=dtype, device=device)
    wanted, eps = layer(x).double(), torch.finfo(dtype).eps
    columns = [cut_linear(layer, True, part)(x) for part in split_layer(layer, 3, True)]
    rows = [cut_linear(layer, False, part)(x[:, slice(*part)]).double() for part in split_layer(layer, 3, False)]
    for made in (torch.cat(columns, -1).double(), sum(rows)):
        assert bool(((made - wanted).abs() <= 16 * eps * wanted.abs().max()).all())


def test_one_process_alone_computes_the_whole(device):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = random_layer(N, K, True, dtype=dtype, device=device)
    x = activations(3, K, dtype=dtype, device=device)
    for parallel in (column_parallel(layer, gather_output=True), row_parallel(layer), row_parallel(layer)):
        assert_same_bits(parallel(x), layer(x))


# --- real processes ---------------------------------------------------------------------------------------------------


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def everything(folder):
    """All that the tests below ask of a rank: starting processes takes longer than any of it."""
    return {
        "layers": layer_results(),
        "compiled": compiled_results() if dist.get_world_size() == 2 else None,  # imports the compiler: seconds
        "models": model_results(),
        "loaded": loaded_results(folder),
        "refused": wrong_shares(),
    }


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, saved):
    """For each question the number of ranks and every rank's answer."""
    answers = run_processes(request.param, everything, saved)
    return {key: (request.param, [answer[key] for answer in answers]) for key in answers[0]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model in several files, the same in both marlin-24 formats, and one with tied embeddings."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_llama(dtype=torch.float16).float()  # scales that the old formats hold
    save_checkpoint(model, folder / "model", max_shard_bytes=200_000)
    for name in ("marlin-24", "gptq-marlin-24"):
        export_checkpoint(folder / "model", folder / name, format=name)
    save_checkpoint(tiny_llama(tie_word_embeddings=True, layers=1), folder / "tied")
    return folder


def layer_results():
    """On one rank: outputs of column, gathered column, row and split row layers, and gradients of the input."""
    rank, found = dist.get_rank(), {}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        n, k, num_bits, group_size = shape
        layer = random_layer(n, k, True, group_size, num_bits, dtype=dtype)
        x = activations(2, 3, k, dtype=dtype)
        column, row = column_parallel(layer), row_parallel(layer)
        made = {
            "column": column(x),
            "gathered": column_parallel(layer, gather_output=True)(x),
            "row": row(x[..., slice(*row.ranges[rank])]),
            "split": row_parallel(layer, split_input=True)(x),
        }
        dense = nn.Linear(k, n, dtype=dtype)
        torch.manual_seed(1)
        nn.init.normal_(dense.weight, std=k**-0.5)
        nn.init.normal_(dense.bias)
        made["dense gathered"] = column_parallel(dense, gather_output=True)(x).detach()
        made["dense split"] = row_parallel(dense, split_input=True)(x).detach()
        made["dense"] = dense(x).detach()
        size = x.abs() @ dense.weight.detach().abs().t() + dense.bias.detach().abs()
        made["dense bound"] = 2 * torch.finfo(dtype).eps * size  # sums in another order, products rounded before them
        for kind in (column_parallel(layer, gather_output=True), row_parallel(layer, split_input=True)):
            leaf = x.clone().requires_grad_()
            kind(leaf).square().sum().backward()
            made[f"gradient {type(kind).__name__}"] = leaf.grad
        found[(shape, dtype)] = made
    return found


@pytest.mark.slow
def test_parallel_layers_over_processes(processes):
    _, ranks = processes["layers"]
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        n, k, num_bits, group_size = shape
        layer = random_layer(n, k, True, group_size, num_bits, dtype=dtype)
        x = activations(2, 3, k, dtype=dtype)
        made = [rank[(shape, dtype)] for rank in ranks]
        flat = x.reshape(-1, k)
        wanted = (flat, layer.codes(), layer.scales, group_size, layer.bias)
        joined = torch.cat([each["column"] for each in made], -1)
        assert_accepted(joined.reshape(-1, n), *wanted, "column")
        for each in made:
            assert_same_bits(each["gathered"], joined, "gathered")
            assert_accepted(each["row"].reshape(-1, n), *wanted, "row")
            assert_same_bits(each["split"], each["row"], "split")
            assert_same_bits(each["row"], made[0]["row"], "every rank has the same sum")
            for kind in ("dense gathered", "dense split"):
                assert bool(((each[kind] - each["dense"]).abs() <= each["dense bound"]).all()), kind
            if dtype == torch.float32:
                leaf = x.clone().requires_grad_()
                layer(leaf).square().sum().backward()
                for kind in ("ColumnParallelLinear", "RowParallelLinear"):
                    assert torch.allclose(each[f"gradient {kind}"], leaf.grad, rtol=1e-4, atol=1e-4), kind


def compiled_results():
    layer = random_layer(N, K, True)
    x = activations(4, K)
    block = nn.Sequential(column_parallel(layer, gather_output=True), nn.SiLU(), row_parallel(
        random_layer(64, N, True, seed=9), split_input=True))  # fmt: skip
    with torch.no_grad():
        return block(x), torch.compile(block, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.slow
def test_compiles_as_one_graph(processes):
    world_size, answers = processes["compiled"]
    if world_size != 2:
        pytest.skip("compiled with two ranks")
    for eager, compiled in answers:
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-5)


CASES = {
    "grouped query": {},
    "one key head": {"num_key_value_heads": 1},
    "nine heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "layers": 1},
    "tied": {"tie_word_embeddings": True, "layers": 1},
    "8 bits": {"num_bits": 8, "group_size": -1, "layers": 1},
}


FOUR = ("grouped query", "nine heads")  # of these, over four ranks: fewer key heads than ranks


@torch.no_grad()
def model_results():
    found = {}
    for name in CASES if dist.get_world_size() == 2 else FOUR:
        model = tiny_llama(**CASES[name])
        report = tensor_parallel(model)
        logits = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
        static = model.generate(
            IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation="static", disable_compile=True
        )
        found[name] = (logits, tokens, static, str(report), report.bytes_before, report.bytes_after)
    return found


@pytest.mark.slow
@torch.no_grad()
def test_models_over_processes(processes):
    world_size, ranks = processes["models"]
    for name in ranks[0]:
        model = tiny_llama(**CASES[name])
        logits = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
        scale = logits.abs().max()
        for rank, (got, made, static, report, before, after) in enumerate(each[name] for each in ranks):
            assert (got - logits).abs().max() <= 1e-5 * scale, name
            assert torch.equal(made, tokens), name
            assert torch.equal(static, tokens), name
            assert f"rank {rank} of {world_size}" in report
            assert after < before
            assert_same_bits(got, ranks[0][name][0], "every rank has the same logits")


@torch.no_grad()
def test_a_model_is_cut_once_and_stays_as_it_was_if_it_cannot_be(tmp_path):
    model = tiny_llama(layers=1)
    plain = nn.Sequential(random_layer(64, 128))
    with pytest.raises(ValueError, match="without one"):
        tensor_parallel(plain)
    assert type(plain[0]) is SparseMarlinLinear
    tensor_parallel(model)
    assert isinstance(model.model.layers[0].mlp.down_proj, RowParallelLinear)
    assert isinstance(model.model.layers[0].mlp.up_proj, ColumnParallelLinear)
    with pytest.raises(ValueError, match="got one that is cut already"):
        tensor_parallel(model)
    with pytest.raises(ValueError, match="expected a whole model, got one that tensor parallelism has cut"):
        save_checkpoint(model, tmp_path / "cut")
    assert not list(tmp_path.iterdir())


SAVED = ("model", "marlin-24", "gptq-marlin-24", "tied")


@torch.no_grad()
def loaded_results(folder):
    found = {}
    for name in SAVED if dist.get_world_size() == 2 else SAVED[:2]:
        model, report = from_pretrained(folder / name)
        half, _ = from_pretrained(folder / name, dtype=torch.bfloat16)
        kinds = {tensor.dtype for tensor in half.state_dict().values()}
        found[name] = (model(IDS).logits, str(report), report.bytes_before, report.bytes_after, kinds)
    found["cut"] = from_pretrained(folder / "model", local_files_only=True)[0](IDS).logits  # whole, then cut
    return found


@pytest.mark.slow
@torch.no_grad()
def test_saved_models_of_three_formats_open_sharded(processes, saved):
    world_size, ranks = processes["loaded"]
    for name in SAVED if world_size == 2 else SAVED[:2]:
        logits = sparse_marlin.from_pretrained(saved / name, dtype=torch.float32)(IDS).logits
        for answer in ranks:
            got, report, before, after, kinds = answer[name]
            assert (got - logits).abs().max() <= 1e-5 * logits.abs().max(), name
            assert after < before
            assert f"of {world_size}" in report
            assert kinds == {torch.int32, torch.bfloat16}
            if name != "tied":
                assert_same_bits(got, answer["cut"], "loaded whole and cut")


class Recorded:
    """A tensor of a file, with the bytes that were read of it."""

    def __init__(self, tensor, read):
        self.tensor, self.read = tensor, read

    def __getitem__(self, index):
        part = self.tensor[index]
        self.read.append(part.nbytes)
        return part


def test_a_rank_reads_its_part_of_a_layer():
    for column, parts in ((True, 4), (False, 5)):
        layer = random_layer(N - 64, K)
        tensors = {f"proj.{key}": tensor for key, tensor in layer.state_dict().items()}
        read = []
        stored = OwnLayer("proj", LayerSpec.of(layer), lambda name, t=tensors, r=read: Recorded(t[name], r))
        for part in split_layer(layer, parts, column):
            read.clear()
            packed = stored.part(column, part)
            assert sum(read) == sum(tensor.nbytes for tensor in tensors.values()) // parts
            whole = PackedLayer.of(layer)
            wanted = slice_out(whole, *part) if column else slice_in(whole, *part)
            assert_same_bits(packed.weight_packed, wanted.weight_packed.contiguous())
            assert_same_bits(packed.scales, wanted.scales.contiguous())


@pytest.fixture(scope="module")
def folders(saved, tmp_path_factory):
    """The saved model and its dense twin, each with a tokenizer of single letters."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(33 + index): index for index in range(94)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="!"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="!", pad_token="!")
    dense = tmp_path_factory.mktemp("dense")
    tiny_dense(tie_word_embeddings=False).save_pretrained(dense)
    for folder in (saved / "model", dense):
        tokenizer.save_pretrained(folder)
    return {"saved": saved / "model", "dense": dense}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["saved", "dense"])
def test_generate_under_torchrun_gives_the_same_tokens(folders, source):
    call = ["-m", "sparse_marlin", "generate", folders[source], "--prompt", "Qwerty", "--max-new-tokens", "8"]
    call += ["--json", "--device", "cpu"] + (["--group-size", "64"] if source == "dense" else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "python")}
    answers = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [str(part) for part in [sys.executable, *launcher, *call]]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        answers.append(json.loads(run.stdout))  # one JSON document: only rank 0 prints
    assert len(answers[0]["tokens"]) == 8
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert "rank 0 of 2" in run.stderr
    assert "rank 1 of 2" not in run.stderr


THREADS_LEFT = """
import os
import torch, torch.distributed as dist
from sparse_marlin.parallel import torchrun_group

def threads():
    tasks = "/proc/self/task"
    return sum("gloo" in open(f"{tasks}/{task}/comm").read() for task in os.listdir(tasks))

with torchrun_group(torch.device("cpu")):
    import torch._dynamo
    dist.all_reduce(torch.ones(4))
    assert threads() > 0
assert threads() == 0, "the group lives on"
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_group_ends_with_its_context(tmp_path):
    """A thread that lives until the interpreter ends may end it with SIGABRT."""
    script = tmp_path / "threads.py"
    script.write_text(THREADS_LEFT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "python")}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr


def wrong_shares():
    layer = random_layer(64, 256, True)
    said = []
    for make in (
        lambda: ColumnParallelLinear(layer, split_evenly(64, dist.get_world_size())),
        lambda: ColumnParallelLinear(layer, ((0, 64),)),
        lambda: RowParallelLinear(layer, split_evenly(256 * dist.get_world_size(), dist.get_world_size())),
    ):
        try:
            make()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_wrong_shares_are_refused(processes):
    first, second = processes["refused"][1][:2]
    world_size = processes["refused"][0]
    assert f"expected the {64 // world_size} features 0 to {64 // world_size} of rank 0, got 64" in first[0]
    assert f"ranges: expected one for each of {world_size} ranks, got 1" in first[1]
    assert first[2] == ""
    assert "linear.bias: expected None on rank 1" in second[2]

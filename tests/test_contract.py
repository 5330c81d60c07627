"""What torch expects of an operator: schemas, opcheck, fake kernels, gradients, torch.compile, export, TorchScript."""

import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from test_gemm import Layer
from torch import nn
from torch.autograd import forward_ad

import sparse_marlin
from sparse_marlin import _core
from sparse_marlin import testing as smt

OPS = torch.ops.sparse_marlin
SCHEMAS = {
    "pack_24_weights": "(Tensor weight, Tensor scales, int group_size=128, int num_bits=4) -> Tensor",
    "unpack_24_weights": "(Tensor weight_packed, int size_n, int size_k, int num_bits=4) -> Tensor",
    "sparse_marlin_gemm": (
        "(Tensor a, Tensor weight_packed, Tensor scales, int group_size=128, int num_bits=4, "
        "Tensor? bias=None) -> Tensor"
    ),
    "sparse_marlin_gemm_low_rank": (
        "(Tensor a, Tensor weight_packed, Tensor scales, Tensor down, Tensor up, int group_size=128, int num_bits=4, "
        "Tensor? bias=None, Tensor? next_packed=None, Tensor? up_scales=None) -> Tensor"
    ),
    "sparse_marlin_gemm_prefetch": (
        "(Tensor a, Tensor weight_packed, Tensor scales, Tensor next_packed, int group_size=128, int num_bits=4, "
        "Tensor? bias=None) -> Tensor"
    ),
}


def half_of(device: torch.device) -> torch.dtype:
    """float32 where it runs: gradients are then checked tightly."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert str(getattr(OPS, name).default._schema) == f"sparse_marlin::{name}{SCHEMAS[name]}"


def opcheck_samples(device: torch.device) -> list[tuple]:
    dtype = half_of(device)
    layer = Layer(70, 132, 32, 8, dtype, device, bias=True)
    plain = Layer(64, 128, 128, 4, dtype, device)
    a = smt.activations(5, 132, dtype=dtype, device=device)
    deep = smt.activations(2, 3, 128, dtype=dtype, device=device)
    return [
        (OPS.pack_24_weights.default, (layer.codes, layer.scales, 32, 8)),
        (OPS.pack_24_weights.default, (smt.dequantized(plain.codes, plain.scales, 128), plain.scales)),
        (OPS.unpack_24_weights.default, (layer.packed, 70, 132, 8)),
        (OPS.sparse_marlin_gemm.default, (a, layer.packed, layer.scales, 32, 8, layer.bias)),
        (OPS.sparse_marlin_gemm.default, (deep, plain.packed, plain.scales)),
        (
            OPS.sparse_marlin_gemm.default,
            (a.clone().requires_grad_(), layer.packed, layer.scales, 32, 8, layer.bias.clone().requires_grad_()),
        ),
        (OPS.sparse_marlin_gemm_prefetch.default, (a, layer.packed, layer.scales, plain.packed, 32, 8, layer.bias)),
    ]


@pytest.mark.parametrize("sample", range(7))
def test_opcheck(device, sample):
    op, args = opcheck_samples(device)[sample]
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (65, 132), (576, 1024)])
def test_meta_tensors_have_the_shapes_of_real_ones(n, k, num_bits):
    meta = torch.device("meta")
    weight, scales = torch.empty(n, k, dtype=torch.int8, device=meta), torch.empty(1, n, device=meta)
    packed = OPS.pack_24_weights(weight, scales, -1, num_bits)
    assert (packed.shape, packed.dtype) == (_core.packed_shape(n, k, num_bits), torch.int32)
    codes = OPS.unpack_24_weights(packed, n, k, num_bits)
    assert (codes.shape, codes.dtype) == ((n, k), torch.int8)
    out = OPS.sparse_marlin_gemm(torch.empty(2, 3, k, dtype=torch.float16, device=meta), packed, scales, -1, num_bits)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, n), torch.float16, "meta")


def gradients(out: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    upstream = smt.activations(*out.shape, dtype=out.dtype, seed=5, device=out.device)
    return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("group_size", _core.GROUP_SIZES)
@pytest.mark.parametrize("shape", [(132,), (5, 132), (2, 3, 132)])
def test_gradients_are_those_of_the_dense_layer(device, shape, group_size):
    layer = Layer(70, 132, group_size, 4, half_of(device), device, bias=True)
    a = smt.activations(*shape, dtype=half_of(device), device=device).requires_grad_()
    layer.bias.requires_grad_()
    got = gradients(layer(a), a, layer.bias)
    weight = smt.dequantized(layer.codes, layer.scales, group_size)
    wanted = gradients(nn.functional.linear(a, weight, layer.bias), a, layer.bias)
    for name, x, y in zip(("a", "bias"), got, wanted, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_only_the_gradients_asked_for(device):
    layer = Layer(64, 128, dtype=half_of(device), device=device, bias=True)
    a = smt.activations(3, 128, dtype=half_of(device), device=device)
    assert not layer(a).requires_grad
    layer.bias.requires_grad_()
    (grad,) = gradients(layer(a), layer.bias)
    assert grad.shape == (64,)
    with torch.no_grad():
        assert not layer(a).requires_grad


@pytest.mark.parametrize("of", ["a", "bias", "both"])
def test_forward_mode_gradients(device, of):
    layer = Layer(70, 132, 32, 4, half_of(device), device, bias=True)
    a, bias = smt.activations(5, 132, dtype=half_of(device), device=device), layer.bias
    a_tangent = smt.activations(5, 132, dtype=a.dtype, seed=3, device=device)
    bias_tangent = smt.activations(70, dtype=a.dtype, seed=4, device=device)
    with forward_ad.dual_level():
        layer.bias = bias if of == "a" else forward_ad.make_dual(bias, bias_tangent)
        dual = layer(a if of == "bias" else forward_ad.make_dual(a, a_tangent))
        got = forward_ad.unpack_dual(dual).tangent
    # the product is linear: its tangent is the product of the tangents
    layer.bias = None if of == "a" else bias_tangent
    layer.check(got, torch.zeros_like(a) if of == "bias" else a_tangent, f"tangent of {of}")


def test_transforms_that_are_not_supported_are_errors(device):
    """Not wrong numbers: torch.func passes by the rule for gradients."""
    layer = Layer(64, 128, dtype=half_of(device), device=device)
    a = smt.activations(3, 128, dtype=half_of(device), device=device)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.jvp(layer, (a,), (a,))
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.grad(lambda x: layer(x).sum())(a)


class Block(nn.Module):
    """Two multiplications with something between them, and the codes as buffers."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        up, down = Layer(200, 132, 64, 4, dtype, device, bias=True), Layer(132, 200, -1, 8, dtype, device, seed=1)
        for name, layer in (("up", up), ("down", down)):
            self.register_buffer(f"{name}_packed", layer.packed)
            self.register_buffer(f"{name}_scales", layer.scales)
        self.register_buffer("bias", up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.ops.sparse_marlin.sparse_marlin_gemm(x, self.up_packed, self.up_scales, 64, 4, self.bias)
        h = torch.nn.functional.silu(h)
        return x + torch.ops.sparse_marlin.sparse_marlin_gemm(h, self.down_packed, self.down_scales, -1, 8)


@pytest.fixture
def block(device) -> Block:
    return Block(device, half_of(device))


def inputs(device: torch.device, m: int) -> torch.Tensor:
    return smt.activations(m, 132, dtype=half_of(device), seed=m, device=device)


def test_compile_with_a_dynamic_batch(device, block):
    """One graph for every batch size, without a break and without compiling again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for m in (3, 17, 64, 129):
        smt.assert_same_bits(compiled(inputs(device, m)), block(inputs(device, m)), f"m={m}")
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_with_inductor(device, block):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (5, 33):
            x = inputs(device, m)
            torch.testing.assert_close(compiled(x), block(x))


def test_compile_with_gradients(device, block):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    x, y = inputs(device, 6).requires_grad_(), inputs(device, 6).requires_grad_()
    compiled(x).sum().backward()
    block(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_compile_under_autocast(device, block):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        got, wanted = compiled(inputs(device, 4)), block(inputs(device, 4))
    torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.slow
def test_compile_with_cuda_graphs(cuda):
    torch._dynamo.reset()
    block = Block(cuda, torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for run in range(5):
            x = smt.activations(8, 132, dtype=torch.bfloat16, seed=run, device=cuda)
            torch.testing.assert_close(compiled(x).clone(), block(x))


def test_export_with_a_dynamic_batch(device, block):
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(block, (inputs(device, 8),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sparse_marlin.sparse_marlin_gemm.default") == 2
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for m in (1, 100):
        smt.assert_same_bits(loaded(inputs(device, m)), block(inputs(device, m)), f"m={m}")


def run_ahead_of_time(kind: str, device: torch.device, folder: Path) -> str | None:
    """Runs aot_inductor.py, which see; None, or how it failed."""
    program = Path(__file__).with_name("aot_inductor.py")
    package = str(Path(sparse_marlin.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(program), kind, device.type, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    end = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit status {done.returncode}"
    return f"{done.stderr[-2000:].strip()}\nended with {end}"


@pytest.fixture(scope="module")
def why_no_aot_inductor(tmp_path_factory):
    """Why torch alone cannot compile an nn.Linear ahead of time and run it on a device, or None; asked once."""
    return functools.cache(lambda device: run_ahead_of_time("linear", device, tmp_path_factory.mktemp("linear")))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_export_to_aot_inductor(device, why_no_aot_inductor, tmp_path):
    """Compiled ahead of time and called without Python in between."""
    reason = why_no_aot_inductor(device)
    if reason:
        end = ", ".join(reason.splitlines()[-2:]).strip(", ")
        pytest.skip(f"torch {torch.__version__} alone fails here: nn.Linear compiled ahead of time for {device}: {end}")
    failure = run_ahead_of_time("block", device, tmp_path)
    assert failure is None, failure


@torch.jit.script
def scripted_gemm(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return torch.ops.sparse_marlin.sparse_marlin_gemm(a, weight, scales, 64, 4, bias)


def test_torchscript_function(device):
    layer = Layer(70, 132, 64, 4, half_of(device), device, bias=True)
    a = inputs(device, 4)
    smt.assert_same_bits(scripted_gemm(a, layer.packed, layer.scales, layer.bias), layer(a))
    layer.bias = None
    smt.assert_same_bits(scripted_gemm(a, layer.packed, layer.scales, None), layer(a))


def test_torchscript_module(device, block):
    scripted = torch.jit.script(block)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    smt.assert_same_bits(loaded(inputs(device, 9)), block(inputs(device, 9)))


def test_inference_mode(device):
    layer = Layer(64, 128, dtype=half_of(device), device=device)
    a = smt.activations(4, 128, dtype=half_of(device), device=device)
    with torch.inference_mode():
        inside = layer(a)
    smt.assert_same_bits(inside, layer(a))


def test_the_arguments_are_left_alone(device):
    layer = Layer(64, 128, 32, 4, half_of(device), device, bias=True)
    a = smt.activations(40, 128, dtype=half_of(device), device=device)
    before = [t.clone() for t in (a, layer.packed, layer.scales, layer.bias)]
    layer(a)
    for name, old, new in zip("awsb", before, (a, layer.packed, layer.scales, layer.bias), strict=True):
        smt.assert_same_bits(new, old, name)


def test_info_prints_what_this_machine_can_run():
    info = sparse_marlin.info()
    text = str(info)
    for part in (sparse_marlin.__version__, torch.__version__, _core.FORMAT_NAME, info.cpu_isa):
        assert part in text
    assert bool(info.gpus) != bool(info.gpu_note)
    assert info.as_dict()["version"] == sparse_marlin.__version__


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "compute_80 (PTX)"),
        ((12, 0), "compute_80 (PTX)"),
        ((7, 5), ""),
    ],
)
def test_which_code_a_gpu_loads(capability, wanted):
    from sparse_marlin.info import compiled_code_for

    assert compiled_code_for(capability, ("sm_80", "compute_80", "sm_90a")) == wanted

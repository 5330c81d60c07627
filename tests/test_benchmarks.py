"""The benchmarks as programs: arguments, peers, what a run leaves behind and how it is drawn. No time is judged."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import bench_gemm
import bench_sustained
import peers
import pytest
import summary
import tables
import timing
import torch
from peer_base import ContextLostError, LeftOut, UnsupportedError, Weight
from peers import Setting, why_not
from peers_torch import Fp8, prune_24

from sparse_marlin import _core

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
H100 = _core.Device(90, 132, 232448, 233472, 50 * 2**20)


def row(shape: str, m: int, us: float, cublas: float, **peer_us: float) -> dict[str, Any]:
    found = {
        name.replace("_", "-"): {"us": t, "us_range": [t, t], "speedup": cublas / t} for name, t in peer_us.items()
    }
    return {
        "shape": shape, "k": 4096, "n": 6144, "m": m, "us": us, "us_range": [us, us], "cublas_us": cublas,
        "cublas_range": [cublas, cublas], "speedup": cublas / us, "tflops": 1.0, "tb_per_s": 1.0,
        "floor_fraction": 0.5, "tile": "sm90 128x256 share 2 splits 1", **({"peers": found} if found else {}),
    }  # fmt: skip


RESULT: dict[str, Any] = {
    "gpu": "NVIDIA H100", "dtype": "float16", "num_bits": 4, "group_size": 128, "kernel": None,
    "left_out": {"marlin": {"its status 1": ["a M=1", "b M=1"]}},
    "rows": [
        row("a", 1, 5.0, 20.0, cusparselt=40.0, fp8=10.0), row("a", 64, 10.0, 20.0, cusparselt=8.0),
        row("b", 1, 10.0, 10.0, cusparselt=10.0), row("b", 64, 5.0, 40.0, cusparselt=10.0),
    ],
}  # fmt: skip


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*sorted(p.stem for p in BENCHMARKS.glob("bench_*.py")), "profile_gemm", "tables", "plots"]
)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needs = {"bench_model": "transformers", "plots": "matplotlib"}
    if name in needs:
        pytest.importorskip(needs[name])
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_gemm_arguments() -> None:
    parse = bench_gemm.parser().parse_args
    args = parse([])
    assert args.tokens == bench_gemm.TOKENS
    assert args.peers == ["cusparselt", "torch-int4", "fp8"]
    assert set(args.peer_tokens) <= set(args.tokens)
    assert args.shapes == list(bench_gemm.SHAPES)
    args = parse(["--peers", "fp8,cusparselt,fp8", "--tokens", "1,7", "--kernel", "sm80", "--shapes", "8B qkv"])
    assert (args.peers, args.tokens, args.kernel, args.shapes) == (["fp8", "cusparselt"], [1, 7], "sm80", ["8B qkv"])
    assert parse(["--peers", "none"]).peers == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,0"], "positive numbers separated by commas"),
        (["--tokens", "1,,2"], "positive numbers separated by commas"),
        (["--peers", "marlin"], "names of cusparselt, torch-int4, fp8"),
        (["--shapes", "9B"], "names of 8B qkv, "),
        (["--kernel", "sm70"], "invalid choice: 'sm70'"),
        (["--num-bits", "3"], "invalid choice: 3"),
    ],
)
def test_gemm_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_gemm.parser().parse_args(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_gemm_says_what_a_library_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "libmarlin.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(sys, "argv", ["bench_gemm.py", "--marlin", str(path)])
    with pytest.raises(SystemExit) as ended:
        bench_gemm.main()
    assert ended.value.code == 2
    assert f"--marlin: expected a shared library with the public Marlin kernel, got {path}" in capsys.readouterr().err


def test_command_line_names_files_without_their_folders() -> None:
    argv = ["/somewhere/benchmarks/bench_gemm.py", "--shapes", "8B qkv", "--out", "/elsewhere/x.json"]
    assert timing.command_line(argv) == "python benchmarks/bench_gemm.py --shapes '8B qkv' --out x.json"


def test_estimate_grows_with_the_work() -> None:
    parse = bench_gemm.parser().parse_args
    least = bench_gemm.estimate_seconds(parse(["--tokens", "1"]), 0)
    rested = bench_gemm.estimate_seconds(parse(["--tokens", "1,4096", "--rest", "1"]), 0)
    assert rested - least > 4 * 2 * bench_gemm.RESTED_ROUNDS  # shapes, contestants
    assert bench_gemm.estimate_seconds(parse([]), 3) > bench_gemm.estimate_seconds(parse([]), 0)


def test_the_meter_reads_what_is_told_since() -> None:
    read = bench_sustained.Meter(["1980, 450.5\n", "[N/A], [N/A]\n", "1500, 700.5\n"])
    read.thread.join()
    assert read.mean(0) == (1740, 575.5)
    assert read.mean(read.readings[-1][0] + 1) == (None, None)


def test_without_nvidia_smi_there_are_times_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with bench_sustained.meter() as readings:
        assert readings.mean(0) == (None, None)


def test_a_row_of_a_gpu_without_a_pause() -> None:
    us = {"rested_us": 30.0, "sustained_us": 40.0}
    row = {"shape": "8B qkv", "m": 128, "cublas": {**us, "clock_mhz": 1500.0, "power_w": 700.0}}
    unread = {"rested_us": 15.0, "sustained_us": 16.0, "clock_mhz": None, "power_w": None}
    shown = bench_sustained.line({**row, "ours": unread})
    assert "cublas     30.0 us rested,     40.0 sustained, 1500 MHz, 700 W; ours     15.0 us rested" in shown
    assert shown.endswith("16.0 sustained: 2.50 x")


# --- plans and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_best_plan_of_a_family(tokens: int) -> None:
    problem = _core.Problem(tokens, 6144, 4096)
    chosen = bench_gemm.best_plan(problem, H100, None)
    assert chosen is not None
    assert chosen.tile == _core.plan(problem, H100).tile
    for kernel in bench_gemm.KERNELS:
        plan = bench_gemm.best_plan(problem, H100, kernel)
        assert plan is not None
        assert _core.TILES[plan.tile].kernel == kernel


def test_best_plan_where_a_family_cannot_run() -> None:
    a100 = _core.Device(80, 108, 166912, 167936, 40 * 2**20)
    assert bench_gemm.best_plan(_core.Problem(4096, 6144, 4096), a100, "sm90") is None


def test_copies_keep_the_cache_cold() -> None:
    for size in (10_000, 10_000_000, 90_000_000, 900_000_000):
        count = timing.copies(size)
        assert 2 <= count <= timing.MAX_COPIES
        assert count * size >= timing.ROTATED_BYTES or count == timing.MAX_COPIES


@pytest.mark.parametrize("n", [8, 12])  # the pattern repeats after 8 rows
def test_pruning_leaves_two_of_four(n: int) -> None:
    values = torch.randn(n, 64)
    pruned = prune_24(values.clone(), rows=8)
    kept = pruned != 0
    assert bool((kept.view(n, -1, 4).sum(-1) == 2).all())
    assert torch.equal(pruned[kept], values[kept])
    assert torch.equal(kept[8:], kept[: n - 8])
    assert len({tuple(quad) for quad in kept.view(-1, 4).tolist()}) == math.comb(4, 2)


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("fp8", Setting("float16", 4, 128, 90), None),
        ("fp8", Setting("float16", 4, 128, 80), "fp8 needs compute capability 8.9"),
        ("cusparselt", Setting("bfloat16", 8, -1, 75), "needs compute capability 8.0"),
        ("torch-int4", Setting("bfloat16", 4, 128, 90), None),
        ("torch-int4", Setting("float16", 4, 128, 90), "bfloat16 only"),
        ("torch-int4", Setting("bfloat16", 4, -1, 90), "groups of 32, 64, 128 or 256 only"),
        ("torch-int4", Setting("bfloat16", 8, 128, 90), "4-bit weights only"),
        ("marlin", Setting("float16", 4, -1, 90), None),
        ("marlin", Setting("bfloat16", 4, 128, 90), "float16 only"),
        ("sparse-marlin", Setting("float16", 4, 32, 90), "groups of 128 or whole rows only"),
        ("sparse-marlin", Setting("float16", 8, 128, 90), "4-bit weights only"),
    ],
)
def test_why_a_peer_is_not_measured(name: str, setting: Setting, reason: str | None) -> None:
    assert why_not(name, setting) == reason


def test_every_peer_has_a_name_for_readers() -> None:
    assert [summary.PLAIN, *peers.TORCH_PEERS, *peers.LIBRARY_PEERS] == list(summary.PEERS)


def test_cusparselt_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert why_not("cusparselt", Setting("float16", 4, 128, 90)) == "this torch was built without cuSPARSELt"


def test_a_peer_is_checked_before_it_is_timed() -> None:
    """fp8 on the CPU, where torch can multiply it too."""
    peer = Fp8(Weight(torch.randn(64, 128).mul_(0.02).bfloat16(), 128))
    assert len({weight.data_ptr() for weight in peer.weights}) == len(peer.weights)
    a = torch.randn(5, 128).bfloat16()
    call = peer.prepare(a)
    assert call(1).shape == (5, 64)
    peer.check(a, call)
    for wrong in (lambda i: call(i) * 1.1, lambda i: call(i) * float("nan"), lambda i: call(i).roll(1, 1)):
        with pytest.raises(UnsupportedError, match="wrong result"):
            peer.check(a, wrong)


def test_a_peer_refuses_a_shape() -> None:
    with pytest.raises(UnsupportedError, match="N and K multiples of 16 only"):
        Fp8(Weight(torch.zeros(8, 128), 128))


def test_a_failure_is_recorded_and_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    left_out = LeftOut()
    assert left_out.attempt("fp8", "a M=1", lambda x: x + 1, 1) == 2

    def fail() -> None:
        raise RuntimeError("first line\nsecond line")

    for where in ("a M=1", "b M=1"):
        assert left_out.attempt("fp8", where, fail) is None
    assert json.loads(json.dumps(left_out.reasons)) == {"fp8": {"first line": ["a M=1", "b M=1"]}}
    assert capsys.readouterr().err.count("first line") == 1  # said once


def test_a_lost_context_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal instruction was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(ContextLostError, match="public Marlin, a M=1: an illegal instruction"):
        LeftOut().attempt("marlin", "a M=1", lambda: None)


# --- what the rows say ------------------------------------------------------------------------------------------------


def test_means_are_of_all_shapes_or_none() -> None:
    rows = RESULT["rows"]
    assert summary.geometric_means(rows, summary.own_speedup) == pytest.approx({1: 2.0, 64: 4.0})
    means = {
        name: summary.geometric_means(rows, lambda r, name=name: summary.peer_speedup(r, name))
        for name in summary.PEERS
    }
    assert means["cusparselt"] == pytest.approx({1: math.sqrt(0.5), 64: math.sqrt(10)})
    assert means["fp8"] == {}  # measured for one shape of two
    assert summary.measured_peers(rows) == ["cusparselt", "fp8"]


def test_least_ratios_say_where() -> None:
    least = summary.least_ratios(RESULT["rows"])
    assert least["cuBLAS"] == (1.0, "b, M=1")
    assert least["cuSPARSELt 2:4"] == (pytest.approx(0.8), "a, M=64")
    assert least["fp8 (torch._scaled_mm)"] == (2.0, "a, M=1")


def test_gemm_table() -> None:
    assert tables.table(RESULT) == (
        "| tokens | 1 | 64 |\n"
        "| --- | --- | --- |\n"
        "| **geometric mean** | 2.00 | 4.00 |\n"
        "| cuSPARSELt 2:4, geometric mean | 0.71 | 3.16 |\n"
        "| fp8 (torch._scaled_mm), geometric mean |  |  |\n"
        "| a, 4096 → 6144 | 4.00 | 2.00 |\n"
        "| us | 5.0 | 10.0 |\n"
        "| of floor | 0.50 | 0.50 |\n"
        "| cuSPARSELt 2:4 | 0.50 | 2.50 |\n"
        "| fp8 (torch._scaled_mm) | 2.00 |  |\n"
        "| b, 4096 → 6144 | 1.00 | 8.00 |\n"
        "| us | 10.0 | 5.0 |\n"
        "| of floor | 0.50 | 0.50 |\n"
        "| cuSPARSELt 2:4 | 1.00 | 4.00 |"
    )
    assert tables.gemm_remarks(RESULT) == [
        "Least x cuBLAS: 1.00 (b, M=1).",
        "Least x cuSPARSELt 2:4: 0.80 (a, M=64).",
        "Least x fp8 (torch._scaled_mm): 2.00 (a, M=1).",
        "public Marlin left out: its status 1 (a M=1, b M=1).",
    ]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("gemm_*.json")), ids=lambda path: path.stem)
def test_committed_results_are_rendered(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", str(path)])
    tables.main()
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    means = " | ".join(f"{value:.2f}" for value in result["geomean"].values())
    assert f"| **geometric mean** | {means} |" in printed
    assert f"Least x cuBLAS: {min(r['speedup'] for r in result['rows']):.2f}" in printed


def test_a_plot_names_everybody_and_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    plots.save(plots.draw(RESULT), tmp_path / "one.svg")
    plots.save(plots.draw(RESULT), tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    for text in ("sparse_marlin", "cuSPARSELt 2:4", "a, 4096 → 6144", "NVIDIA H100", "groups of 128"):
        assert text in drawn
    with pytest.raises(ValueError, match="expected a file of bench_gemm"):
        plots.draw({"rows": [{"m": 1}]})


def test_results_replace_the_file_whole(tmp_path: Path) -> None:
    result = {**RESULT, "rows": list(RESULT["rows"])}
    bench_gemm.summarize(result)
    path = tmp_path / "gemm.json"
    path.write_text("old")
    bench_gemm.write(path, result)
    written = json.loads(path.read_text())
    assert written["geomean"] == pytest.approx({"1": 2.0, "64": 4.0})
    assert written["least"]["cuBLAS"] == {"x": 1.0, "at": "b, M=1"}
    assert [p.name for p in tmp_path.iterdir()] == ["gemm.json"]


# --- on the GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("name", peers.TORCH_PEERS)
def test_peers_compute_what_they_should(name: str, tokens: int, cuda: torch.device) -> None:
    capability = torch.cuda.get_device_capability()
    if reason := why_not(name, Setting("bfloat16", 4, 128, capability[0] * 10 + capability[1])):
        pytest.skip(reason)
    recorder = timing.Recorder()
    with torch.cuda.stream(recorder.stream), torch.inference_mode():
        weight = Weight(torch.randn(512, 1024, device=cuda).mul_(0.02).bfloat16(), 128)
        peer = peers.build(name, weight, recorder, 1.0, None)
        a = torch.randn(tokens, 1024, device=cuda).bfloat16()
        call = peer.prepare(a)
        peer.check(a, call)
        (times,) = recorder.times([recorder.capture(call, 3)], 2)
        with pytest.raises(UnsupportedError, match="wrong result"):
            peer.check(a, lambda i: -call(i))
    assert len(times) == 2
    assert min(times) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [None, "sm80"])
def test_gemm_measures(kernel: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gemm, "SHAPES", {"small": (1024, 512)})
    path = tmp_path / "gemm.json"
    arguments = [
        "--shapes",
        "small",
        "--tokens",
        "1,24",
        "--peer-tokens",
        "24",
        "--rest-tokens",
        "24",
        "--rest",
        "0.01",
    ]
    arguments += ["--dtype", "bfloat16", "--out", str(path), *(["--kernel", kernel] if kernel else [])]
    monkeypatch.setattr(sys, "argv", ["bench_gemm.py", *arguments])
    assert bench_gemm.main() == 0
    result = json.loads(path.read_text())
    assert [found["m"] for found in result["rows"]] == [1, 24]
    for found in result["rows"]:
        assert found["us"] > 0
        assert found["speedup"] == pytest.approx(found["cublas_us"] / found["us"])
        assert kernel is None or f" {kernel} " in found["tile"]
    assert "peers" not in result["rows"][0]
    assert set(result["rows"][1]["peers"]) | set(result["left_out"]) == set(peers.TORCH_PEERS)

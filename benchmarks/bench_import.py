"""Times the import of marlin-24 weights and their export, alone and as a whole checkpoint on disk.

    python benchmarks/bench_import.py                           # on the GPU where there is one, otherwise on the CPU
    python benchmarks/bench_import.py --device cpu --threads 2 --json > benchmarks/results/import_cpu.json

Bytes are those of the packed weights (codes and metadata), read once and written once. The checkpoint is one decoder
layer of Llama-3-8B's shape: read, converted, written, read back, exported again and compared, as `sparse-marlin import`
does it. Codes are random, so quads with fewer than two are frequent; trained weights have fewer.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from sparse_marlin import legacy

LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
VALID_NIBBLES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)


def random_layer(n: int, k: int, num_bits: int) -> dict[str, torch.Tensor]:
    """Any words are codes; metadata is any of the six pairs of rising indices."""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-(2**31), 2**31, (k // 32, n * num_bits // 2), generator=generator, dtype=torch.int64)
    nibbles = torch.tensor(VALID_NIBBLES, dtype=torch.int32)[
        torch.randint(0, len(VALID_NIBBLES), (k // 32, n * 2, 4), generator=generator)
    ]
    meta = (nibbles << torch.arange(0, 16, 4, dtype=torch.int32)).sum(-1)
    scales = torch.rand((k // 128, n), generator=generator) * 0.01 + 0.001
    return {"B_24": codes.to(torch.int32), "B_meta": meta.to(torch.int16), "s": scales.half()}


def seconds(call: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    found = []
    for i in range(calls + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 0:
            found.append(time.perf_counter() - start)
    return found


def time_layer(n: int, k: int, num_bits: int, device: torch.device, calls: int) -> dict[str, Any]:
    tensors = {key: tensor.to(device) for key, tensor in random_layer(n, k, num_bits).items()}
    packed = legacy.import_marlin_24(*tensors.values())
    nbytes = packed.weight_packed.nbytes
    row: dict[str, Any] = {"n": n, "k": k, "num_bits": num_bits, "packed_bytes": nbytes}
    for name, call in (
        ("import", lambda: legacy.import_marlin_24(*tensors.values())),
        ("export", lambda: legacy.export_marlin_24(packed)),
    ):
        times = seconds(call, device, calls)
        row[f"{name}_ms"] = statistics.median(times) * 1e3
        row[f"{name}_ms_range"] = [min(times) * 1e3, max(times) * 1e3]
        row[f"{name}_mb_per_s"] = nbytes / statistics.median(times) / 1e6
    return row


def time_checkpoint(num_bits: int, device: torch.device, folder: Path) -> dict[str, Any]:
    source = folder / "source"
    source.mkdir()
    tensors = {
        f"model.layers.0.{name}.{key}": tensor
        for name, (n, k) in LAYER.items()
        for key, tensor in random_layer(n, k, num_bits).items()
    }
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(
        json.dumps(
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": num_bits}}
        )
    )
    nbytes = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".s"))
    start = time.perf_counter()
    legacy.import_checkpoint(source, folder / "imported", device=device)
    took = time.perf_counter() - start
    start = time.perf_counter()
    legacy.export_checkpoint(folder / "imported", folder / "exported", format="gptq-marlin-24", device=device)
    back = time.perf_counter() - start
    return {
        "num_bits": num_bits,
        "packed_bytes": nbytes,
        "import_s": took,
        "import_mb_per_s": nbytes / took / 1e6,
        "export_s": back,
        "export_mb_per_s": nbytes / back / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="NxK, several separated by commas")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; default: torch's own number")
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes.split(",")]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layers": [time_layer(n, k, bits, device, args.calls) for bits in (4, 8) for n, k in shapes],
        "checkpoints": [],
    }
    for bits in (4, 8):
        with tempfile.TemporaryDirectory(prefix="bench-import-") as folder:
            result["checkpoints"].append(time_checkpoint(bits, device, Path(folder)))
    if args.json:
        print(json.dumps(result, indent=2))
        return
    table = Table(title=f"{result['device']}, {result['threads']} threads: MB/s of packed weights")
    for column in ("what", "bits", "MB", "import", "export"):
        table.add_column(column, justify="right")
    rows = [(f"{row['n']} x {row['k']}", row) for row in result["layers"]]
    for name, row in [*rows, *(("checkpoint on disk, verified", row) for row in result["checkpoints"])]:
        speeds = (f"{row[key]:.0f}" for key in ("import_mb_per_s", "export_mb_per_s"))
        table.add_row(name, str(row["num_bits"]), f"{row['packed_bytes'] / 1e6:.1f}", *speeds)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

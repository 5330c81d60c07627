"""Compiles a module ahead of time, loads the package and compares what it computes: `aot_inductor.py linear|block
cpu|cuda FOLDER`.

A program of its own, not a test: on some machines torch's loader of such packages ends the process. `linear` is torch
alone and says whether it does; `block` is ours.
"""

import sys
from pathlib import Path

import torch
from torch import nn


def linear(device: torch.device) -> tuple[nn.Module, list[torch.Tensor]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = nn.Linear(132, 132, device=device, dtype=dtype)
    return model, [torch.randn(m, 132, device=device, dtype=dtype) for m in (8, 1, 100)]


def block(device: torch.device) -> tuple[nn.Module, list[torch.Tensor]]:
    import test_contract  # not at the top: `linear` must not load our library

    dtype = test_contract.half_of(device)
    return test_contract.Block(device, dtype), [test_contract.inputs(device, m) for m in (8, 1, 100)]


def main(kind: str, device_name: str, folder: str) -> None:
    device = torch.device(device_name)
    model, examples = {"linear": linear, "block": block}[kind](device)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (examples[0],), dynamic_shapes=({0: batch},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / f"{kind}.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for x in examples:
            torch.testing.assert_close(loaded(x), model(x))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One rank of a process group that torchrun started (`make test-multi-gpu`); without it these tests are skipped.

SPARSE_MARLIN_TP_DEVICE=cpu runs them over gloo on the CPU, to develop them without GPUs.
"""

import datetime
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers beside the other tests

DEVICE = os.environ.get("SPARSE_MARLIN_TP_DEVICE", "cuda")


def why_not():
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return "needs two or more processes with a GPU each: make test-multi-gpu"
    if DEVICE == "cuda" and torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
        return f"needs a GPU for each of {os.environ['WORLD_SIZE']} processes, found {torch.cuda.device_count()}"
    return None


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if reason is not None and Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def place():
    """This rank's device. What one rank alone finds wrong it says after the last collective call of a test: the others
    would wait for it."""
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if DEVICE == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=90),
        device_id=device if device.type == "cuda" else None,
    )
    yield device
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def shared_folder(place, tmp_path_factory):
    """A folder that every rank sees; rank 0 writes to it."""
    paths = [str(tmp_path_factory.mktemp("shared")) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(paths, src=0, device=place)
    return Path(paths[0])


@pytest.fixture(scope="session")
def graphed(place):
    """Two results of a call: replays of a CUDA graph of it (on the CPU: calls), with other inputs in between."""

    def run(call, x):
        """call(x) from a graph that was captured with zeros in the place of x."""
        if place.type == "cpu":
            return call(x), call(x)
        static = torch.zeros_like(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # loads kernels, opens connections
                call(static)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog is another thread of this process, which may ask the driver something meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = call(static)
        found = []
        for _ in range(2):
            static.zero_()
            graph.replay()
            static.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            found.append(out.clone())
        return found[0], found[1]

    return run

"""The processes of a benchmark that torchrun started, and the time of what they do together."""

import datetime
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from timing import REPLAYS


class Ranks:
    """This process's place: rank 0 of 1 without torchrun."""

    def __init__(self, device: str) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = (
            torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
        )
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=60),
                device_id=self.device if device == "cuda" else None,
            )

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier()

    def slowest(self, values: list[float]) -> list[float]:
        times = torch.tensor(values, device=self.device)
        if self.size > 1:
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times.tolist()

    def all_true(self, value: bool) -> bool:
        flag = torch.tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def time_us(self, call: Callable[[], object], passes: int) -> list[float]:
        """Microseconds of one call on the slowest rank, from replays of a CUDA graph of `passes` calls."""
        if self.device.type == "cpu":
            found = []
            for _ in range(2):
                self.barrier()
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e6)
            return self.slowest(found)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # loads kernels, opens connections
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.barrier()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog is another thread of this process, which may ask the driver something meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(passes):
                call()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        found = []
        for _ in range(REPLAYS):
            self.barrier()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / passes)
        return self.slowest(found)

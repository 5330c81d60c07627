"""Fixtures that all tests share. A test that takes `device` runs on the CPU and, where there is one, on the GPU."""

import os

import pytest
import torch

import sparse_marlin
from sparse_marlin import _core

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not _core.BUILT_CUDA_VERSION:
        return "sparse_marlin was built without CUDA"
    gpu = sparse_marlin.info().gpus[0]
    return None if gpu.runs else gpu.reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    # `make test-gpu` must not pass by skipping.
    if reason is None or os.environ.get("SPARSE_MARLIN_REQUIRE_GPU"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """For tests marked `gpu`."""
    return torch.device("cuda")

"""Runs tests/multi_gpu with two processes and records the outcome in benchmarks/results/multi_gpu_tests.json.

    make test-multi-gpu                                          # over NCCL; fails with fewer than two GPUs
    SPARSE_MARLIN_TP_DEVICE=cpu python tools/test_multi_gpu.py   # over gloo on the CPU, without a record

Needs no network: the extension must have been built in place. The recorded commit is SPARSE_MARLIN_COMMIT or git's.
Arguments go to pytest. This file starts itself under torchrun: with RANK set it is one of the processes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from commit import ROOT, commit
from test_gpu import outcomes

RECORD = ROOT / "benchmarks" / "results" / "multi_gpu_tests.json"
RESULTS = "SPARSE_MARLIN_MULTI_GPU_RESULTS"  # folder for what each rank found
PROCESSES = 2


def one_rank() -> int:
    import pytest

    junit = Path(os.environ[RESULTS]) / f"{os.environ['RANK']}.xml"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={junit}", "--rootdir", str(ROOT)]
    if os.environ["RANK"] != "0":  # one report is enough to read; failures of every rank are in the record
        options += ["--no-header", "--no-summary"]
    return int(pytest.main([*options, str(ROOT / "tests" / "multi_gpu"), *sys.argv[1:]]))


def main() -> int:
    if "RANK" in os.environ:
        return one_rank()
    on_gpu = os.environ.get("SPARSE_MARLIN_TP_DEVICE", "cuda") == "cuda"
    if on_gpu and torch.cuda.device_count() < PROCESSES:
        print(
            f"make test-multi-gpu: expected {PROCESSES} GPUs, found {torch.cuda.device_count()}; the same tests run "
            "over gloo with SPARSE_MARLIN_TP_DEVICE=cpu",
            file=sys.stderr,
        )
        return 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        command = [sys.executable, *launcher, __file__, *sys.argv[1:]]
        environment = {**os.environ, RESULTS: folder}
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        found = {file.stem: outcomes(file) for file in sorted(Path(folder).glob("*.xml"))}
    for rank in range(PROCESSES):
        if str(rank) not in found:
            print(f"rank {rank} ended without a report", file=sys.stderr)
            status = status or 1
    if any(each["passed"] + each["failed"] + each["errors"] == 0 for each in found.values()):
        print("no test ran", file=sys.stderr)
        status = status or 1
    record = {
        "commit": commit(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": PROCESSES,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "arguments": sys.argv[1:],
        "seconds": round(time.monotonic() - start, 1),
        "exit_status": status,
        "ranks": found,
    }
    summary = "; ".join(
        f"rank {rank}: " + ", ".join(f"{each[key]} {key}" for key in ("passed", "failed", "errors", "skipped"))
        for rank, each in found.items()
    )
    for rank, each in found.items():
        for failure in each["failures"]:
            print(f"rank {rank}: {failure}", file=sys.stderr)
    if on_gpu:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{RECORD.relative_to(ROOT)}: {summary}")
    else:
        print(summary)
    return status


if __name__ == "__main__":
    sys.exit(main())

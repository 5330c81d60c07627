"""Runs the Python tests with the GPU and records the outcome in benchmarks/results/gpu_tests.json. Fails without a GPU.

Needs no network: the extension must have been built in place. The recorded commit is SPARSE_MARLIN_COMMIT or git's.
Arguments go to pytest.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from commit import ROOT, commit

RECORD = ROOT / "benchmarks" / "results" / "gpu_tests.json"


def outcomes(junit: Path) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    failures = []
    for case in ElementTree.parse(junit).iter("testcase"):
        seconds[f"{case.get('classname')}::{case.get('name')}"] = round(float(case.get("time", 0)), 1)
        kinds = {child.tag: child for child in case}
        kind = next((k for k in ("error", "failure", "skipped") if k in kinds), "passed")
        counts[kind] += 1
        if kind == "skipped":
            skipped[kinds[kind].get("message", "")] += 1
        elif kind != "passed":
            failures.append(f"{case.get('classname')}::{case.get('name')}: {kinds[kind].get('message', '')[:500]}")
    return {
        "passed": counts["passed"],
        "failed": counts["failure"],
        "errors": counts["error"],
        "skipped": counts["skipped"],
        "skip_reasons": dict(skipped),
        "failures": failures,
        "slowest": dict(seconds.most_common(20)),  # seconds
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("make test-gpu: expected a CUDA device, found none; `make test` runs without one", file=sys.stderr)
        return 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={junit}", "-q", *sys.argv[1:]]
        environment = {**os.environ, "SPARSE_MARLIN_REQUIRE_GPU": "1"}
        # who ends this ends pytest, too: left alone, it would go on using the GPU
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not junit.exists():
            return status or 1
        found = outcomes(junit)
    record = {
        "commit": commit(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "arguments": sys.argv[1:],
        "seconds": round(time.monotonic() - start, 1),
        "exit_status": status,
        **found,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{RECORD.relative_to(ROOT)}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    return status


if __name__ == "__main__":
    sys.exit(main())

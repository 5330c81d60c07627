"""Runs every kernel under the tools of compute-sanitizer and records the outcome in benchmarks/results/sanitize.json.

    python tools/sanitize.py                          # all four tools at once
    python tools/sanitize.py racecheck                # one of them; the others' records stay
    python tools/sanitize.py --only corrections       # a kind of launches alone, for a first look; recorded nowhere

What they run is tools/sanitize_launches.py. A warning is a failure, too. Fails without a GPU. COMPUTE_SANITIZER names
the program where it is not on the path.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from commit import ROOT, commit
from sanitize_launches import FEW_BLOCKS, ONLY, WITHOUT_STREAM_K

import sparse_marlin

LAUNCHES = Path(__file__).with_name("sanitize_launches.py")
RECORD = ROOT / "benchmarks" / "results" / "sanitize.json"
# Only our kernels are watched: torch's would take most of the time. initcheck must see what those write, too; what a
# tensor copy (TMA) stores it does not see, so it must not look when the output is copied to the host.
OURS = ["--kernel-name", "kns=sparse_marlin"]
TOOLS = {
    "memcheck": OURS,
    "racecheck": [*OURS, "--racecheck-report", "all"],
    "synccheck": [*OURS, "--num-cuda-barriers", "65536"],  # the default is fewer than these kernels have
    "initcheck": ["--check-api-memory-access", "no"],
}
LEFT_OUT = {"racecheck": [FEW_BLOCKS], "initcheck": [WITHOUT_STREAM_K]}
PARTS = {"racecheck": 12, "synccheck": 2}  # processes that share out what a tool looks at: the slow ones
TIME_LIMIT = 420  # seconds, for one tool
REPORTED = 9  # exit status of a tool that has found something, a warning, too
SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)")


def check(sanitizer: str, tool: str, only: list[str]) -> dict[str, Any]:
    options = [*TOOLS[tool], "--print-limit", "20", "--error-exitcode", str(REPORTED)]
    start = time.monotonic()
    command = [sanitizer, "--tool", tool, *options, sys.executable, str(LAUNCHES), *LEFT_OUT.get(tool, []), *only]
    parts = PARTS.get(tool, 1)
    with ThreadPoolExecutor(parts) as pool:
        runs = list(pool.map(lambda part: run_part([*command, "--part", f"{part}/{parts}"]), range(parts)))
    launches: Counter[str] = Counter()
    summaries = []
    for run in runs:
        summaries += SUMMARY.findall(run.stdout + run.stderr)[-1:] or ["none"]
        launched = re.search(r"^\{\"[^{}]*\}$", run.stdout, re.MULTILINE)  # reports of faults hold braces, too
        launches.update(json.loads(launched.group()) if launched else {})
    return {
        "tool": tool,
        "options": options,
        "exit_status": max(abs(run.returncode) for run in runs),
        "summary": summaries[0] if len(set(summaries)) == 1 else "; ".join(summaries),
        "launches": dict(launches),
        "seconds": round(time.monotonic() - start, 1),
    }


def run_part(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Every tensor an allocation of its own: what lies between two of them is then nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as late:
        run = subprocess.CompletedProcess(command, 1, (late.stdout or b"").decode(), (late.stderr or b"").decode())
    if run.returncode != 0 or not SUMMARY.search(run.stdout + run.stderr):
        print(f"--- {' '.join(command)}\n{run.stdout[:20000]}\n{run.stderr[-2000:]}", file=sys.stderr)
    return run


def clean(done: dict[str, Any]) -> bool:
    return done["exit_status"] == 0 and "none" not in done["summary"]


def shown(done: dict[str, Any]) -> dict[str, Any]:
    print(f"{done['tool']}: {done['summary']} ({done['launches']}, {done['seconds']} s)", flush=True)
    return done


def version(sanitizer: str) -> str:
    run = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Version (.*)", run.stdout)
    return found.group(1) if found else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help=f"{', '.join(TOOLS)}; all where none is named")
    parser.add_argument(ONLY, metavar="KIND", help="launches of this kind alone; leaves the record as it is")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make sanitize: expected a CUDA device, found none", file=sys.stderr)
        return 1
    sanitizer = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("make sanitize: compute-sanitizer: not found; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    tools = args.tools or list(TOOLS)
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"expected tools of {', '.join(TOOLS)}, got {', '.join(unknown)}")
    with ThreadPoolExecutor(len(tools)) as pool:
        only = [ONLY, args.only] if args.only else []
        runs = [pool.submit(check, sanitizer, tool, only) for tool in tools]
        checks = []
        for run in as_completed(runs):
            checks.append(shown(run.result()))
            if not only:
                record(checks[-1], sanitizer)
    return 0 if all(clean(c) for c in checks) else 1


def record(done: dict[str, Any], sanitizer: str) -> None:
    """At once, beside the other tools' last records: not all need to end."""
    before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    kept = [c for c in before.get("checks", []) if c["tool"] != done["tool"]]
    together = {
        "device": torch.cuda.get_device_name(),
        "compute_sanitizer": version(sanitizer),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "code": sparse_marlin.info().gpus[0].code,
        "checks": [*kept, {"commit": commit(), **done}],
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(together, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

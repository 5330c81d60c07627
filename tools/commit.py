"""Which commit a record is of, for tools/ and benchmarks/."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = "benchmarks/results"


def commit() -> str:
    """SPARSE_MARLIN_COMMIT, for a copy without a history, or git's, with "-dirty" where a tracked file differs.

    But for records: several benchmarks in a row change one each."""
    given = os.environ.get("SPARSE_MARLIN_COMMIT")
    if given:
        return given
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        differ = ["git", "diff", "--quiet", "HEAD", "--", ".", f":!{RECORDS}"]
        changed = subprocess.run(differ, cwd=ROOT, capture_output=True, check=False).returncode == 1
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed else "") if head.returncode == 0 else "unknown"

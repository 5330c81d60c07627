"""The command line, `sparse-marlin COMMAND`, also as `python -m sparse_marlin`.

Results go to stdout (with --json nothing else does), progress and errors to stderr. A failure is one line and exit
status 1, a wrong call is exit status 2.
"""

import sys

from . import checkpoints, models  # noqa: F401 (they register their commands)
from .common import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of `sparse-marlin` and `python -m sparse_marlin`."""
    try:
        app(prog_name="sparse-marlin")
    except KeyboardInterrupt:
        sys.exit(130)

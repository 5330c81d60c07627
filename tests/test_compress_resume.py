"""compress that was interrupted, killed or out of disk continues with the blocks that were finished."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from compress_models import llama, same, tensors, tokens

from sparse_marlin import compress
from sparse_marlin.compress.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore:compress. calibration")


def test_an_interrupted_call_continues_and_gives_the_same(tmp_path):
    state = tmp_path / "state"
    whole = llama(layers=3)
    report = compress(whole, tokens(), group_size=32, rank=8, max_error=0.3)
    solved = []

    def counting(stop):
        def joint(problem):
            solved.append(1)
            if len(solved) == stop:
                raise KeyboardInterrupt
            return SOLVERS["joint"](problem)

        return joint

    model = llama(layers=3)
    options = {"group_size": 32, "rank": 8, "max_error": 0.3, "state": state}
    with pytest.raises(KeyboardInterrupt):
        compress(model, tokens(), quality=counting(10), **options)  # in the third block
    assert sorted(path.name for path in state.iterdir()) == ["block-00000.safetensors", "block-00001.safetensors"]
    solved.clear()
    again = compress(model, tokens(), quality=counting(None), **options)
    assert len(solved) == 4
    assert same(tensors(model), tensors(whole))
    assert again.to_dict()["layers"] == report.to_dict()["layers"]
    # Other inputs: nothing of it is used. A damaged file: its block is done again.
    solved.clear()
    compress(llama(layers=3), tokens(seed=3), quality=counting(None), **options)
    assert len(solved) == 12
    (state / "block-00001.safetensors").write_bytes(b"\0" * 100)
    solved.clear()
    compress(llama(layers=3), tokens(seed=3), quality=counting(None), **options)
    assert len(solved) == 4


CHILD = """
    import os, sys, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from compress_models import llama, tensors, tokens
    from sparse_marlin import compress
    model = llama(layers=3)
    compress(model, tokens(), group_size=32, state={state!r})
    torch.save(tensors(model), {out!r})
"""


def child(tmp_path, limit=None):
    script = textwrap.dedent(CHILD).format(
        tests=str(Path(__file__).parent), state=str(tmp_path / "state"), out=str(tmp_path / "out.pt")
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = limited if limit else None
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, preexec_fn=before, **pipes)


@pytest.mark.slow
def test_killed_in_the_middle_no_finished_block_is_lost(tmp_path):
    running = child(tmp_path)
    first = tmp_path / "state" / "block-00000.safetensors"
    deadline = time.monotonic() + 240
    while not first.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert first.exists()
    assert not (tmp_path / "out.pt").exists()
    written = {path: path.stat().st_mtime_ns for path in first.parent.glob("*.safetensors")}
    again = child(tmp_path)
    assert again.wait(timeout=240) == 0, again.communicate()[1]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    # a process like it that nobody killed: with other threads, sums would round differently and codes with them
    (tmp_path / "whole").mkdir()
    whole = child(tmp_path / "whole")
    assert whole.wait(timeout=240) == 0, whole.communicate()[1]
    assert same(torch.load(tmp_path / "out.pt"), torch.load(tmp_path / "whole" / "out.pt"))


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands for the disk: the write fails where a full disk would make it fail."""
    running = child(tmp_path, limit=4096)
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 1
    assert "block-00000.safetensors: could not be written" in errors.strip().splitlines()[-1]
    assert list((tmp_path / "state").iterdir()) == []

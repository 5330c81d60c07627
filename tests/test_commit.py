"""What records say of the code they are of (tools/commit.py)."""

import re
import shutil
import subprocess
from pathlib import Path

import commit
import pytest


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_without_a_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSE_MARLIN_COMMIT", "0123abc")
    assert commit.commit() == "0123abc"
    monkeypatch.delenv("SPARSE_MARLIN_COMMIT")
    monkeypatch.setattr(commit, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit.commit() == "unknown"
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert commit.commit() == "unknown"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_files_that_differ_are_told_but_for_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSE_MARLIN_COMMIT", raising=False)
    monkeypatch.setattr(commit, "ROOT", tmp_path)
    record, code = tmp_path / commit.RECORDS / "result.json", tmp_path / "code.py"
    record.parent.mkdir(parents=True)
    git(tmp_path, "init")
    for path in (record, code):
        path.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    record.write_text("2")
    clean = commit.commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    code.write_text("2")
    assert commit.commit() == f"{clean}-dirty"

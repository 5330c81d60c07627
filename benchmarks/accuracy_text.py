"""The texts of bench_accuracy.py, as plain UTF-8 files in the cache: two Debian packages, downloaded, never committed.

    python benchmarks/accuracy_text.py            # prints the files' paths

`anarchism` (An Anarchist FAQ, GFDL, 11 million characters of prose) is cut into a part for calibration and one for
evaluation; `debian-handbook` (GPL-2+ or CC-BY-SA-3.0, technical) is the second corpus. Versions are pinned and the
packages' SHA-256 is checked, so the texts are the same everywhere. Needs apt-get and dpkg-deb.

What is chosen (damping, say) is chosen on `validation_texts`, which has nothing of the two evaluation texts: the last
eighth of the calibration part, calibration being on the rest; a book (`cfi-en`, public domain); and the topics of
Python's `help`.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from sparse_marlin.model import cache_dir

CALIBRATION_SHARE = 0.8  # of the pages of the first corpus, in the order of their names; the others are evaluated on


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    pages: str  # glob below the package's root
    encoding: str = "utf-8"


ANARCHISM = Package(
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "usr/share/doc/anarchism/html/sec*.html",
)
HANDBOOK = Package(
    "debian-handbook",
    "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "usr/share/doc/debian-handbook/html/en-US/*.html",
)
BOOK = Package(
    "cfi-en",
    "3.0-10.2",
    "a080fc8f3b1a36c645b22f769fec4acc2f0cded42bcc5d5865c846845c897da2",
    "usr/share/doc/cfi-en/html/ch*web.htm",
    "cp1252",
)
VALIDATION_SHARE = 1 / 8  # of the calibration text


class _Prose(HTMLParser):
    """Text of a page, paragraphs separated by newlines, without scripts, styles and navigation."""

    _SKIPPED = frozenset({"script", "style", "head", "nav", "pre"})
    _BREAKS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "br", "tr", "dt", "dd", "blockquote"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._depth += tag in self._SKIPPED
        if tag in self._BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SKIPPED:
            self._depth = max(0, self._depth - 1)
        if tag in self._BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self.parts.append(data.replace("\n", " "))


def plain(page: str) -> str:
    """The prose of an HTML page: lines of a few words (menus, captions) are left out."""
    parser = _Prose()
    parser.feed(page)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return "\n\n".join(line for line in lines if len(line) > 60)


def pages(package: Package, cache: Path) -> list[str]:
    """The package's pages as plain text, in the order of their names."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        subprocess.run(["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, check=True)
        archive = next(Path(folder).glob("*.deb"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise RuntimeError(f"{archive.name}: expected SHA-256 {package.sha256}, got {found}")
        subprocess.run(["dpkg-deb", "--extract", archive.name, "root"], cwd=folder, check=True)
        paths = sorted(Path(folder, "root").glob(package.pages))
        return [plain(path.read_text(encoding=package.encoding, errors="replace")) for path in paths]


def texts() -> dict[str, Path]:
    """Paths of the calibration text, the evaluation text of the same corpus, and that of the other one."""
    cache = cache_dir() / "texts"
    cache.mkdir(parents=True, exist_ok=True)
    names = {
        "calibration": cache / f"anarchism-{ANARCHISM.version}-calibration.txt",
        "same corpus": cache / f"anarchism-{ANARCHISM.version}-evaluation.txt",
        "other corpus": cache / f"debian-handbook-{HANDBOOK.version}.txt",
    }
    if not all(path.exists() for path in names.values()):
        first = pages(ANARCHISM, cache)
        cut = int(len(first) * CALIBRATION_SHARE)
        contents = ["\n\n".join(first[:cut]), "\n\n".join(first[cut:]), "\n\n".join(pages(HANDBOOK, cache))]
        for path, content in zip(names.values(), contents, strict=True):
            path.write_text(content, encoding="utf-8")
    return names


def validation_texts() -> tuple[str, dict[str, str]]:
    """The text to calibrate on while something is being chosen, and the texts that choose."""
    text = texts()["calibration"].read_text(encoding="utf-8")
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    book = cache_dir() / "texts" / f"{BOOK.name}-{BOOK.version}.txt"
    if not book.exists():
        book.write_text("\n\n".join(pages(BOOK, book.parent)), encoding="utf-8")
    topics = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    return text[:cut], {"same corpus": text[cut:], "a book": book.read_text(encoding="utf-8"), "Python topics": topics}


if __name__ == "__main__":
    for path in texts().values():
        print(path)

"""Prints the requirements that pyproject.toml states: the package's own, and those of the groups that are named.

`build` is the build system's group, the others are the extras. Serves `make dev`, which installs before it builds.
"""

import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip carries the same parser
    from pip._vendor import tomli as tomllib


def requirements(groups: list[str]) -> list[str]:
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    found = list(data["project"]["dependencies"])
    for group in groups:
        found += (
            data["build-system"]["requires"] if group == "build" else data["project"]["optional-dependencies"][group]
        )
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

"""Print what pyproject.toml asks for, one requirement a line: `requirements.py build run bench test`."""

import sys
import tomllib
from pathlib import Path


def main(kinds: list[str]) -> int:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    wanted = {
        "build": project["build-system"]["requires"],
        "run": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
    }
    for kind in kinds:
        print("\n".join(wanted[kind]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Rows of docs/design/features.md and the tests that show them.

A test says `@pytest.mark.seed("S9")`; a run of the whole suite ends with the rows that no test names.
"""

import re
from pathlib import Path

import pytest

FEATURES = Path(__file__).parent.parent / "docs" / "design" / "features.md"
_ROW = re.compile(r"^\| (S\d+) \| ([^|]+) \|", re.MULTILINE)
_SHOWN = pytest.StashKey[set[str]]()


def rows() -> dict[str, str]:
    """Row → what it is about, in the document's order."""
    return {row: title.strip() for row, title in _ROW.findall(FEATURES.read_text(encoding="utf-8"))}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = rows()
    shown = config.stash.setdefault(_SHOWN, set())
    for item in items:
        for marker in item.iter_markers("seed"):
            for row in marker.args:
                if row not in known:
                    raise pytest.UsageError(f"{item.nodeid}: there is no row {row} in {FEATURES.name}")
                shown.add(row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    whole_suite = config.args_source is not pytest.Config.ArgsSource.ARGS
    if not whole_suite or config.option.keyword or config.option.markexpr or _SHOWN not in config.stash:
        return
    known = rows()
    missing = [row for row in known if row not in config.stash[_SHOWN]]
    terminalreporter.section("rows of docs/design/features.md")
    terminalreporter.line(
        f"{len(known) - len(missing)} of {len(known)} have a test{'; without one:' if missing else ''}"
    )
    for row in missing:
        terminalreporter.line(f"  {row:<4} {known[row]}")

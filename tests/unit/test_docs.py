"""What the documents say that can be checked."""

import re
from pathlib import Path

import pytest

from pyhyve.bhyve.outcome import EXIT_STATUS, OutcomeKind
from pyhyve.cli.completion import describe
from pyhyve.cli.main import VERBS, verb_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = sorted(path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))


def section(title: str) -> str:
    """The text between a heading of the README and the next."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match is not None, title
    return match[1]


def table(text: str) -> list[list[str]]:
    """The cells of the rows of the first Markdown table, without its head."""
    first = re.search(r"^\|.*(?:\n\|.*)*", text, re.MULTILINE)
    lines = first[0].splitlines() if first is not None else []
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_readme_has_every_option_of_run_and_no_other() -> None:
    documented = {name for row in table(section("pyhyve run")) for name in re.findall(r"`(--?[a-z][a-z-]*)", row[0])}
    real = {name for option in describe(verb_parser("run")) for name in option.names}
    assert documented == real - {"-h", "--help"}


def test_readme_says_which_options_take_a_value_and_their_defaults() -> None:
    options = {name: option for option in describe(verb_parser("run")) for name in option.names}
    defaults = vars(verb_parser("run").parse_args([]))
    for cells in table(section("pyhyve run")):
        for name, value in re.findall(r"`(--?[a-z][a-z-]*)( [A-Z:]+)?`", cells[0]):
            assert options[name].takes_value == bool(value), name
            if name.startswith("--"):
                default = defaults[name[2:].replace("-", "_")] if name not in ("--cpus", "--memory", "--pin") else None
                if default not in (None, False, []):
                    assert cells[1] == f"`{default}`", name
                elif name not in ("--cpus", "--memory"):
                    assert cells[1] == "", name


def test_readme_has_every_verb() -> None:
    documented = {cells[0].strip("`").removeprefix("pyhyve ") for cells in table(section("The command"))}
    assert documented == set(VERBS)


def test_readme_has_every_outcome_with_its_exit_status() -> None:
    documented = {cells[0].strip("`"): cells[1] for cells in table(section("How a run ends")) if cells[0]}
    for kind in OutcomeKind:
        status = "2V + 1" if kind is OutcomeKind.EXITED else str(EXIT_STATUS[kind])
        assert documented[kind.value] == status


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in {anchor(heading) for heading in headings}, target


def test_every_document_is_in_the_readme_or_its_index() -> None:
    for path in DOCUMENTS[1:]:
        if path.parent.name != "adr":
            assert f"({path.relative_to(ROOT)})" in README, path


def test_every_record_is_in_the_index() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d{4}\]\(([^)]+)\) \|", index, re.MULTILINE) == RECORDS


@pytest.mark.parametrize("name", RECORDS)
def test_records_have_the_same_parts(name: str) -> None:
    text = (ROOT / "docs" / "adr" / name).read_text(encoding="utf-8")
    assert text.startswith(f"# {int(name[:4])}. ")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]

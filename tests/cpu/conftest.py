"""One test runs on every processor: `engine` is each engine's name, skipped with the reason where it cannot run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import asm
import harness


@pytest.fixture(params=["bt", "kvm"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    found = harness.engine_called(name)
    if isinstance(found, str):
        pytest.skip(found)
    if asm.MISSING:
        pytest.skip(asm.MISSING)
    return name


@pytest.fixture(params=[3, 0], ids=["user", "kernel"])
def run(request: pytest.FixtureRequest, engine: str) -> harness.Runner:
    """Unprivileged code in user mode and in kernel mode."""
    return harness.Runner(engine, request.param)


def pytest_report_header() -> str | None:
    reason = harness.paravirtual("kvm")
    return f"kvm: {reason}, so unprivileged code runs on it in user mode alone" if reason else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a para-virtual KVM would emulate in the kernel: it is not the processor that is to be tested."""
    if not harness.paravirtual("kvm"):
        return
    left_out = []
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("engine") == "kvm" and 0 in (params.get("run"), params.get("cpl")):
            left_out.append(item)
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def whole(engine: str) -> str:
    """An engine that runs ring 0 as the manuals say; a para-virtual KVM does not."""
    reason = harness.paravirtual(engine)
    if reason:
        pytest.skip(reason)
    return engine


@pytest.fixture
def differs(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """differs(engine, name, why): from here on the test is known to fail on the engine of that name."""

    def mark(engine: str, name: str, why: str) -> None:
        if engine == name:
            request.applymarker(pytest.mark.xfail(reason=f"{name}: {why}", strict=True))

    return mark

"""VMs whose processor is a script."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_processor import FakeProcessor, Script

from pyhyve.vmm.topology import Topology
from pyhyve.vmm.vm import Vm

MakeVm = Callable[..., tuple[Vm, FakeProcessor]]


@pytest.fixture
def make_vm() -> Iterator[MakeVm]:
    """Make a VM of some scripts, one a vCPU, with 16 MiB of RAM at 0; it is not started, and closed at the end."""
    made: list[Vm] = []

    def make(*scripts: Script, cpus: int | None = None, timing: bool = False) -> tuple[Vm, FakeProcessor]:
        processor = FakeProcessor(*scripts)
        vm = Vm("test", processor, Topology(cores=cpus or max(1, len(scripts))), timing=timing)
        made.append(vm)
        vm.map_ram(0, 16 << 20)
        return vm, processor

    yield make
    for vm in made:
        vm.close()

"""Several processors in a stock kernel: how they are grouped, switched off and on, and where they run."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from shell import APPEND, Shell, machine

from pyhyve.bhyve.boot.guestimage import GuestImage
from pyhyve.libvmm.client import Client

CPU = "/sys/devices/system/cpu"


def listed(text: str) -> set[int]:
    """Processors of a list like "0-2,5"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def groups(shell: Shell, name: str) -> list[set[int]]:
    """The distinct sets of processors that a file of each one's topology names, in order."""
    found: list[set[int]] = []
    for line in shell(f"cat {CPU}/cpu[0-9]*/topology/{name}").splitlines():
        if listed(line) not in found:
            found.append(listed(line))
    return sorted(found, key=min)


@pytest.mark.parametrize(
    ("cpus", "packages", "cores"),
    [
        ("cpus=4,sockets=1,cores=2,threads=2", [{0, 1, 2, 3}], [{0, 1}, {2, 3}]),
        ("sockets=2,cores=3", [{0, 1, 2}, {3, 4, 5}], [{n} for n in range(6)]),
        ("3,sockets=3", [{0}, {1}, {2}], [{0}, {1}, {2}]),
        ("12,sockets=2,threads=2", [set(range(6)), set(range(6, 12))], [{n, n + 1} for n in range(0, 12, 2)]),
    ],
)
@pytest.mark.parametrize("append", ["", "nox2apic"], ids=["x2apic", "xapic"])
def test_kernel_groups_its_processors_as_was_asked(
    guest_image: GuestImage, cpus: str, packages: Sequence[set[int]], cores: Sequence[set[int]], append: str
) -> None:
    with machine(guest_image, f"{APPEND} {append}", cpus=cpus) as guest:
        shell = Shell.boot(guest)
        assert groups(shell, "package_cpus_list") == packages
        assert groups(shell, "core_cpus_list") == cores
        apic_ids = [int(n) for n in re.findall(r"^apicid\s*: (\d+)$", shell("cat /proc/cpuinfo"), re.MULTILINE)]
        assert len(set(apic_ids)) == sum(map(len, packages))
        log = shell("dmesg")
        assert f"Brought up 1 node, {len(apic_ids)} CPUs" in log
        assert not re.findall(r"^.*(?:\[Firmware Bug|BUG|WARNING|Call Trace|mismatch|weird).*$", log, re.MULTILINE)


def test_caches_are_shared_as_the_cores_are(guest_image: GuestImage) -> None:
    with machine(guest_image, cpus="8,sockets=2,threads=2") as guest:
        shell = Shell.boot(guest)
        shared: dict[str, set[str]] = {}
        for line in shell(f"grep . {CPU}/cpu*/cache/index*/shared_cpu_list").splitlines():
            level = re.search(r"index(\d)", line)
            assert level is not None
            shared.setdefault(level[1], set()).add(line.rpartition(":")[2])
        assert shared["0"] == shared["1"] == shared["2"] == {"0-1", "2-3", "4-5", "6-7"}
        assert shared["3"] == {"0-3", "4-7"}


@pytest.mark.parametrize("cpus", [1, 2, 3, 5, 8, 16])
def test_every_processor_comes_up_and_computes(guest_image: GuestImage, cpus: int) -> None:
    with machine(guest_image, cpus=cpus) as guest:
        shell = Shell.boot(guest)
        assert listed(shell(f"cat {CPU}/online")) == set(range(cpus))
        shell(f"for n in $(seq 0 {cpus - 1}); do taskset -c $n sh -c 'echo $((6 * 7)) > /tmp/'$n & done; wait")
        assert shell("cat /tmp/[0-9]*").split() == ["42"] * cpus


def test_processors_go_off_and_come_back(guest_image: GuestImage) -> None:
    """Each time, the kernel sends the processor through INIT and two start-up IPIs."""
    with machine(guest_image, f"{APPEND} quiet", cpus=4) as guest:
        shell = Shell.boot(guest)
        switch = f"echo $state > {CPU}/cpu$n/online || echo FAILED $n $state"
        done = shell(
            f"for i in $(seq 15); do for state in 0 1; do for n in 1 2 3; do {switch}; done; done; done; echo done",
            timeout=120,
        )
        assert done == "done"
        assert listed(shell(f"cat {CPU}/online")) == {0, 1, 2, 3}
        shell("for n in 0 1 2 3; do taskset -c $n true || echo $n; done")
        shell(f"for n in 1 2 3; do echo 0 > {CPU}/cpu$n/online; done")
        assert listed(shell(f"cat {CPU}/online")) == {0}
        assert shell("seq 1 100 | wc -l") == "100"
        log = shell("dmesg")
        assert len(re.findall(r"smpboot: CPU [123] is now offline", log)) == 3 * 16
        assert not re.findall(r"^.*(?:BUG|WARNING|Call Trace|didn't die|stuck|stall|lockup).*$", log, re.MULTILINE)


@pytest.mark.seed("S20")
def test_pinning_can_be_read_back_and_is_the_threads_own(guest_image: GuestImage) -> None:
    """By what the host's scheduler says while the guest runs."""
    cpus = frozenset(os.sched_getaffinity(0))
    first, last = min(cpus), max(cpus)
    wanted = {0: frozenset((first,)), 2: frozenset((first, last))}
    with machine(guest_image, cpus=3, pins=wanted) as guest:
        assert [vcpu.host_cpus for vcpu in guest.vcpus] == [wanted[0], cpus, wanted[2]]
        shell = Shell.boot(guest)
        shell("for n in 0 1 2; do (while :; do :; done) & done")
        assert [vcpu.host_cpus for vcpu in guest.vcpus] == [wanted[0], cpus, wanted[2]]
        with Client(guest.name) as client:
            assert client.describe().host_cpus == [[first], sorted(cpus), sorted({first, last})]
        allowed = {}
        for task in Path("/proc/self/task").iterdir():
            status = dict(re.findall(r"^(\w+):\s*(.*)$", (task / "status").read_text(), re.MULTILINE))
            if status["Name"].endswith(guest.name[: 15 - len("vcpu0 ")]):
                allowed[status["Name"].split()[0]] = listed(status["Cpus_allowed_list"])
        assert allowed == {"vcpu0": {first}, "vcpu1": set(cpus), "vcpu2": {first, last}}

"""What guest memory costs: PYTHONPATH=src python bench/memory.py

Prints microseconds (median of several runs) for faults and host accesses, and what the monitor's tables take. The
targets are those of the design: a 4 KiB fault at most 30 us, one of 2 MiB about the same.
"""

import statistics
import time
from collections.abc import Callable

from pyhyve.cpu.processor import Capabilities
from pyhyve.vmm.memory.page import PAGE_SIZE, PROT_READ, PROT_RW, PROT_WRITE, SIZE_2M
from pyhyve.vmm.memory.vmspace import Vmspace

MiB = 1 << 20
RUNS = 5
SMALL = Capabilities("4 KiB pages", ept_2m=False, ept_1g=False)
EMULATED = Capabilities("emulated A/D", ept_ad=False, ept_2m=False, ept_1g=False)
LARGE = Capabilities("2 MiB pages")


def faults(capabilities: Capabilities, size: int, step: int, access: int) -> float:
    """Microseconds for one fault, over `size` bytes of fresh guest memory."""
    space = Vmspace(capabilities)
    space.map_ram(0, size)
    start = time.perf_counter()
    for gpa in range(0, size, step):
        space.fault(gpa, access)
    spent = time.perf_counter() - start
    space.close()
    return spent / (size // step) * 1e6


def emulations() -> float:
    """Microseconds for the first write to a page that was read before, with emulated bits."""
    space = Vmspace(EMULATED)
    space.map_ram(0, 16 * MiB)
    for gpa in range(0, 16 * MiB, PAGE_SIZE):
        space.fault(gpa, PROT_READ)
    start = time.perf_counter()
    for gpa in range(0, 16 * MiB, PAGE_SIZE):
        space.fault(gpa, PROT_WRITE)
    spent = time.perf_counter() - start
    space.close()
    return spent / 4096 * 1e6


def each(action: Callable[[Vmspace], object], count: int) -> float:
    """Microseconds for one action on a warm space."""
    space = Vmspace(LARGE)
    space.map_ram(0, 64 * MiB)
    action(space)
    start = time.perf_counter()
    for _ in range(count):
        action(space)
    spent = time.perf_counter() - start
    space.close()
    return spent / count * 1e6


def hold(space: Vmspace) -> None:
    with space.hold(0x12345, 512, PROT_RW):
        pass


def demote_and_promote(space: Vmspace) -> None:
    space.fault(0, PROT_WRITE)
    space.pmap.demote(0)
    space.pmap.promote(0)


def report(what: str, measure: Callable[[], float]) -> None:
    print(f"{what:<44}{statistics.median(measure() for _ in range(RUNS)):12.2f} us")


def main() -> None:
    data, megabyte = bytes(512), bytes(MiB)
    report("fault, 4 KiB (promotion off), read", lambda: faults(SMALL, 32 * MiB, PAGE_SIZE, PROT_READ))
    report("fault, 4 KiB (promotion off), write", lambda: faults(SMALL, 32 * MiB, PAGE_SIZE, PROT_WRITE))
    report("fault, 2 MiB", lambda: faults(LARGE, 512 * MiB, SIZE_2M, PROT_WRITE))
    report("fault, 4 KiB, emulated A/D", lambda: faults(EMULATED, 32 * MiB, PAGE_SIZE, PROT_WRITE))
    report("first write after a read, emulated A/D", emulations)
    report("demote and promote 2 MiB", lambda: each(demote_and_promote, 200))
    report("read 8 bytes", lambda: each(lambda space: space.read(0x1000, 8), 20000))
    report("write 512 bytes", lambda: each(lambda space: space.write(0x1000, data), 20000))
    report("hold and release 512 bytes", lambda: each(hold, 20000))
    report("read 1 MiB", lambda: each(lambda space: space.read(0x1000, MiB), 50))
    report("write 1 MiB", lambda: each(lambda space: space.write(0x1000, megabyte), 50))
    space = Vmspace(LARGE)
    space.map_ram(0, 1024 * MiB)
    for gpa in range(0, 1024 * MiB, SIZE_2M):
        space.fault(gpa, PROT_READ)
    print(f"{'tables of 1 GiB, all mapped by 2 MiB':<44}{space.pmap.table_bytes >> 10:12} KiB")
    print(f"{'host memory that it has taken':<44}{space.resident() >> 10:12} KiB")
    space.close()


if __name__ == "__main__":
    main()

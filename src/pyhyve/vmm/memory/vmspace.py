"""A VM's guest-physical address space: its map, its nested page tables, and the ways of the host into its memory."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from pyhyve.cpu.processor import Capabilities
from pyhyve.vmm.memory.arena import Arena
from pyhyve.vmm.memory.object import OBJT_DEFAULT, ArenaObject, VmObject
from pyhyve.vmm.memory.page import PAGE_SIZE, PROT_ALL, PROT_READ, PROT_WRITE, SIZE_2M
from pyhyve.vmm.memory.pmap import Pmap
from pyhyve.vmm.memory.pte import PMAP_1G, PMAP_2M, PMAP_EMULATE_AD_BITS, PT_EPT
from pyhyve.vmm.memory.vmmap import MapEntry, VmMap

HostWrite = Callable[[int, int], None]
"""(host address, bytes): the host has written guest memory, which may hold translated code."""


def _ignore() -> None:
    pass


class Hold:
    """A piece of guest memory that stays where it is while the host touches it: `with space.hold(...) as view`.

    `view`: the bytes; `hva`: their host address. The view is dead after `release`.
    """

    __slots__ = ("_cookie", "_object", "_on_release", "hva", "view")

    def __init__(self, target: VmObject, cookie: int, hva: int, view: memoryview, on_release: HostWrite | None) -> None:
        self._object = target
        self._cookie = cookie
        self._on_release = on_release
        self.hva = hva
        self.view = view

    def release(self) -> None:
        """End the hold. Idempotent."""
        if self._cookie:
            length = len(self.view)
            self.view.release()
            cookie, self._cookie = self._cookie, 0
            self._object.unhold(cookie)
            if self._on_release is not None:
                self._on_release(self.hva, length)

    def __enter__(self) -> memoryview:
        return self.view

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Vmspace:
    """One per VM. Any thread may call anything; `kick` must make vCPUs leave the guest soon, and may not wait.

    Protections and accesses are sums of PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4, as in an EPT violation's
    qualification. The host's ways in (`read`, `write`, `hold`) raise IndexError outside memory or against the map's
    protection.
    """

    def __init__(self, capabilities: Capabilities, kick: Callable[[], None] = _ignore) -> None:
        flags = PMAP_2M if capabilities.ept_2m else 0
        flags |= PMAP_1G if capabilities.ept_1g and capabilities.ept_2m else 0
        flags |= 0 if capabilities.ept_ad else PMAP_EMULATE_AD_BITS
        self.map = VmMap()
        self.pmap = Pmap(PT_EPT, flags, kick=kick, harvest=self._harvest)
        self.on_host_write: HostWrite | None = None
        """Told of every write by `write` and of every end of a writable hold; set by who keeps translated code."""
        self._lock = threading.RLock()
        self._objects: list[VmObject] = []
        self._cookies = itertools.count(1)
        self._aliased: dict[int, MapEntry] = {}
        self._closed = False

    # The map.

    def map_ram(self, gpa: int, size: int) -> VmObject:
        """Put zeroed RAM at gpa. UsageError if the host is smaller; ValueError if something is mapped there."""
        ram = ArenaObject(OBJT_DEFAULT, Arena.ram(size, gpa))
        try:
            self.map_object(gpa, ram, 0, size, PROT_ALL)
        except BaseException:
            ram.close()
            raise
        self._objects.append(ram)
        return ram

    def map_object(self, gpa: int, target: VmObject, offset: int, size: int, prot: int) -> None:
        """Show a part of an object at gpa. The object stays its maker's to close, after this space."""
        with self._lock:
            if self._closed:
                raise ValueError("vmspace: closed")
            self.map.insert(MapEntry(gpa, gpa + size, target, offset, prot))

    def unmap(self, gpa: int, size: int) -> None:
        """Take a range out of the guest's view; RAM that nothing shows any more is given back to the host.

        A vCPU now in the guest may go on using it until it is kicked out.
        """
        with self._lock:
            self.pmap.remove(gpa, size)
            dropped = {id(entry.object): entry.object for entry in self.map.delete(gpa, gpa + size)}
            for entry in self.map:
                dropped.pop(id(entry.object), None)
            for target in self._objects:
                if id(target) in dropped:
                    target.discard()

    def alias(self, gpa: int, source: int, size: int) -> None:
        """Show at gpa what stands at `source`, until `unalias`; each range lies in one entry of the map.

        A vCPU now in the guest may go on using what stood there until it is kicked out.
        """
        with self._lock:
            there, here = self.map.lookup(source), self.map.lookup(gpa)
            if (
                gpa in self._aliased
                or there is None
                or here is None
                or max(source + size - there.end, gpa + size - here.end) > 0
            ):
                raise ValueError(f"vmspace: no {size:#x} bytes at {source:#x} to show at {gpa:#x}")
            self._aliased[gpa] = here.clip(gpa, gpa + size)
            shown = there.clip(source, source + size)
            self._replace(replace(shown, start=gpa, end=gpa + size))

    def unalias(self, gpa: int) -> None:
        """Show again what `alias` has hidden."""
        with self._lock:
            self._replace(self._aliased.pop(gpa))

    def _replace(self, entry: MapEntry) -> None:
        self.pmap.remove(entry.start, entry.end - entry.start)
        self.map.delete(entry.start, entry.end)
        self.map.insert(entry)

    def protect(self, gpa: int, size: int, prot: int) -> None:
        """Set the protection of the memory in a range. ValueError without PROT_READ."""
        with self._lock:
            self.map.protect(gpa, gpa + size, prot)
            self.pmap.protect(gpa, size, prot)

    def wire(self, gpa: int, size: int) -> None:
        """Take a range's memory from the host, map it, and keep it: for devices that do DMA by themselves."""
        with self._lock:
            for entry in self.map.overlapping(gpa, gpa + size):
                low, high = max(entry.start, gpa), min(entry.end, gpa + size)
                entry.object.populate(entry.offset + low - entry.start, high - low)
            self.map.wire(gpa, gpa + size, True)
            for entry in self.map.overlapping(gpa, gpa + size):
                at = entry.start
                while at < entry.end:
                    if not self.pmap.lookup(at)[0]:
                        self._enter(entry, at, 0)
                    at = (at | (self.pmap.lookup(at)[1] - 1)) + 1
                self.pmap.wire(entry.start, entry.end - entry.start)

    def ram_ranges(self) -> list[tuple[int, int, int, bool]]:
        """(gpa, host address, bytes, writable) of everything that the guest reaches without an exit, in order."""
        found = []
        for entry in self.map:
            at = entry.start
            while at < entry.end:
                hva, length = self._run(entry, at)
                found.append((at, hva, length, bool(entry.prot & PROT_WRITE)))
                at += length
        return found

    # The guest's way in.

    def fault(self, gpa: int, access: int) -> bool:
        """Resolve an EPT violation: `access` is `qualification & 7`. True: go on with the guest.

        False if that is not memory for this access (nothing there, or a write to read-only memory): emulate it.
        """
        with self._lock:
            entry = self.map.lookup(gpa)
            if entry is None or access & ~entry.prot:
                return False
            gpa &= -PAGE_SIZE
            if not self.pmap.emulate_accessed_dirty(gpa, access) and not self.pmap.permits(gpa, access):
                self._enter(entry, gpa, access or PROT_READ)
            return True

    def _enter(self, entry: MapEntry, gpa: int, access: int) -> None:
        """Map the page at gpa, or the 2 MiB around it if entry, host memory and processor agree."""
        target, wired = entry.object, entry.wired
        large = gpa & -SIZE_2M
        if large >= entry.start and large + SIZE_2M <= entry.end and self.pmap.pm_flags & PMAP_2M:
            hva, length = target.run(entry.offset + large - entry.start)
            if (
                length >= SIZE_2M
                and not hva & (SIZE_2M - 1)
                and self.pmap.enter_superpage(large, hva, entry.prot, access, wired=wired, uncached=target.uncached)
            ):
                return
        hva, _ = target.run(entry.offset + gpa - entry.start)
        self.pmap.enter(gpa, hva, entry.prot, access, wired=wired, uncached=target.uncached)

    # The host's ways in.

    def read(self, gpa: int, length: int) -> bytes:
        """Guest-physical bytes."""
        entry = self.map.lookup(gpa)
        if entry is not None and 0 < length <= entry.end - gpa:
            offset = entry.offset + gpa - entry.start
            view = entry.object.view(offset, length)
            if len(view) == length:
                entry.object.pages.mark(offset, length, modified=False)
                return bytes(view)
        return b"".join(target.view(offset, piece) for target, offset, piece, _ in self._pieces(gpa, length, PROT_READ))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest-physical bytes: all of them or, on IndexError, none."""
        source = data if isinstance(data, memoryview) else memoryview(data)
        done = 0
        for target, offset, length, hva in self._pieces(gpa, len(source), PROT_WRITE):
            target.view(offset, length)[:] = source[done : done + length]
            target.pages.mark(offset, length, modified=True)
            done += length
            if self.on_host_write is not None:
                self.on_host_write(hva, length)

    def hold(self, gpa: int, length: int, prot: int = PROT_READ) -> Hold:
        """Hold a range within one map entry (one host run) for access without a copy; `with` gives a memoryview.

        Without PROT_WRITE the view is read-only. At least one byte.
        """
        entry = self.map.lookup(gpa)
        if entry is None or prot & ~entry.prot or length < 1:
            raise IndexError(f"guest memory: no {length:#x} bytes at {gpa:#x} to hold")
        hva, run = self._run(entry, gpa)
        if length > run:
            raise IndexError(f"guest memory: {gpa:#x} has {run:#x} bytes in one piece, not {length:#x}")
        target, offset = entry.object, entry.offset + gpa - entry.start
        cookie = next(self._cookies)
        target.hold(cookie, offset, length)
        view = target.view(offset, length)
        writable = bool(prot & PROT_WRITE)
        target.pages.mark(offset, length, modified=writable)
        if writable:
            return Hold(target, cookie, hva, view, self.on_host_write)
        return Hold(target, cookie, hva, view.toreadonly(), None)

    def _run(self, entry: MapEntry, gpa: int) -> tuple[int, int]:
        """(host address, contiguous bytes) from gpa on, within its entry."""
        hva, length = entry.object.run(entry.offset + gpa - entry.start)
        return hva, min(length, entry.end - gpa)

    def _pieces(self, gpa: int, length: int, access: int) -> list[tuple[VmObject, int, int, int]]:
        """(object, offset, bytes, host address) of each contiguous piece of a range; IndexError if it has a gap."""
        pieces = []
        end = gpa + length
        while gpa < end:
            entry = self.map.lookup(gpa)
            if entry is None or access & ~entry.prot:
                what = "write" if access & PROT_WRITE else "read"
                raise IndexError(f"guest memory: cannot {what} at {gpa:#x}")
            hva, run = self._run(entry, gpa)
            run = min(run, end - gpa)
            pieces.append((entry.object, entry.offset + gpa - entry.start, run, hva))
            gpa += run
        return pieces

    # Accounting.

    def resident(self) -> int:
        """Bytes of host memory that the guest's RAM has taken."""
        return sum(target.resident() for target in self._objects)

    def _harvest(self, gpa: int, size: int, modified: bool, referenced: bool) -> None:
        """A mapping goes: keep its bits with the object's pages. Called with the pmap locked."""
        for entry in self.map.overlapping(gpa, gpa + size):
            low, high = max(entry.start, gpa), min(entry.end, gpa + size)
            entry.object.pages.mark(entry.offset + low - entry.start, high - low, modified=modified)

    def close(self) -> None:
        """Free the tables and the RAM (held pieces when their holds end). No vCPU may run any more. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.map = VmMap()
            self.pmap.close()
            for target in self._objects:
                target.close()

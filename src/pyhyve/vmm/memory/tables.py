"""The pages that page tables are made of.

A vCPU's walker reads them from another thread, without the GIL. So an entry is written by one aligned 8-byte store
(which assigning an item of `words` is), a table is filled before its parent points to it, and a table taken out of the
tree is not used again before every vCPU that may still hold a pointer to it has flushed.
"""

from array import array
from collections import deque
from typing import Final

from pyhyve.base.errors import HostError
from pyhyve.vmm.memory.arena import Reservation, view_of
from pyhyve.vmm.memory.page import PAGE_SIZE

ENTRIES: Final = 512
RESERVE: Final = 1 << 30
"""Address space for one VM's tables: enough for 512 GiB mapped by 4 KiB pages."""
_STEP: Final = 1 << 18

_EMPTY: Final = memoryview(array("Q", bytes(PAGE_SIZE)))


class TablePages:
    """Zeroed table pages, known by host address. `words[(address - base) >> 3]` is an entry."""

    def __init__(self, reserve: int = RESERVE) -> None:
        self._space = Reservation(reserve)
        self.base = self._space.base
        self.words = view_of(self.base, reserve).cast("Q")
        self._committed = 0
        self._next = 0
        self._free: list[int] = []
        self._retired: deque[tuple[int, int]] = deque()

    @property
    def taken(self) -> int:
        """Bytes of host memory that tables, in the tree or not, have taken."""
        return self._next

    def alloc(self) -> int:
        """The host address of a zeroed table. HostError when there is no memory for one."""
        if self._free:
            table = self._free.pop()
            index = (table - self.base) >> 3
            self.words[index : index + ENTRIES] = _EMPTY
            return table
        if self._next == self._committed:
            try:
                self._space.commit(self._committed, min(_STEP, self._space.size - self._committed))
            except OSError as error:
                raise HostError(f"page tables: no memory for more than {self._next >> 10} KiB of them") from error
            self._committed = min(self._committed + _STEP, self._space.size)
        if self._next == self._space.size:
            raise HostError(f"page tables: the VM needs more than {self._space.size >> 20} MiB of them")
        table = self.base + self._next
        self._next += PAGE_SIZE
        return table

    def retire(self, table: int, generation: int) -> None:
        """Nothing points to the table any more for a vCPU that has flushed at `generation`. Generations never fall."""
        self._retired.append((generation, table))

    def reclaim(self, generation: int) -> None:
        """Every vCPU has flushed at `generation` or later: tables retired up to then are free."""
        while self._retired and self._retired[0][0] <= generation:
            self._free.append(self._retired.popleft()[1])

    def close(self) -> None:
        """Unmap all tables. Idempotent."""
        self.words.release()
        self._space.close()

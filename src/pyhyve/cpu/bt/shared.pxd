# cython: language_level=3
"""What the vCPUs of one VM share: which guest pages hold translated code, of whom, and messages between them.

Each vCPU translates for itself, into a cache of its own. What must be common is the knowledge that a page holds code:
a store by any vCPU to it has to reach every cache that was translated from it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyhyve.cpu.bt.apic cimport Apic

cdef enum:
    SHARED_PAGES = 65536
    SHARED_VCPUS = 64
    INBOX = 64

cdef struct SharedPage:
    uint64_t hva            # page address; 0: free
    uint64_t chunks         # 64-byte pieces that some vCPU translated from
    uint64_t mask           # vCPUs that have (or had) blocks of it

cdef struct Message:
    uint64_t hva
    uint64_t length         # of the bytes stored to; 0: the page got code, protect it (no page: only pass by here)

cdef struct Inbox:
    uint32_t lock
    uint32_t in_guest       # 1: its owner may be running guest code
    uint32_t n
    uint32_t protect_all    # messages about pages to protect did not fit: protect all
    uint32_t drop_all       # messages about stores did not fit: drop all blocks
    uint32_t pad
    uint64_t done           # messages ever taken
    uint64_t sent           # messages ever put
    uint8_t* poll           # Vcpu.poll of the owner, as bytes
    Message messages[INBOX]

cdef struct Shared:
    uint32_t lock
    uint32_t n_vcpus
    uint32_t yielding       # vCPUs that wait in PAUSE and have given up their host processor
    Inbox* inboxes[SHARED_VCPUS]
    Apic apics[SHARED_VCPUS]
    uint64_t n_pages
    SharedPage pages[SHARED_PAGES]

cdef SharedPage* shared_find(Shared* s, uint64_t page) noexcept nogil
# The entry of a page that is about to be translated by vCPU `me`; NULL when the table is full.
cdef SharedPage* shared_enter(Shared* s, uint64_t page, int me, bint* fresh) noexcept nogil
cdef void shared_add_chunks(Shared* s, SharedPage* p, uint64_t chunks) noexcept nogil
cdef void shared_leave(Shared* s, uint64_t page, int me) noexcept nogil
cdef void shared_leave_all(Shared* s, int me) noexcept nogil
# Tell vCPU `to`; returns the ticket that its `done` reaches when it has been dealt with.
cdef uint64_t inbox_put(Inbox* to, uint64_t hva, uint64_t length) noexcept nogil
cdef void inbox_lock(Inbox* inbox) noexcept nogil
cdef void inbox_unlock(Inbox* inbox) noexcept nogil
cdef void set_in_guest(Inbox* inbox, uint32_t value) noexcept nogil
cdef bint waiting_for(Inbox* inbox, uint64_t ticket) noexcept nogil
cdef void cpu_relax() noexcept nogil
# Stores before it are seen by all before loads behind it are made.
cdef void cpu_fence() noexcept nogil
# Let another thread of the host run: what this one waits for may be waiting for its processor.
cdef void cpu_yield() noexcept nogil
# The same for a vCPU that spins in PAUSE.
cdef void spin_yield(Shared* s) noexcept nogil
# For a vCPU that may just have done what another spins for: let that one run, if it gave up its processor. Not before the
# time in `not_before` (the vCPU's own), which grows where others than vCPUs take what is given.
cdef void give_back(Shared* s, uint64_t* not_before) noexcept nogil

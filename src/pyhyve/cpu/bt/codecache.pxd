# cython: language_level=3
"""Translated blocks: where they are, how they are found, and when they are dropped.

A block is keyed by the host address of its first byte (that is: by physical address), its linear address, and the
mode it was translated for. One cache belongs to one vCPU, so nothing here takes a lock; what other vCPUs must know
(which pages hold code) is in shared.pxd, and what they have to say comes through the inbox. Direct jumps between blocks
stay within one guest page; all others go through the indirect-branch table (`Vcpu.ibt`), which is emptied whenever a
linear address may have come to mean something else. So dropping the blocks of a page needs no unlinking: every direct
jump into them comes from a block that is dropped as well.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyhyve.cpu.bt.apic cimport Apic
from pyhyve.cpu.bt.shared cimport Inbox, Shared
from pyhyve.cpu.bt.state cimport BANKS, Vcpu

cdef enum:
    MODE_CPL = 3            # bits 0-1
    MODE_SIZE_SHIFT = 2     # bits 2-3: 0 = 16-bit, 1 = 32-bit, 2 = 64-bit code
    MODE_SIZE = 12
    MODE_REAL = 16          # real and virtual-8086 mode: VEX and EVEX are undefined
    MODE_AC = 32            # supervisor with RFLAGS.AC
    MODE_NOFP = 64          # CR0.TS or CR0.EM: x87 and vector instructions fault
    MODE_AVX512 = 128       # CR4.OSXSAVE and XCR0's AVX-512 bits: EVEX and opmask instructions are defined
    MODE_AVX = 256          # CR4.OSXSAVE and XCR0.AVX: VEX-encoded vector instructions are defined
    MODE_SLOW = 512         # one instruction, every memory access through a helper; never kept
    MODE_SINGLE = 1024      # stack accesses are checked one by one: for frames that lie over a page's end
    MODE_TSD = 32768        # user code, CR4.TSD: RDTSC faults
    MODE_BANK_BITS = 35     # the bits that select a bank (CPL, AC): no flush of ibt[] when only these change
    MODE_CSBASE_SHIFT = 16  # bits 16-47: CS base of 16- and 32-bit code
    MODE_CHECK_SHIFT = 11   # bits 11-13: ES, SS, DS are not flat: accesses are checked
    MODE_LIMIT_SHIFT = 48   # bits 48-53: CS limit of 16- and 32-bit code, an index of Vcpu.cs_limits
    MODE_SP16_SHIFT = 54    # bit 54: the stack pointer of 16- and 32-bit code is SP
    MODE_ALIGN_SHIFT = 55   # bit 55: user mode with alignment checks
    MODE_WATCH_SHIFT = 56   # bits 56-63: which set of instructions is watched (debug.pyx), 0: none

cdef struct Block:
    uint64_t rip            # guest RIP (linear address less CS base)
    uint64_t hva            # host address of the first guest byte
    uint64_t mode
    uint8_t* entry_ind      # verifies r10 == rip and polls, then falls into entry_direct
    uint8_t* entry_poll     # polls, then falls into entry_direct
    uint8_t* entry_direct
    uint8_t* end            # behind the hot code
    uint16_t* marks         # (host offset from entry_ind, guest offset) of each instruction, n_insns + 1 pairs
    Block* hash_next
    Block* page_next
    Block* page2_next
    uint32_t n_insns
    uint32_t guest_len
    uint32_t ibt_slot       # index in Vcpu.ibt where it may stand
    uint32_t straddle       # its only instruction ends in another page
    uint64_t hva2           # that page
    uint64_t look           # chunks of its page that were read to learn which flags its successors need

cdef struct CodePage:
    uint64_t hva            # page address, 0: free
    uint64_t chunks         # bit n: bytes 64 n to 64 n + 63 hold translated code
    Block* first
    CodePage* next

cdef struct Cache:
    Vcpu* vcpu
    Shared* shared          # of the VM
    int me                  # this vCPU's number there
    Inbox inbox
    Apic* apic              # the local APIC's state that the processor works on
    uint64_t not_before     # see give_back
    uint64_t pauses         # PAUSEs of a VM with several vCPUs
    uint8_t* rw             # the code memory, writable view
    uint8_t* rx             # the same memory, executable view
    uint64_t size
    uint8_t* start          # behind the thunks (rw)
    uint8_t* at             # allocation point (rw)
    uint8_t* cold           # the same for the cold parts, which stand apart: hot code stays dense
    Block* pool
    uint64_t pool_size
    uint64_t pool_used
    CodePage* pages
    uint64_t pages_size
    uint64_t pages_used
    Block** hash
    uint64_t hash_mask
    CodePage** page_hash
    uint64_t page_hash_mask
    uint64_t generation     # counts whole flushes
    uint64_t leaves[16]     # times that generated code was left, by LEAVE_*
    uint64_t micro_ops[1024]    # instructions run in microcode, by map << 8 | opcode
    # thunks (rx)
    uint8_t* enter
    uint8_t* leave
    uint8_t* leave_tail
    uint8_t* ibt_miss[BANKS]     # not in the first way
    uint8_t* ibt_none            # nor in the second
    uint8_t* miss
    uint8_t* micro
    uint8_t* micro_end
    uint8_t* link
    uint8_t* single
    uint8_t* ret_empty[BANKS]
    uint8_t* ret_wrong[BANKS]
    uint8_t* masked
    uint8_t* slow
    uint8_t* commit

cdef extern from *:
    """
    #define bt_crc32(x) ((unsigned)__builtin_ia32_crc32di(0, (x)))
    """
    uint32_t bt_crc32(uint64_t x) noexcept nogil

cdef inline uint32_t ibt_hash(uint64_t rip) noexcept nogil:
    """The slot of a target within its bank: the low bits of its CRC32 (which generated code computes without flags)."""
    return bt_crc32(rip) & 0x1FFF

cdef inline uint8_t* cold_start(Cache* c) noexcept nogil:
    """Where the cold parts begin (rw): they take more room than the hot ones."""
    return c.rw + (c.size * 3 // 8 & ~<uint64_t>63)

cdef bint code_page(Vcpu* v, uint64_t hva) noexcept nogil
cdef void code_written(Vcpu* v, uint64_t hva, uint32_t length) noexcept nogil
cdef bint code_overlaps(Vcpu* v, uint64_t hva, uint32_t length) noexcept nogil
cdef void ibt_flush(Vcpu* v, int keep_global) noexcept nogil
cdef void ibt_flush_page(Vcpu* v, uint64_t lin) noexcept nogil
cdef void ibt_set(Vcpu* v, Block* b) noexcept nogil
# The block at RIP if the table has it, else NULL.
cdef Block* ibt_get(Vcpu* v, uint64_t mode) noexcept nogil
cdef Block* block_find(Cache* c, uint64_t hva, uint64_t rip, uint64_t mode) noexcept nogil
cdef Block* block_new(Cache* c) noexcept nogil
# Enter a finished block in the tables, protect its pages here and in the other vCPUs. False: no room in the tables.
# When it returns, the others store to the block's bytes only with a message to this vCPU; what they stored before is
# in memory: the caller compares the bytes that it translated with what is there now.
cdef bint block_add(Cache* c, Block* b) noexcept nogil
# Take what other vCPUs have put into the inbox. Must not be called while generated code runs.
cdef void inbox_process(Cache* c) noexcept nogil
cdef void cache_reset(Cache* c) noexcept nogil
cdef bint cache_room(Cache* c, uint64_t bytes) noexcept nogil
cdef Block* block_at_host(Cache* c, uint64_t rx) noexcept nogil

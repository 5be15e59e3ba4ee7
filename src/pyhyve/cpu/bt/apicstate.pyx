# cython: language_level=3
"""See apicstate.pxd."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pyhyve.cpu.bt.apic cimport *


cdef BtApicState make_state(Apic* a, object owner):
    cdef BtApicState state = BtApicState.__new__(BtApicState)
    state.a = a
    state.owner = owner
    return state


cdef inline _get(uint64_t* words):
    return int.from_bytes((<char*>words)[:32], "little")


cdef inline _set(uint64_t* words, value):
    cdef bytes data = value.to_bytes(32, "little")
    memcpy(words, <char*>data, 32)


cdef class BtApicState:
    @property
    def irr(self):
        return _get(self.a.irr)

    @irr.setter
    def irr(self, value):
        _set(self.a.irr, value)

    @property
    def isr(self):
        return _get(self.a.isr)

    @isr.setter
    def isr(self, value):
        _set(self.a.isr, value)
        apic_update_ppr(self.a)

    @property
    def tmr(self):
        return _get(self.a.tmr)

    @tmr.setter
    def tmr(self, value):
        _set(self.a.tmr, value)

    @property
    def tpr(self):
        return self.a.tpr

    @tpr.setter
    def tpr(self, uint32_t value):
        self.a.tpr = value
        apic_update_ppr(self.a)

    @property
    def ppr(self):
        return self.a.ppr

    @property
    def accepting(self):
        return self.a.accepting != 0

    @accepting.setter
    def accepting(self, bint value):
        self.a.accepting = value

    @property
    def icr_low(self):
        return self.a.icr_low

    @icr_low.setter
    def icr_low(self, uint32_t value):
        self.a.icr_low = value

    @property
    def icr_high(self):
        return self.a.icr_high

    @icr_high.setter
    def icr_high(self, uint32_t value):
        self.a.icr_high = value

    @property
    def direct(self):
        return self.a.direct != 0

    @direct.setter
    def direct(self, bint value):
        self.a.direct = value

    @property
    def halted(self):
        return self.a.halted != 0

    @property
    def halted_cycles(self):
        return self.a.halted_cycles

    @property
    def activity(self):
        return self.a.taken + self.a.eois + self.a.ipis + self.a.halts

    def configure(self, uint32_t apic_id, bint enabled, bint x2apic, uint32_t ldr, uint32_t dfr):
        self.a.id = apic_id
        self.a.ldr = ldr
        self.a.flat = dfr >> 28 == 0xF
        self.a.mode = APIC_NOT_HERE if not enabled else APIC_X2APIC if x2apic else APIC_XAPIC

    def clear(self):
        memset(self.a.irr, 0, 3 * sizeof(self.a.irr))
        self.a.tpr = self.a.ppr = 0
        self.a.icr_low = self.a.icr_high = 0

    def accept(self, uint32_t vector, bint level):
        return apic_accept(self.a, vector, level) and not apic_signal(self.a)

    def pending(self):
        return apic_pending(self.a)

    def acknowledge(self, uint32_t vector):
        apic_take(self.a, vector)

    def complete(self):
        cdef int vector = apic_in_service(self.a)
        if vector < 0:
            return -1
        apic_complete(self.a, vector)
        return vector if self.a.tmr[vector >> 6] >> (vector & 63) & 1 else -1

    def delivered(self):
        return [self.a.delivered[vector] for vector in range(256)]

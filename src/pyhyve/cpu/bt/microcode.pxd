# cython: language_level=3
"""What hardware does in microcode: instructions that are never copied, and the delivery of events."""

from libc.stdint cimport uint32_t, uint64_t
from pyhyve.cpu.bt.decode cimport Insn
from pyhyve.cpu.bt.state cimport Vcpu

# Run the decoded instruction at v.rip. R_OK: done, v.rip advanced (but for an interrupted REP, whose RIP stays with
# its registers advanced). R_FAULT: v.fault_* set, RIP at the instruction, nothing changed (a REP keeps the iterations
# that were done). R_EXIT: v.exit as pyhyve.cpu.processor.Exit says. The run loop clears v.shadow before, and tracks RF.
cdef int microcode(Vcpu* v, Insn* i) noexcept nogil

# Deliver the exception pending in v.fault_* at v.rip, through double to triple fault. R_OK or R_EXIT; with R_EXIT
# (EPT violation on a stack or table, triple fault) nothing has been changed but CR2: run the instruction again.
cdef int deliver_exception(Vcpu* v) noexcept nogil

# Deliver an interrupt or an injected event at v.rip. `software`: INT n, whose gate's DPL is checked. Vector 2, not
# software, is the NMI. A fault on the way is delivered in its place. R_OK or R_EXIT (nothing changed: retry).
cdef int deliver_interrupt(Vcpu* v, uint32_t vector, int software, int has_error, uint64_t error) noexcept nogil

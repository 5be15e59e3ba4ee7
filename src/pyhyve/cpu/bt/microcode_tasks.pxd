# cython: language_level=3
"""Task switches by hardware: protected mode without long mode."""

from libc.stdint cimport uint32_t, uint64_t

from pyhyve.cpu.bt.state cimport Vcpu

cdef enum:
    # What switches tasks
    TASK_CALL = 0
    TASK_IRET = 1
    TASK_JMP = 2
    TASK_EVENT = 3           # a task gate in the IDT

cdef struct TaskEvent:       # with TASK_EVENT
    uint32_t ext             # 1: not by INT n and its kin; goes into error codes
    uint32_t has_error       # `error` goes on the new task's stack
    uint32_t error

# Switch to the task whose TSS `selector` names. The caller has checked privilege. `rip` and `flags` are what the
# present task will go on with. R_OK: the new task runs; R_FAULT: in the old task, or in the new one where the SDM says so.
cdef int task_switch(Vcpu* v, uint32_t selector, int source, uint64_t rip, uint64_t flags, TaskEvent* event) noexcept nogil
# Far CALL or JMP (`source`) through a task gate.
cdef int through_task_gate(Vcpu* v, uint32_t selector, uint64_t gate, int source, uint64_t rip) noexcept nogil

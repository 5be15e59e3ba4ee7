"""Interrupt controllers and timers: one chip, one file; registers only, no VM and no processor.

Locking. One lock, the interrupt fabric's, belongs to whoever assembles the chips; no chip takes it. It is held around
every call into a chip, into an `IrqPin` a chip gave out and into `ApicBus`, and around the calls that `Timers` makes.
The local APIC alone may be used without it: `post` from any thread, the rest from its vCPU's thread. What it then
calls without the lock is `ApicBus.deliver` (safe: it reads tables and posts) and, for level interrupts only,
`ApicBus.eoi`; so an I/O APIC is attached to the bus through something that takes the lock in `eoi`.
The order is fabric, then local APIC; a local APIC calls nothing but `Timers` while it holds its own.
"""

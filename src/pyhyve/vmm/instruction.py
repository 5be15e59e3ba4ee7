"""Emulation of the instructions that the processor hands over: those that access what is not memory.

iced-x86 decodes; what an instruction does is here. Accesses go to guest memory or to the devices by the address of each
byte; an operand over the end of a page is two accesses. Everything is read, then memory is written, then registers and
flags: a fault leaves the instruction undone (a repeated string instruction: undone from the element that faulted).

Intel SDM vol 2; for the faults, vol 3, "Page-Fault Exceptions" and vol 1, "Operand Addressing".
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from iced_x86 import Decoder, FlowControl, Instruction, Mnemonic

from pyhyve.base.errors import GuestFault
from pyhyve.cpu.processor import VcpuBackend
from pyhyve.vmm.assist import Access, Assistant, memory_accesses
from pyhyve.vmm.operand import MEM, REG, Operand, operands
from pyhyve.vmm.vcpu import Vcpu

CF, PF, AF, ZF, SF, DF, OF = 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 10, 1 << 11
_ARITHMETIC: Final = CF | PF | AF | ZF | SF | OF
_EFER_LMA: Final = 1 << 10
_ATTR_L: Final = 1 << 13
_CR4_LA57: Final = 1 << 12
_ATTR_DB: Final = 1 << 14
_MASKS: Final = tuple((1 << 8 * size) - 1 for size in range(9))
_PARITY: Final = tuple(0 if bin(value).count("1") & 1 else PF for value in range(256))
_MAX_LENGTH: Final = 15
_MAX_REPEATS: Final = 1024
"""Elements of a string instruction carried out at one exit; then the guest may take an interrupt."""
_CACHE_LIMIT: Final = 4096
_RAX, _RCX, _RDX, _RSP, _RSI, _RDI = 0, 1, 2, 4, 6, 7


class Memory(Protocol):
    def read(self, gpa: int, length: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...


class Devices(Protocol):
    """Where accesses go that are not memory."""

    def is_device(self, gpa: int) -> bool: ...

    def read_device(self, gpa: int, size: int) -> int: ...

    def write_device(self, gpa: int, size: int, value: int) -> None: ...

    def read_port(self, port: int, size: int) -> int: ...

    def write_port(self, port: int, size: int, value: int) -> None: ...


class _Plan:
    """A decoded instruction, ready to be carried out."""

    __slots__ = ("instruction", "length", "operands", "repeat", "run", "size", "while_equal")

    def __init__(
        self,
        run: Callable[["_Plan"], None],
        operands: list[Operand],
        size: int,
        length: int,
        repeat: bool,
        while_equal: bool | None,
        instruction: Instruction | None = None,
    ) -> None:
        self.run = run
        self.operands = operands
        self.size = size
        self.length = length
        self.repeat = repeat
        self.while_equal = while_equal
        self.instruction = instruction


class InstructionEmulator:
    """Carries out one instruction at a time on one vCPU."""

    def __init__(self, vcpu: Vcpu, memory: Memory, devices: Devices, assistant: Assistant | None = None) -> None:
        self._vcpu = vcpu
        self._assistant = assistant
        self._backend: VcpuBackend = vcpu.backend
        self._memory = memory
        self._devices = devices
        self._plans: dict[tuple[int, int, bytes], _Plan] = {}
        self._bits = 64
        self.unknown: Counter[str] = Counter()
        """Instructions that could not be carried out (they got #UD), as the assembler writes them."""

    def emulate(self) -> None:
        """Carry out the instruction at RIP and go past it. Raises GuestFault for the fault that it causes."""
        backend = self._backend
        rip = backend.get("rip")
        cs = backend.get_segment("cs")
        if backend.get("efer") & _EFER_LMA and cs.attr & _ATTR_L:
            self._bits, linear = 64, rip
        else:
            self._bits = 32 if cs.attr & _ATTR_DB else 16
            linear = (cs.base + rip) & 0xFFFF_FFFF
        code = self._fetch(linear)
        key = (rip, self._bits, code)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._decode(rip, code, linear)
            if len(self._plans) >= _CACHE_LIMIT:
                self._plans.clear()
            self._plans[key] = plan
        plan.run(plan)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _fetch(self, linear: int) -> bytes:
        """Return up to 15 bytes of code; fewer at the end of what is mapped."""
        rest = 0x1000 - (linear & 0xFFF)
        gpa = self._translate(linear, 2)
        try:
            code = self._memory.read(gpa, min(_MAX_LENGTH, rest))
            if rest < _MAX_LENGTH:
                following = self._backend.translate(linear + rest, 2)
                if following is not None:
                    code += self._memory.read(following, _MAX_LENGTH - rest)
        except IndexError:
            raise GuestFault(6) from None  # code in a device: nothing decodable there
        return code

    def _decode(self, rip: int, code: bytes, linear: int) -> _Plan:
        instruction = Decoder(self._bits, code, ip=rip).decode()
        if instruction.is_invalid:
            if len(code) < _MAX_LENGTH:
                self._translate(linear + len(code), 2)  # the rest is on a page that is not there: #PF
            raise GuestFault(6)
        found = operands(instruction)
        handler = _HANDLERS.get(instruction.mnemonic)
        if handler is None or found is None:
            return _Plan(self._assisted, [], 0, instruction.len, False, None, instruction)
        size = next((each.size for each in found if each.kind == MEM), 0) or (found[0].size if found else 0)
        for each in found:
            each.size = each.size or size
        mnemonic = instruction.mnemonic
        repeat = instruction.has_rep_prefix or instruction.has_repne_prefix
        while_equal = None
        if mnemonic in _COMPARING_STRINGS and repeat:
            while_equal = not instruction.has_repne_prefix
        if mnemonic in _STACK:
            size = _stack_size(instruction, self._bits)
        return _Plan(handler.__get__(self), found, size, instruction.len, repeat, while_equal)

    # -- addresses -----------------------------------------------------------------------------------------------------

    def _translate(self, linear: int, access: int) -> int:
        gpa = self._backend.translate(linear, access)
        if gpa is not None:
            return gpa
        user = self._backend.get_segment("ss").attr >> 5 & 3 == 3
        present = access != 0 and self._backend.translate(linear, 0) is not None
        error = present | (access == 1) << 1 | user << 2 | (access == 2) << 4
        raise GuestFault(14, error, linear)

    def _linear(self, operand: Operand, extra: int = 0) -> int:
        """Return the linear address of a memory operand, `extra` bytes further on. Raises #GP or #SS."""
        backend = self._backend
        address = operand.value + extra
        if operand.base >= 0:
            address += backend.get_gpr(operand.base)
        if operand.index >= 0:
            address += backend.get_gpr(operand.index) * operand.scale
        return self._segmented(operand.segment, address & operand.address_mask, operand.size)

    def _segmented(self, name: str, address: int, size: int) -> int:
        if self._bits == 64:
            if name in ("fs", "gs"):
                address = (address + self._backend.get_segment(name).base) & _MASKS[8]
            if (address >> 47) not in (0, 0x1FFFF) and not (
                self._backend.get("cr4") & _CR4_LA57 and (address >> 56) in (0, 0xFF)
            ):
                raise GuestFault(12 if name == "ss" else 13, 0)
            return address
        segment = self._backend.get_segment(name)
        last = address + size - 1
        down = segment.attr & 0xC == 4  # a data segment that expands down
        top = 0xFFFF_FFFF if segment.attr & _ATTR_DB else 0xFFFF
        outside = not segment.limit < address <= last <= top if down else last > segment.limit
        if segment.attr >> 16 & 1 or outside:
            raise GuestFault(12 if name == "ss" else 13, 0)
        return (segment.base + address) & 0xFFFF_FFFF

    # -- memory and devices --------------------------------------------------------------------------------------------

    def _load(self, linear: int, size: int) -> int:
        rest = 0x1000 - (linear & 0xFFF)
        if size <= rest:
            return self._load_physical(self._translate(linear, 0), size)
        first, second = self._translate(linear, 0), self._translate(linear + rest, 0)
        low = self._load_physical(first, rest)
        return low | self._load_physical(second, size - rest) << 8 * rest

    def _store(self, linear: int, size: int, value: int) -> None:
        rest = 0x1000 - (linear & 0xFFF)
        if size <= rest:
            self._store_physical(self._translate(linear, 1), size, value)
            return
        first, second = self._translate(linear, 1), self._translate(linear + rest, 1)
        self._store_physical(first, rest, value & _MASKS[rest])
        self._store_physical(second, size - rest, value >> 8 * rest)

    def _load_physical(self, gpa: int, size: int) -> int:
        if not self._devices.is_device(gpa):
            try:
                return int.from_bytes(self._memory.read(gpa, size), "little")
            except IndexError:
                pass
        return self._devices.read_device(gpa, size)

    def _store_physical(self, gpa: int, size: int, value: int) -> None:
        value &= _MASKS[size]
        if not self._devices.is_device(gpa):
            try:
                self._memory.write(gpa, value.to_bytes(size, "little"))
                return
            except IndexError:
                pass
        self._devices.write_device(gpa, size, value)

    # -- operands ------------------------------------------------------------------------------------------------------

    def _get(self, operand: Operand) -> int:
        if operand.kind == REG:
            return self._backend.get_gpr(operand.index) >> operand.shift & _MASKS[operand.size]
        if operand.kind == MEM:
            return self._load(self._linear(operand), operand.size)
        return operand.value & _MASKS[operand.size or 8]

    def _set(self, operand: Operand, value: int) -> None:
        if operand.kind == REG:
            self._set_register(operand.index, operand.size, value, operand.shift)
        else:
            self._store(self._linear(operand), operand.size, value)

    def _set_register(self, index: int, size: int, value: int, shift: int = 0) -> None:
        """Write part of a register: 32-bit writes clear the upper half, narrower ones leave the rest."""
        if size < 4:
            mask = _MASKS[size] << shift
            value = self._backend.get_gpr(index) & ~mask | value << shift & mask
        else:
            value &= _MASKS[size]
        self._backend.set_gpr(index, value)

    def _set_flags(self, mask: int, flags: int) -> None:
        self._backend.set("rflags", self._backend.get("rflags") & ~mask | flags & mask)

    def _done(self, plan: _Plan) -> None:
        self._backend.skip(plan.length)

    def _assisted(self, plan: _Plan) -> None:
        """What is not emulated here, the processor does itself, on copies of the devices' bytes."""
        assert plan.instruction is not None
        accesses = []
        backend = self._backend
        for linear, size, reads, writes in memory_accesses(plan.instruction, backend.get_gpr, self._anywhere) or ():
            for at, length in _within_pages(linear, size):
                gpa = backend.translate(at, 1 if writes else 0)
                if gpa is not None and not self._is_memory(gpa):
                    accesses.append(Access(gpa, length, reads, writes))
        behind = backend.get("rip") + plan.length
        branches = plan.instruction.flow_control != FlowControl.NEXT
        if (
            self._assistant is None
            or not accesses
            or not self._assistant.run(accesses, backend.exit, lambda: branches or backend.get("rip") == behind)
        ):
            self.unknown[str(plan.instruction)] += 1
            raise GuestFault(6)

    def _anywhere(self, segment: str, offset: int, size: int) -> int:
        """The linear address, unchecked: the processor will check it."""
        if self._bits == 64 and segment not in ("fs", "gs"):
            return offset
        linear = offset + self._backend.get_segment(segment).base
        return linear & (_MASKS[8] if self._bits == 64 else 0xFFFF_FFFF)

    def _is_memory(self, gpa: int) -> bool:
        if self._devices.is_device(gpa):
            return False
        try:
            self._memory.read(gpa, 1)
        except IndexError:
            return False
        return True

    # -- moves ---------------------------------------------------------------------------------------------------------

    def _mov(self, plan: _Plan) -> None:
        target, source = plan.operands
        self._set(target, self._get(source))
        self._done(plan)

    def _movsx(self, plan: _Plan) -> None:
        target, source = plan.operands
        self._set(target, _signed(self._get(source), source.size))
        self._done(plan)

    def _movbe(self, plan: _Plan) -> None:
        target, source = plan.operands
        swapped = self._get(source).to_bytes(source.size, "little")
        self._set(target, int.from_bytes(swapped, "big"))
        self._done(plan)

    def _xchg(self, plan: _Plan) -> None:
        first, second = plan.operands
        old_first, old_second = self._get(first), self._get(second)
        # Memory first: it may fault.
        if first.kind == MEM:
            self._set(first, old_second)
            self._set(second, old_first)
        else:
            self._set(second, old_first)
            self._set(first, old_second)
        self._done(plan)

    def _cmpxchg(self, plan: _Plan) -> None:
        target, source = plan.operands
        size = target.size
        old = self._get(target)
        accumulator = self._backend.get_gpr(_RAX) & _MASKS[size]
        equal = old == accumulator
        self._set(target, self._get(source) if equal else old)
        if not equal:
            self._set_register(_RAX, size, old)
        self._set_flags(_ARITHMETIC, _sub_flags(accumulator, old, 0, size))
        self._done(plan)

    def _xadd(self, plan: _Plan) -> None:
        target, source = plan.operands
        old, addend = self._get(target), self._get(source)
        self._set(target, old + addend & _MASKS[target.size])
        self._set(source, old)
        self._set_flags(_ARITHMETIC, _add_flags(old, addend, 0, target.size))
        self._done(plan)

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def _binary(self, plan: _Plan, operation: Callable[[int, int, int, int], tuple[int, int]], keep: bool) -> None:
        target, source = plan.operands
        size = target.size
        carry = self._backend.get("rflags") & CF
        result, flags = operation(self._get(target), self._get(source) & _MASKS[size], carry, size)
        if keep:
            self._set(target, result)
        self._set_flags(_ARITHMETIC, flags)
        self._done(plan)

    def _add(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a + b & _MASKS[size], _add_flags(a, b, 0, size)), True)

    def _adc(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a + b + c & _MASKS[size], _add_flags(a, b, c, size)), True)

    def _sub(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a - b & _MASKS[size], _sub_flags(a, b, 0, size)), True)

    def _sbb(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a - b - c & _MASKS[size], _sub_flags(a, b, c, size)), True)

    def _cmp(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (0, _sub_flags(a, b, 0, size)), False)

    def _and(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a & b, _logic_flags(a & b, size)), True)

    def _or(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a | b, _logic_flags(a | b, size)), True)

    def _xor(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (a ^ b, _logic_flags(a ^ b, size)), True)

    def _test(self, plan: _Plan) -> None:
        self._binary(plan, lambda a, b, c, size: (0, _logic_flags(a & b, size)), False)

    def _inc(self, plan: _Plan) -> None:
        (target,) = plan.operands
        old = self._get(target)
        self._set(target, old + 1 & _MASKS[target.size])
        self._set_flags(_ARITHMETIC & ~CF, _add_flags(old, 1, 0, target.size))
        self._done(plan)

    def _dec(self, plan: _Plan) -> None:
        (target,) = plan.operands
        old = self._get(target)
        self._set(target, old - 1 & _MASKS[target.size])
        self._set_flags(_ARITHMETIC & ~CF, _sub_flags(old, 1, 0, target.size))
        self._done(plan)

    def _neg(self, plan: _Plan) -> None:
        (target,) = plan.operands
        old = self._get(target)
        self._set(target, -old & _MASKS[target.size])
        self._set_flags(_ARITHMETIC, _sub_flags(0, old, 0, target.size))
        self._done(plan)

    def _not(self, plan: _Plan) -> None:
        (target,) = plan.operands
        self._set(target, ~self._get(target) & _MASKS[target.size])
        self._done(plan)

    def _bit(self, plan: _Plan, change: Callable[[int, int], int] | None) -> None:
        """BT and its kin: a bit number in a register reaches beyond the operand, an immediate one does not."""
        target, source = plan.operands
        size = target.size
        number = self._get(source)
        if target.kind != MEM:
            number &= 8 * size - 1
            old = self._get(target)
            if change is not None:
                self._set(target, change(old, 1 << number) & _MASKS[size])
        else:
            extra = 0
            if source.kind == REG:
                extra = _signed_int(number, source.size) // (8 * size) * size
            number &= 8 * size - 1
            linear = self._linear(target, extra)
            old = self._load(linear, size)
            if change is not None:
                self._store(linear, size, change(old, 1 << number) & _MASKS[size])
        self._set_flags(CF, old >> number & 1)
        self._done(plan)

    def _bt(self, plan: _Plan) -> None:
        self._bit(plan, None)

    def _bts(self, plan: _Plan) -> None:
        self._bit(plan, lambda value, bit: value | bit)

    def _btr(self, plan: _Plan) -> None:
        self._bit(plan, lambda value, bit: value & ~bit)

    def _btc(self, plan: _Plan) -> None:
        self._bit(plan, lambda value, bit: value ^ bit)

    # -- the stack -----------------------------------------------------------------------------------------------------

    def _stack_mask(self) -> int:
        if self._bits == 64:
            return _MASKS[8]
        return 0xFFFF_FFFF if self._backend.get_segment("ss").attr & _ATTR_DB else 0xFFFF

    def _push(self, plan: _Plan) -> None:
        (source,) = plan.operands
        mask = self._stack_mask()
        old = self._backend.get_gpr(_RSP)
        top = (old - plan.size) & mask
        value = self._get(source)
        self._store(self._segmented("ss", top, plan.size), plan.size, value)
        self._backend.set_gpr(_RSP, old & ~mask | top)
        self._done(plan)

    def _pop(self, plan: _Plan) -> None:
        (target,) = plan.operands
        mask = self._stack_mask()
        old = self._backend.get_gpr(_RSP)
        value = self._load(self._segmented("ss", old & mask, plan.size), plan.size)
        self._backend.set_gpr(_RSP, old & ~mask | old + plan.size & mask)
        try:
            # An address that uses RSP uses the value after the pop.
            self._set(target, value)
        except GuestFault:
            self._backend.set_gpr(_RSP, old)
            raise
        self._done(plan)

    # -- strings -------------------------------------------------------------------------------------------------------

    def _string(
        self,
        plan: _Plan,
        step: Callable[[_Plan], None],
        address_mask: int,
        *moved: int,
        most: int = _MAX_REPEATS,
    ) -> None:
        """Carry out one element, or up to `most` of them; the registers are right after each."""
        backend = self._backend
        size = plan.size
        delta = -size if backend.get("rflags") & DF else size
        for _ in range(most if plan.repeat else 1):
            if plan.repeat and not backend.get_gpr(_RCX) & address_mask:
                break
            step(plan)
            for index in moved:
                self._advance(index, delta, address_mask)
            if plan.repeat:
                self._advance(_RCX, -1, address_mask)
                if plan.while_equal is not None and bool(backend.get("rflags") & ZF) != plan.while_equal:
                    break
        else:
            if plan.repeat and backend.get_gpr(_RCX) & address_mask:
                return  # RIP stays: the guest comes back for the rest
        self._done(plan)

    def _advance(self, index: int, delta: int, address_mask: int) -> None:
        old = self._backend.get_gpr(index)
        new = old + delta & address_mask
        # A 16-bit index leaves the upper part alone; a 32-bit one in 64-bit mode clears it.
        self._backend.set_gpr(index, old & ~address_mask | new if address_mask == 0xFFFF else new)

    def _movs(self, plan: _Plan) -> None:
        target, source = plan.operands

        def step(plan: _Plan) -> None:
            self._set(target, self._get(source))

        self._string(plan, step, target.address_mask, _RSI, _RDI)

    def _stos(self, plan: _Plan) -> None:
        target, source = plan.operands

        def step(plan: _Plan) -> None:
            self._set(target, self._get(source))

        self._string(plan, step, target.address_mask, _RDI)

    def _lods(self, plan: _Plan) -> None:
        target, source = plan.operands

        def step(plan: _Plan) -> None:
            self._set(target, self._get(source))

        self._string(plan, step, source.address_mask, _RSI)

    def _cmps(self, plan: _Plan) -> None:
        first, second = plan.operands

        def step(plan: _Plan) -> None:
            self._set_flags(_ARITHMETIC, _sub_flags(self._get(first), self._get(second), 0, plan.size))

        self._string(plan, step, first.address_mask, _RSI, _RDI)

    def _scas(self, plan: _Plan) -> None:
        first, second = plan.operands

        def step(plan: _Plan) -> None:
            self._set_flags(_ARITHMETIC, _sub_flags(self._get(first), self._get(second), 0, plan.size))

        self._string(plan, step, second.address_mask, _RDI)

    def _checked(self, plan: _Plan, operand: Operand) -> int:
        """How many elements the processor has checked: those that begin in the first one's page. The next page may not
        be open to this privilege level; the processor checks it when the guest comes back."""
        if not plan.repeat or not self._backend.get_gpr(_RCX) & operand.address_mask:
            return 1
        at = self._linear(operand) & 0xFFF
        down = self._backend.get("rflags") & DF
        return min(max(at // plan.size + 1 if down else (0x1000 - at) // plan.size, 1), _MAX_REPEATS)

    def _ins(self, plan: _Plan) -> None:
        target = plan.operands[0]

        def step(plan: _Plan) -> None:
            linear = self._linear(target)
            self._translate(linear, 1)  # a fault must come before the device is read
            if (linear & 0xFFF) + plan.size > 0x1000:
                self._translate((linear | 0xFFF) + 1, 1)
            self._store(linear, plan.size, self._devices.read_port(self._backend.get_gpr(_RDX) & 0xFFFF, plan.size))

        self._string(plan, step, target.address_mask, _RDI, most=self._checked(plan, target))

    def _outs(self, plan: _Plan) -> None:
        source = plan.operands[1]

        def step(plan: _Plan) -> None:
            self._devices.write_port(self._backend.get_gpr(_RDX) & 0xFFFF, plan.size, self._get(source))

        self._string(plan, step, source.address_mask, _RSI, most=self._checked(plan, source))


# -- flags, "EFLAGS Cross-Reference" -----------------------------------------------------------------------------------


def _within_pages(linear: int, size: int) -> Iterator[tuple[int, int]]:
    """Return (address, size) for each page that a range is in."""
    while size:
        length = min(size, 0x1000 - (linear & 0xFFF))
        yield linear, length
        linear, size = linear + length & _MASKS[8], size - length


def _signed(value: int, size: int) -> int:
    """Sign-extend to 64 bits, as an unsigned number."""
    return _signed_int(value, size) & _MASKS[8]


def _signed_int(value: int, size: int) -> int:
    sign = 1 << 8 * size - 1
    return (value & _MASKS[size] ^ sign) - sign


def _result_flags(result: int, size: int) -> int:
    flags = _PARITY[result & 0xFF]
    if not result:
        flags |= ZF
    if result >> 8 * size - 1 & 1:
        flags |= SF
    return flags


def _logic_flags(result: int, size: int) -> int:
    return _result_flags(result & _MASKS[size], size)


def _add_flags(a: int, b: int, carry: int, size: int) -> int:
    total = a + b + carry
    result = total & _MASKS[size]
    flags = _result_flags(result, size) | (CF if total > _MASKS[size] else 0) | (a ^ b ^ result) & AF
    if (a ^ result) & (b ^ result) & 1 << 8 * size - 1:
        flags |= OF
    return flags


def _sub_flags(a: int, b: int, borrow: int, size: int) -> int:
    result = a - b - borrow & _MASKS[size]
    flags = _result_flags(result, size) | (CF if a < b + borrow else 0) | (a ^ b ^ result) & AF
    if (a ^ b) & (a ^ result) & 1 << 8 * size - 1:
        flags |= OF
    return flags


def _stack_size(instruction: Instruction, bits: int) -> int:
    """How much a PUSH or POP moves."""
    return abs(instruction.stack_pointer_increment) or bits // 8


_STACK: Final = frozenset((Mnemonic.PUSH, Mnemonic.POP))
_COMPARING_STRINGS: Final = frozenset(
    getattr(Mnemonic, operation + size) for operation in ("CMPS", "SCAS") for size in "BWDQ"
)
_E = InstructionEmulator
_HANDLERS: Final[dict[int, Callable[[InstructionEmulator, _Plan], None]]] = {
    Mnemonic.MOV: _E._mov,
    Mnemonic.MOVZX: _E._mov,
    Mnemonic.MOVNTI: _E._mov,
    Mnemonic.MOVSX: _E._movsx,
    Mnemonic.MOVSXD: _E._movsx,
    Mnemonic.MOVBE: _E._movbe,
    Mnemonic.XCHG: _E._xchg,
    Mnemonic.CMPXCHG: _E._cmpxchg,
    Mnemonic.XADD: _E._xadd,
    Mnemonic.ADD: _E._add,
    Mnemonic.ADC: _E._adc,
    Mnemonic.SUB: _E._sub,
    Mnemonic.SBB: _E._sbb,
    Mnemonic.CMP: _E._cmp,
    Mnemonic.AND: _E._and,
    Mnemonic.OR: _E._or,
    Mnemonic.XOR: _E._xor,
    Mnemonic.TEST: _E._test,
    Mnemonic.INC: _E._inc,
    Mnemonic.DEC: _E._dec,
    Mnemonic.NEG: _E._neg,
    Mnemonic.NOT: _E._not,
    Mnemonic.BT: _E._bt,
    Mnemonic.BTS: _E._bts,
    Mnemonic.BTR: _E._btr,
    Mnemonic.BTC: _E._btc,
    Mnemonic.PUSH: _E._push,
    Mnemonic.POP: _E._pop,
    **dict.fromkeys((Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.MOVSQ), _E._movs),
    **dict.fromkeys((Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.STOSQ), _E._stos),
    **dict.fromkeys((Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.LODSQ), _E._lods),
    **dict.fromkeys((Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ), _E._cmps),
    **dict.fromkeys((Mnemonic.SCASB, Mnemonic.SCASW, Mnemonic.SCASD, Mnemonic.SCASQ), _E._scas),
    **dict.fromkeys((Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD), _E._ins),
    **dict.fromkeys((Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD), _E._outs),
}

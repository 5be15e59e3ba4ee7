"""A function's configuration space: bytes, and which bits of them a guest may write."""

from pyhyve.bhyve.pci.bits import CONFIG_SIZE


class ConfigSpace:
    """`size` bytes of registers. Undefined ones read as zero and ignore writes; beyond the space, all ones."""

    def __init__(self, size: int = CONFIG_SIZE) -> None:
        self.size = size
        self._data = bytearray(size)
        self._writable = bytearray(size)
        self._clear = bytearray(size)

    def define(self, offset: int, size: int, value: int, writable: int = 0, clear: int = 0) -> None:
        """Set a register of `size` bytes: its value, the bits that a guest may write and those it clears by writing 1.

        Raise ValueError if it does not lie in the space.
        """
        if offset < 0 or offset + size > self.size:
            raise ValueError(f"register {offset:#x}+{size} is outside {self.size:#x} bytes of configuration space")
        self._data[offset : offset + size] = value.to_bytes(size, "little")
        self._writable[offset : offset + size] = writable.to_bytes(size, "little")
        self._clear[offset : offset + size] = clear.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """Return a register for the device's own use."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Change a register as the device: masks do not hold."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads."""
        data = self._data[offset : offset + size]
        if len(data) < size:
            data += b"\xff" * (size - len(data))
        return int.from_bytes(data, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes."""
        for i in range(offset, min(offset + size, self.size)):
            byte = value >> 8 * (i - offset) & 0xFF
            writable = self._writable[i]
            self._data[i] = (self._data[i] & ~writable | byte & writable) & ~(byte & self._clear[i])

    def save(self) -> bytes:
        """Return the registers' bytes; masks are the declaration's."""
        return bytes(self._data)

    def restore(self, data: bytes) -> None:
        """Raise ValueError if `data` is of another size than this space."""
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes saved, {self.size} bytes of configuration space")
        self._data[:] = data

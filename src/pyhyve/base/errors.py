"""Errors that a user or a caller can act on."""


class PyhyveError(Exception):
    """Base of all errors that pyhyve raises on purpose; its text is one line for a person."""


class UsageError(PyhyveError):
    """What the user asked for cannot be: the text says what is wrong and what would be right (exit status 2)."""


class HostError(PyhyveError):
    """The host lacks something (memory, a device, a permission, a tool); the text names it and the remedy."""


class GuestFault(PyhyveError):
    """An access that the guest may not make; becomes a guest exception, never a monitor's failure.

    vector: 0-31; error: the exception's error code, or None where the vector has none; addr: CR2 for vector 14.
    """

    def __init__(self, vector: int, error: int | None = None, addr: int = 0) -> None:
        super().__init__(f"guest exception {vector}")
        self.vector = vector
        self.error = error
        self.addr = addr

"""Port 0x80: the power-on self test's code; operating systems write to it only to lose a microsecond."""


class PostCode:
    """Keeps the last code written, for a person to look at."""

    def __init__(self) -> None:
        self.code = 0

    def read(self, offset: int, size: int) -> int:
        return self.code

    def write(self, offset: int, size: int, value: int) -> None:
        self.code = value & 0xFF

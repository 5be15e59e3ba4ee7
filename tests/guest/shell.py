"""A shell in a guest, driven over its console."""

import re
from dataclasses import dataclass
from typing import Final

import pyhyve
from pyhyve.bhyve.boot.guestimage import GuestImage

APPEND: Final = "console=ttyS0 panic=-1"
PROMPT: Final = "root@pyhyve:"
BOOT_S: Final = 60.0
_MARK: Final = "=-="


def machine(image: GuestImage, append: str = APPEND, **options: object) -> pyhyve.Machine:
    """The stock kernel with the stock initramfs, not started."""
    return pyhyve.Machine(image.kernel, initrd=image.initramfs, append=append, processor="bt", **options)  # type: ignore[arg-type]


@dataclass
class Shell:
    machine: pyhyve.Machine

    @classmethod
    def boot(cls, machine: pyhyve.Machine) -> "Shell":
        machine.start()
        machine.console.expect(PROMPT, timeout=BOOT_S)
        return cls(machine)

    def __call__(self, command: str, *, timeout: float = 60.0, status: int = 0) -> str:
        """Run a command; return what it printed, without the last line's end. Fails if its exit status is another."""
        # The marks are put together in the guest, so that the echo of what was typed is not taken for them.
        mark = f"'{_MARK[:1]}''{_MARK[1:]}'"
        self.machine.console.send(f"echo {mark}; {command}; echo {mark}$?.\n")
        match = self.machine.console.expect(re.compile(rf"\n{_MARK}\r\n(.*?){_MARK}(\d+)\.\r\n", re.DOTALL), timeout)
        text = match[1].replace("\r\n", "\n").rstrip("\n")
        assert int(match[2]) == status, f"{command!r} ended with {match[2]}:\n{text}"
        return text

    def type(self, text: str) -> None:
        self.machine.console.send(text)

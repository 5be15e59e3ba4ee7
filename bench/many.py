"""Many guests on one host: python bench/many.py [--vms N] [--memory SIZE] [--seconds S] [--json]

Starts N guests at once, each with a shell on a terminal, and leaves them there. Prints how long that took, what each
takes of the host's memory beyond its own, and of a processor; writes bench/out/many.json.
"""

import argparse
import contextlib
import os
import pty
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import devices
import host
from processes import BenchError, Signals, end_group

DEFAULT_VMS: Final = 50
DEFAULT_MEMORY: Final = "128M"
DEFAULT_SECONDS: Final = 20.0
_SETTLE_SECONDS: Final = 5.0
_BOOT_TIMEOUT_A_VM_S: Final = 60.0
_PROMPT: Final = b"root@pyhyve:~# "
_ESCAPES: Final = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Guests:
    """Guests that were started, each with its terminal."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.processes: list[subprocess.Popen[bytes]] = []
        self._terminals: dict[int, bytes] = {}

    def start(self, command: Sequence[str]) -> None:
        master, slave = pty.openpty()
        self._stack.callback(os.close, master)
        try:
            process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        finally:
            os.close(slave)
        self._stack.callback(end_group, process)
        self.processes.append(process)
        self._terminals[master] = b""

    def await_prompts(self, signals: Signals, timeout: float) -> None:
        """Wait until each guest is at its shell. BenchError if one ends, or is late."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for terminal in (*self._terminals, signals.fd):
                selector.register(terminal, selectors.EVENT_READ)
            waiting = set(self._terminals)
            while waiting:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BenchError(f"{len(waiting)} guests are not at their prompt after {timeout:g} s")
                ready = {key.fd for key, _ in selector.select(left)}
                signals.check()
                for terminal in ready:
                    try:
                        data = os.read(terminal, 1 << 16)
                    except OSError:  # its other side is closed
                        data = b""
                    seen = self._terminals[terminal] = (self._terminals[terminal] + data)[-(1 << 14) :]
                    if not data:
                        raise BenchError("a guest ended before its prompt", seen.decode("utf-8", "replace")[-1000:])
                    if _PROMPT in _ESCAPES.sub(b"", seen):
                        waiting.discard(terminal)


def measure(vms: int, memory: str, seconds: float) -> dict[str, object]:
    """Return the figures. BenchError if a guest does not get to its prompt."""
    from pyhyve.base.errors import PyhyveError
    from pyhyve.bhyve.boot import guestimage

    try:
        image = guestimage.get()
    except PyhyveError as error:
        raise BenchError(str(error)) from None
    command = [*host.pyhyve_command(), "run", "--processor", "bt", "-m", memory]
    command += ["--kernel", str(image.kernel), "--initrd", str(image.initramfs), "--append", "console=ttyS0"]
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        all_guests = Guests(stack)
        start = time.monotonic()
        for _ in range(vms):
            all_guests.start(command)
            signals.check()
        print(f"bench: started {vms}; waiting for their prompts", file=sys.stderr)
        all_guests.await_prompts(signals, _BOOT_TIMEOUT_A_VM_S + 20.0 * vms)
        started = time.monotonic() - start
        time.sleep(_SETTLE_SECONDS)
        signals.check()
        pids = [process.pid for process in all_guests.processes]
        extra = sum(devices.extra_memory(pid) for pid in pids)
        guest = sum(devices.mapped_memory(Path(f"/proc/{pid}/smaps").read_text())[0] for pid in pids) / devices.MIB
        print(f"bench: watching them for {seconds:g} s", file=sys.stderr)
        before, begin = [host.cpu_seconds(pid) for pid in pids], time.monotonic()
        time.sleep(seconds)
        signals.check()
        spent = sum(host.cpu_seconds(pid) for pid in pids) - sum(before)
        elapsed = time.monotonic() - begin
        threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
        for process in all_guests.processes:
            if process.poll() is not None:
                raise BenchError(f"a guest ended at its prompt: exit status {process.returncode}")
    return {
        "vms": vms,
        "memory": memory,
        "started_seconds": round(started, 3),
        "extra_mib_a_vm": round(extra / vms, 3),
        "guest_mib_a_vm": round(guest / vms, 3),
        "idle_percent_a_vm": round(spent / elapsed / vms * 100, 3),
        "threads_a_vm": round(threads / vms, 2),
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/many.py", description="Measure many idle guests at once.")
    parser.add_argument("--vms", type=int, metavar="N", default=DEFAULT_VMS, help="how many (%(default)s)")
    parser.add_argument("--memory", metavar="SIZE", default=DEFAULT_MEMORY, help="of each (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", default=DEFAULT_SECONDS, help="how long they are watched (%(default)g)"
    )
    host.add_json(parser, "lines")
    arguments = parser.parse_args(argv)
    if arguments.vms < 1:
        parser.error(f"--vms {arguments.vms}: not a number of guests; write 1 or more")
    if not 0 < arguments.seconds < 1e6:
        parser.error(f"--seconds {arguments.seconds:g}: not a time; write seconds")
    return arguments


def show(result: Mapping[str, object]) -> None:
    print(f"{result['vms']} guests of {result['memory']} at their prompts after {result['started_seconds']} s")
    print(f"each takes {result['extra_mib_a_vm']} MiB beyond the {result['guest_mib_a_vm']} MiB of its own memory,")
    print(f"{result['idle_percent_a_vm']} % of a processor, and {result['threads_a_vm']} threads")


def main() -> int:
    arguments = parse_arguments()
    result: dict[str, object] = {}

    def work() -> Mapping[str, object]:
        machine = host.prepare()
        result.update(measure(arguments.vms, arguments.memory, arguments.seconds))
        return {"machine": machine} | result

    return host.run(work, "many.json", None if arguments.as_json else lambda: show(result))


if __name__ == "__main__":
    sys.exit(main())

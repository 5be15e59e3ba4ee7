"""The stress guest: make soak, or python bench/soak.py [--minutes M] [--seed N] [--cpus N] [--json]

Boots a guest in which processes check themselves all the time: fork, exec, mmap, page faults, futexes, signals, memory
order, floating point, code that changes (guest/soak.c), and busybox jobs whose results are known. Then compares some of
what they computed with the host. Any wrong result ends it with status 1 and the seed. See docs/performance.md.
"""

import argparse
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import console
import guests
import host
from processes import BenchError, Interrupted, interrupt, run_to_end
from results import OUTPUT, write_json

PROGRAM: Final = "soak"
MEMORY_MIB: Final = 512
_APPEND: Final = "console=ttyS0 quiet pyhyve.run=/run.sh"
_WORKERS_A_CPU: Final = 1.5
_JOBS: Final = 2
_GRACE_S: Final = 180.0
_REPLAYS_A_MINUTE: Final = 20
_NUMBERS: Final = 3000
_KERNEL_COMPLAINTS: Final = "BUG|Oops|WARNING|lockup|rcu.*stall|hung_task|general protection|segfault"
_EPOCH: Final = re.compile(r"^EPOCH (\d+) (\d+) ([0-9a-f]{16})$")
_FAULT: Final = re.compile(r"^(?:WRONG|FAILED|KERNEL|SICK) .*$")
_PASSED: Final = "PASSED status 0"


@dataclass(frozen=True, slots=True)
class Options:
    minutes: float
    seed: int
    cpus: int
    as_json: bool


@dataclass(slots=True)
class Tally:
    """What the guest has said so far: digests by (worker, number), rounds of the shell's jobs."""

    started: float
    minutes: float
    seed: int
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    jobs: Counter[str] = field(default_factory=Counter)
    shown: float = 0.0

    def line(self, text: str) -> None:
        """Take a line of the console. BenchError if it tells of something wrong."""
        text = console.clean(text)
        match = _EPOCH.match(text)
        if match is not None:
            self.digests[int(match[1]), int(match[2])] = match[3]
        elif text.startswith("JOB "):
            self.jobs[text] += 1
        elif _FAULT.match(text):
            raise BenchError(text)
        self._show()

    def _show(self) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.shown < (0.5 if terminal else 60.0):
            return
        self.shown = now
        text = (
            f"soak: {(now - self.started) / 60:.1f} of {self.minutes:g} min, {len(self.digests)} epochs, "
            f"{self.jobs.total()} jobs, seed {self.seed}"
        )
        print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)


def script(seed: int, workers: int, seconds: int) -> bytes:
    """Return what the guest runs: the program, and jobs of the shell whose results are known."""
    numbers = "".join(f"{n}\n" for n in range(1, _NUMBERS + 1)).encode()
    harmonic = 0.0
    for n in range(1, _NUMBERS):
        harmonic += 1 / n
    return f"""\
end=$(($(cut -d. -f1 /proc/uptime) + {seconds}))
w() {{
	n=0
	while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do
		s=$(seq 1 {_NUMBERS} | sha256sum | cut -c1-64)
		[ "$s" = {hashlib.sha256(numbers).hexdigest()} ] || echo "WRONG job $1: sha256sum $s"
		x=$(awk 'BEGIN {{ for (k = 1; k < {_NUMBERS}; k++) s += 1 / k; printf "%.9f", s }}')
		[ "$x" = {harmonic:.9f} ] || echo "WRONG job $1: awk $x"
		s=$(seq {_NUMBERS} -1 1 | sort -n | md5sum | cut -c1-32)
		[ "$s" = {hashlib.md5(numbers).hexdigest()} ] || echo "WRONG job $1: sort $s"
		dd if=/dev/urandom of=/tmp/f$1 bs=64k count=8 2>/dev/null
		a=$(md5sum </tmp/f$1)
		gzip -c /tmp/f$1 | gunzip -c >/tmp/g$1
		b=$(md5sum </tmp/g$1)
		[ "$a" = "$b" ] || echo "WRONG job $1: gzip"
		n=$((n + 1))
		echo "JOB $1 $n"
	done
}}
/soak {seed} {workers} {seconds} &
program=$!
for job in $(seq 1 {_JOBS}); do
	w $job &
done
wait $program
status=$?
wait
dmesg | grep -E '{_KERNEL_COMPLAINTS}' | sed 's/^/KERNEL /'
echo "PASSED status $status"
""".encode()


def soak(options: Options) -> dict[str, object]:
    """Run all of it; return the result. BenchError if anything is wrong."""
    host.require_processor()

    from pyhyve.base.errors import PyhyveError
    from pyhyve.bhyve.boot import guestimage

    try:
        image = guestimage.get()
    except PyhyveError as error:
        raise BenchError(str(error)) from None
    seconds = max(1, round(options.minutes * 60))
    workers = max(1, round(options.cpus * _WORKERS_A_CPU))
    with tempfile.TemporaryDirectory(prefix="pyhyve-soak-") as name:
        scratch = Path(name)
        program = guests.compile_static(PROGRAM, scratch, ("-pthread",))
        run = scratch / "run.sh"
        run.write_bytes(script(options.seed, workers, seconds))
        initramfs = guests.write_initramfs(image.busybox, {PROGRAM: program, "run.sh": run}, scratch / "initramfs.cpio")
        command = [*host.pyhyve_command(), "run", "--processor", "bt", "-c", str(options.cpus), "-m", f"{MEMORY_MIB}M"]
        command += ["--kernel", str(image.kernel), "--initrd", str(initramfs), "--append", _APPEND]
        tally = Tally(time.monotonic(), options.minutes, options.seed)
        finished = run_to_end(command, seconds + _GRACE_S, on_line=tally.line)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        console.check_power_off(finished)
        if not any(_PASSED in line.text for line in finished.lines):
            raise BenchError("the guest did not say that all is well", finished.tail())
        replayed = replay(program, tally, max(20, round(_REPLAYS_A_MINUTE * options.minutes)))
    return {
        "seed": options.seed,
        "minutes": options.minutes,
        "cpus": options.cpus,
        "epochs": len(tally.digests),
        "jobs": tally.jobs.total(),
        "replayed": replayed,
        "wrong": 0,
    }


def replay(program: Path, tally: Tally, count: int) -> int:
    """Compute `count` of the guest's epochs on the host; BenchError if one differs. Returns how many there were."""
    chosen = random.Random(tally.seed).sample(sorted(tally.digests), min(count, len(tally.digests)))
    for worker, number in chosen:
        done = subprocess.run(
            [program, str(tally.seed), str(worker), str(number), "replay"], capture_output=True, text=True, check=False
        )
        found = done.stdout.strip()
        if found != f"DIGEST {tally.digests[worker, number]}":
            expected = tally.digests[worker, number]
            raise BenchError(f"epoch {number} of worker {worker}: {expected} in the guest, here '{found}'")
    return len(chosen)


def parse_arguments(argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="bench/soak.py", description="Run a guest that checks itself.")
    parser.add_argument("--minutes", type=float, metavar="M", default=60.0, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, metavar="N", help="what the processes draw from (a random one)")
    parser.add_argument("--cpus", type=int, metavar="N", default=4, help="virtual processors (%(default)s)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the JSON instead of a line")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes <= 100_000:
        parser.error(f"--minutes {arguments.minutes:g}: not a time; write minutes")
    if arguments.cpus < 1:
        parser.error(f"--cpus {arguments.cpus}: not a number of processors; write 1 or more")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    if not 0 <= seed < 1 << 63:
        parser.error(f"--seed {seed}: not a seed; write 0 or more")
    return Options(arguments.minutes, seed, arguments.cpus, arguments.as_json)


def run(options: Options) -> int:
    """Run it, write bench/out/soak.json, say how it went; the exit status."""
    try:
        result = soak(options)
    except BenchError as error:
        if error.output:
            print(error.output, file=sys.stderr)
        print(f"soak: {error} (seed {options.seed})", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"\nsoak: interrupted; nothing was wrong so far (seed {options.seed})", file=sys.stderr)
        return 128 + interrupted.number
    write_json(OUTPUT / "soak.json", {"machine": host.describe() | {"processor": "bt"}} | result)
    if options.as_json:
        print(json.dumps(result))
    else:
        print(
            f"soak: {result['epochs']} epochs and {result['jobs']} jobs in {options.minutes:g} min on {options.cpus} "
            f"processors, {result['replayed']} of the epochs held against the host: nothing wrong (seed {options.seed})"
        )
    return 0


def main() -> int:
    options = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())

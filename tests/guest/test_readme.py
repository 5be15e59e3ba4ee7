"""The README's example does what it says."""

import re
import subprocess
import sys
from pathlib import Path

from commandline import CommandLine

from pyhyve.bhyve.boot.guestimage import GuestImage

README = Path(__file__).parents[2] / "README.md"


def python_example() -> str:
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if "import pyhyve" in block)


def test_first_python_example_runs(command: CommandLine, guest_image: GuestImage) -> None:
    # The example names its files as they are called in the user's own directory.
    for name, path in (("vmlinuz", guest_image.kernel), ("initramfs.cpio", guest_image.initramfs)):
        (command.current / name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", python_example()],
        cwd=command.current,
        env=command.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "powered-off" in done.stdout

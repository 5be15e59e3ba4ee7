"""Our own guest: what is in its initramfs, and that its workloads run anywhere."""

import re
import subprocess
from pathlib import Path

import pytest

from pyhyve.bhyve.boot.guestimage import GuestImage
from pyhyve.bhyve.boot.initramfs import build_initramfs, guest_script


def unpack(guest: GuestImage, archive: bytes, path: str) -> bytes:
    extract = [guest.busybox, "cpio", "-i", "--to-stdout", path]
    return subprocess.run(extract, input=archive, capture_output=True, check=True).stdout


def test_initramfs_holds_busybox_init_and_the_workloads(guest_image: GuestImage) -> None:
    archive = build_initramfs(guest_image.busybox.read_bytes())
    assert unpack(guest_image, archive, "bin/busybox") == guest_image.busybox.read_bytes()
    assert unpack(guest_image, archive, "init") == guest_script("init.sh")
    assert unpack(guest_image, archive, "etc/pyhyve/bench.sh") == guest_script("bench.sh")
    assert archive == guest_image.initramfs.read_bytes()


def test_extra_files_are_added(guest_image: GuestImage) -> None:
    archive = build_initramfs(b"busybox", {"/tests/run.sh": b"echo hello"})
    assert unpack(guest_image, archive, "tests/run.sh") == b"echo hello"


@pytest.mark.parametrize("name", ["init.sh", "bench.sh"])
def test_guest_scripts_are_valid_shell(guest_image: GuestImage, name: str) -> None:
    subprocess.run([guest_image.busybox, "sh", "-n"], input=guest_script(name), check=True)


def run_bench(guest: GuestImage, tmp_path: Path, *names: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "bench.sh"
    script.write_bytes(guest_script("bench.sh"))
    (tmp_path / "scratch").mkdir()
    return subprocess.run(
        [guest.busybox, "sh", script, *names],
        env={"TMPDIR": str(tmp_path / "scratch"), "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_workload_runs_on_the_host_by_busybox_alone(guest_image: GuestImage, tmp_path: Path) -> None:
    result = run_bench(guest_image, tmp_path)
    times = dict(re.findall(r"^BENCH (\S+) (\d+\.\d{6})$", result.stdout, re.MULTILINE))
    checks = dict(re.findall(r"^CHECK (\S+) ([0-9a-f]{32})$", result.stdout, re.MULTILINE))
    assert list(times) == ["sha256sum", "gzip", "awk", "forkexec", "dd", "shell", "md5sum", "sort"]
    assert all(float(seconds) > 0 for seconds in times.values())
    assert list(checks) == list(times)
    assert (result.returncode, result.stderr) == (0, "")
    assert not list((tmp_path / "scratch").iterdir())


def test_unknown_workload_is_named(guest_image: GuestImage, tmp_path: Path) -> None:
    result = run_bench(guest_image, tmp_path, "forkexex")
    assert result.returncode == 2
    assert re.match(r"bench.sh: unknown workload 'forkexex'; there are: sha256sum .*\n$", result.stderr)

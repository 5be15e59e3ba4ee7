"""Getting a guest, with an apt of our own making: what is fetched is checked, and appears whole or not at all."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from debs import make_deb

from pyhyve.base.errors import HostError, UsageError
from pyhyve.bhyve.boot import apt, guestimage
from pyhyve.bhyve.boot.guestimage import GuestImage

APT_CACHE = """#!/bin/sh
for spec; do :; done
cat "$FAKE_APT/lists/$spec" 2>/dev/null || { echo "E: No packages found" >&2; exit 100; }
"""
APT_GET = """#!/bin/sh
echo "$*" >>"$FAKE_APT/calls"
case "$*" in
*update*) cp "$FAKE_APT"/mirror/* "$FAKE_APT/lists/" 2>/dev/null || { echo "E: no network" >&2; exit 100; } ;;
*download*)
	for spec; do case $spec in APT::*) ;; *=*)
		cp "$FAKE_APT/pool/$spec" "${spec%%=*}_1_amd64.deb" || { echo "E: 404 Not Found" >&2; exit 100; }
	esac; done ;;
esac
"""


class FakeApt:
    """A mirror, the lists that apt has of it, and the programs that read them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("bin", "lists", "mirror", "pool"):
            (root / name).mkdir(parents=True)
        for name, script in (("apt-cache", APT_CACHE), ("apt-get", APT_GET)):
            (root / "bin" / name).write_text(script)
            (root / "bin" / name).chmod(0o755)

    def publish(self, abi: str, version: str, *, known: bool = True) -> None:
        """Put a kernel and busybox on the mirror, and into apt's lists if `known`."""
        kernel = f"linux-image-{abi}-cloud-amd64"
        kernel_files = {
            f"boot/System.map-{abi}": b"map",
            f"boot/vmlinuz-{abi}": f"kernel {version}".encode(),
            "lib/modules/x.ko": b"m" * 100_000,
        }
        self._add(kernel, version, make_deb(kernel_files), known)
        self._add("busybox-static", "1:1.35", make_deb({"usr/bin/busybox": b"busybox"}, packer="zst"), known)
        self._stanza("linux-image-cloud-amd64", version, b"meta", f"Depends: {kernel} (= {version})\n", known)

    def _add(self, name: str, version: str, deb: bytes, known: bool) -> None:
        (self.root / "pool" / f"{name}={version}").write_bytes(deb)
        self._stanza(name, version, deb, "", known)

    def _stanza(self, name: str, version: str, deb: bytes, extra: str, known: bool) -> None:
        digest = hashlib.sha256(deb).hexdigest()
        text = f"Package: {name}\nVersion: {version}\n{extra}Size: {len(deb)}\nSHA256: {digest}\nDescription: x\n y\n\n"
        for place in ("mirror", "lists") if known else ("mirror",):
            for spec in (name, f"{name}={version}"):
                (self.root / place / spec).write_text(text)

    def calls(self) -> str:
        path = self.root / "calls"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    fake = FakeApt(tmp_path / "apt")
    monkeypatch.setenv("FAKE_APT", str(fake.root))
    monkeypatch.setenv("PATH", f"{fake.root / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(apt, "_POLL_SECONDS", 0.01)
    return fake


def left_behind() -> list[str]:
    root = guestimage.cache_directory()
    return sorted(path.name for path in root.iterdir() if path.name != ".lock") if root.exists() else []


def test_fetched_guest_is_whole_and_a_second_fetch_downloads_nothing(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    steps: list[tuple[str, int, int]] = []
    guest = guestimage.fetch(lambda *step: steps.append(step))
    assert guest.version == "6.1.0-9-cloud-amd64_6.1.9-1"
    assert guest.kernel.read_bytes() == b"kernel 6.1.9-1"
    assert guest.system_map.read_bytes() == b"map"
    assert guest.busybox.read_bytes() == b"busybox"
    assert b"070701" in guest.initramfs.read_bytes()
    assert os.access(guest.busybox, os.X_OK)
    assert left_behind() == [guest.version]
    downloads = [step for step in steps if step[0].startswith("downloading linux-image-6.1.0-9-cloud-amd64")]
    assert downloads[-1][1] == downloads[-1][2] > 0
    assert guestimage.fetch() == guest
    assert fake.calls().count("download") == 1


def test_newer_kernel_is_fetched_beside_the_older(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    older = guestimage.get()
    fake.publish("6.1.0-10", "6.1.10-1")
    assert guestimage.get() == older
    newer = guestimage.fetch()
    assert guestimage.list_cached() == (newer, older)
    assert guestimage.get() == newer


def test_missing_lists_are_refreshed_by_root(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1", known=False)
    steps: list[str] = []
    guestimage.fetch(lambda step, done, total: steps.append(step))
    assert "refreshing apt's package lists" in steps


def test_missing_lists_are_named_to_others(fake: FakeApt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match=r"run: sudo apt-get update$"):
        guestimage.fetch()


def test_stale_lists_are_refreshed_and_the_download_repeated(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    (fake.root / "pool" / "linux-image-6.1.0-9-cloud-amd64=6.1.9-1").unlink()
    fake.publish("6.1.0-10", "6.1.10-1", known=False)
    assert guestimage.fetch().version == "6.1.0-10-cloud-amd64_6.1.10-1"
    assert left_behind() == ["6.1.0-10-cloud-amd64_6.1.10-1"]


def corrupt(fake: FakeApt) -> None:
    path = fake.root / "pool" / "busybox-static=1:1.35"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def lose(fake: FakeApt) -> None:
    (fake.root / "pool" / "busybox-static=1:1.35").unlink()


def disconnect(fake: FakeApt) -> None:
    shutil.rmtree(fake.root / "lists")
    shutil.rmtree(fake.root / "mirror")


def forget(fake: FakeApt) -> None:
    for place in ("lists", "mirror"):
        (fake.root / place / "busybox-static").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (corrupt, "package busybox-static 1:1.35: what arrived has another SHA-256"),
        (lose, "apt-get download: 404 Not Found; check the network"),
        (disconnect, "apt-get update: no network; check the network"),
        (forget, "apt: offers no linux-image-cloud-amd64 and busybox-static"),
    ],
)
def test_failure_is_one_line_and_leaves_nothing(fake: FakeApt, harm: Callable[[FakeApt], None], message: str) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    harm(fake)
    with pytest.raises(HostError, match=f"^{message}[^\n]*$"):
        guestimage.fetch()
    assert left_behind() == []


def test_interruption_leaves_nothing(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")

    def interrupt(step: str, done: int, total: int) -> None:
        if step.startswith("downloading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guestimage.fetch(interrupt)
    assert left_behind() == []
    assert guestimage.fetch()


def test_leftover_of_a_killed_fetch_is_cleared(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    (guestimage.cache_directory() / ".fetch-dead" / "download").mkdir(parents=True)
    guest = guestimage.fetch()
    assert left_behind() == [guest.version]


def test_incomplete_guest_is_not_offered_and_is_replaced(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    guest = guestimage.fetch()
    guest.busybox.unlink()
    assert guestimage.list_cached() == ()
    assert guestimage.fetch().busybox.exists()


def test_initramfs_of_other_scripts_is_packed_anew(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    guest = guestimage.fetch()
    guest.initramfs.rename(guest.initramfs.with_name("initramfs-0123456789abcdef.cpio"))
    assert guestimage.get() == guest
    assert [path.name for path in guest.kernel.parent.glob("*.cpio")] == [guest.initramfs.name]


def test_two_fetches_at_once_download_once(fake: FakeApt) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    guests: list[GuestImage] = []
    threads = [threading.Thread(target=lambda: guests.append(guestimage.fetch())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(guests) == 3
    assert fake.calls().count("download") == 1


def test_without_apt_the_way_out_is_named(fake: FakeApt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match=r"^apt-get: not found; .*pyhyve run --kernel FILE --initrd FILE$"):
        guestimage.get()


def test_unusable_cache_is_one_line(fake: FakeApt, tmp_path: Path) -> None:
    fake.publish("6.1.0-9", "6.1.9-1")
    (tmp_path / "cache").touch()
    assert guestimage.list_cached() == ()
    with pytest.raises(HostError, match=r"^guest cache .*Not a directory; make room there or set XDG_CACHE_HOME$"):
        guestimage.fetch()


def test_guests_are_removed_by_version_or_all(fake: FakeApt) -> None:
    assert guestimage.remove() == ()
    for number in ("9", "10", "11"):
        fake.publish(f"6.1.0-{number}", f"6.1.{number}-1")
        guestimage.fetch()
    with pytest.raises(UsageError, match=r"^guest 5: not in the cache; there are: 6\.1\.0-11-cloud-amd64_6\.1\.11-1, "):
        guestimage.remove("5")
    assert guestimage.remove("6.1.0-10-cloud-amd64_6.1.10-1") == ("6.1.0-10-cloud-amd64_6.1.10-1",)
    assert len(guestimage.remove()) == 2
    assert left_behind() == []


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert guestimage.cache_directory() == Path.home() / ".cache" / "pyhyve" / "guests"

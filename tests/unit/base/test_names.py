"""Names of running VMs: one holder each, none for ever."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from pyhyve.base.errors import HostError, UsageError
from pyhyve.base.names import NameLock, own_name, runtime_directory

HOLDER = """
import sys, time
from pathlib import Path
from pyhyve.base.names import NameLock
lock = NameLock(sys.argv[2], Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_second_vm_of_a_name_is_refused_in_one_line(tmp_path):
    first = NameLock("web", tmp_path)
    with pytest.raises(UsageError) as caught:
        NameLock("web", tmp_path)
    assert str(caught.value).startswith(f"--name web: a VM of this name is running (process {os.getpid()})")
    NameLock("db", tmp_path).release()
    first.release()
    first.release()
    NameLock("web", tmp_path).release()
    assert list((tmp_path / "lock").iterdir()) == []


def test_name_of_a_killed_process_is_taken_over(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), "web"], stdout=subprocess.PIPE, env=os.environ
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"process {holder.pid}"):
        NameLock("web", tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / "lock" / "web").exists(), "it had no chance to remove its file"
    NameLock("web", tmp_path).release()


def test_names_made_for_one_run_go_when_their_process_has_gone(tmp_path):
    mine = NameLock(own_name(tmp_path), tmp_path)
    place = tmp_path / "lock"
    gone = subprocess.Popen(["true"])
    gone.wait()
    (place / f"vm-{gone.pid}-abc").touch()
    (place / "vm-web").touch()
    NameLock("web", tmp_path).release()
    assert {path.name for path in place.iterdir()} == {mine.name, "vm-web"}
    mine.release()


def _contend(directory, results):
    held = 0
    for _ in range(50):
        try:
            lock = NameLock("web", directory)
        except UsageError:
            continue
        marker = directory / "marker"
        try:
            marker.mkdir()
            marker.rmdir()
            held += 1
        except OSError:
            held = -10_000
        lock.release()
    results.put(held)


def test_there_is_never_a_second_holder(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_contend, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    counts = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    results.close()
    assert min(counts) >= 0
    assert sum(counts) > 0


def test_runtime_directory_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = runtime_directory()
    assert path == tmp_path / "pyhyve"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    with pytest.raises(HostError, match="not a directory that only you can write"):
        runtime_directory()


def test_unwritable_place_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(HostError, match="set PYHYVE_RUN_DIR"):
        runtime_directory()


def test_symbolic_link_in_the_locks_place_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("keep me")
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "web").symlink_to(target)
    with pytest.raises(HostError, match="cannot lock"):
        NameLock("web", tmp_path)
    assert target.read_text() == "keep me"


def test_the_run_directory_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYHYVE_RUN_DIR", str(tmp_path / "mine"))
    assert runtime_directory() == tmp_path / "mine"
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("PYHYVE_RUN_DIR", "here")
    with pytest.raises(UsageError, match="PYHYVE_RUN_DIR=here: not an absolute path"):
        runtime_directory()

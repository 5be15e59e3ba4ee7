"""The client library: what it tells where there is no VM, or none that it understands."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest

from pyhyve.base.errors import HostError, UsageError
from pyhyve.base.names import NameLock
from pyhyve.bhyve.control.rpc import Method, Parameter
from pyhyve.bhyve.control.server import ControlNode
from pyhyve.libvmm import nodes
from pyhyve.libvmm.client import CallError, Client, running

DESCRIPTION = {
    "name": "web",
    "pid": 7,
    "state": "running",
    "ended_by": None,
    "cpus": 2,
    "topology": {"sockets": 1, "cores": 2, "threads": 1},
    "host_cpus": [[0], [0, 1]],
    "memory": 1 << 28,
    "processor": "bt",
    "made": 1.0,
}
HOLDER = """
import sys, time
from pathlib import Path
from pyhyve.base.names import NameLock
from pyhyve.bhyve.control.server import ControlNode
lock = NameLock(sys.argv[2], Path(sys.argv[1]))
node = ControlNode(lock.directory, lock.name, {})
node.start()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def vm(directory, name="web", protocol=1, **answers):
    """A node that answers to the version and what else is given."""
    table = {"version": Method(lambda: {"protocol": protocol}, "version")}
    table["describe"] = Method(lambda: {**DESCRIPTION, "name": name}, "describe")
    for method, answer in answers.items():
        table[method.replace("__", ".")] = Method(lambda answer=answer, **_: answer, "", {"irq": Parameter(int, "")})
    node = ControlNode(directory, name, table)
    node.start()
    try:
        yield node
    finally:
        node.close()


@contextmanager
def raw(directory, *answers):
    """A node that says just this, whatever it is asked."""
    (directory / "vmm").mkdir(exist_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(directory / "vmm" / "web"))
    server.listen()

    def serve():
        connection, _ = server.accept()
        with connection:
            for answer in answers:
                with suppress(OSError):  # it was not interested in more
                    connection.recv(65536)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join()
    server.close()


def test_description(tmp_path):
    with vm(tmp_path), Client("web", directory=tmp_path) as client:
        described = client.describe()
        assert (described.name, described.state, described.cpus) == ("web", "running", 2)
        assert (described.topology, described.host_cpus) == ({"sockets": 1, "cores": 2, "threads": 1}, [[0], [0, 1]])


def test_unknown_vm_has_a_suggestion(tmp_path):
    words = r"^wbe: no VM of this name is running; did you mean 'web'\?; there is db, web$"
    with vm(tmp_path), vm(tmp_path, "db"), pytest.raises(UsageError, match=words):
        Client("wbe", directory=tmp_path)


def test_unknown_vm_where_there_is_none(tmp_path):
    with pytest.raises(UsageError, match=r"^web: no VM of this name is running, nor any other"):
        Client("web", directory=tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/passwd"])
def test_what_is_no_name(tmp_path, name):
    with pytest.raises(UsageError, match="not a VM's name"):
        Client(name, directory=tmp_path)


def killed(directory, name="web"):
    """A node whose VM was killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), name], stdout=subprocess.PIPE, env=os.environ
    )
    assert holder.stdout.readline() == b"held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (directory / "vmm" / name).is_socket()


def test_killed_vm_is_told_of_and_its_node_removed(tmp_path):
    killed(tmp_path)
    with pytest.raises(nodes.Stale, match=r"^web: the VM has ended without a word"):
        Client("web", directory=tmp_path)
    assert list((tmp_path / "vmm").iterdir()) == []
    assert list((tmp_path / "lock").iterdir()) == []


def test_list_removes_what_killed_vms_left(tmp_path):
    killed(tmp_path, "db")
    with vm(tmp_path):
        assert [each.name for each in running(directory=tmp_path)] == ["web"]
        assert nodes.names(tmp_path) == ["web"]


def test_next_vm_of_the_name_takes_the_node_over(tmp_path):
    killed(tmp_path)
    lock = NameLock("web", tmp_path)
    with vm(tmp_path), Client("web", directory=tmp_path) as client:
        assert client.describe().name == "web"
    lock.release()


def test_node_of_a_vm_that_holds_its_name_is_not_removed(tmp_path):
    lock = NameLock("web", tmp_path)
    (tmp_path / "vmm").mkdir()
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "vmm" / "web"))
    dead.close()
    with pytest.raises(HostError, match="just beginning or ending"):
        Client("web", directory=tmp_path)
    assert (tmp_path / "vmm" / "web").exists()
    lock.release()


def test_other_version(tmp_path):
    with vm(tmp_path, protocol=2), pytest.raises(HostError, match=r"speaks version 2 .* this program 1"):
        Client("web", directory=tmp_path)


def test_older_server_lacks_a_method(tmp_path):
    with vm(tmp_path), Client("web", directory=tmp_path) as client, pytest.raises(CallError, match="older pyhyve"):
        client.statistics()


def test_answer_that_is_no_explanation(tmp_path):
    answers = vm(tmp_path, interrupts__explain={"a": 1})
    with answers, Client("web", directory=tmp_path) as client, pytest.raises(HostError, match="not an explanation"):
        client.explain(4)


@pytest.mark.parametrize(
    "answer", [b"nonsense\n", b"[]\n", b'{"id":1}\n', b'{"id":1,"result":4}\n', b'{"id":1,"error":{}}\n', b"", b"half"]
)
def test_node_that_talks_nonsense(tmp_path, answer):
    with raw(tmp_path, answer), pytest.raises(HostError, match=r"^web: "):
        Client("web", directory=tmp_path)


def test_node_that_says_nothing(tmp_path):
    with raw(tmp_path, b"", b""), pytest.raises(HostError, match=r"no answer in 0.2 s"):
        Client("web", directory=tmp_path, timeout=0.2)


def test_long_path(tmp_path):
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    with vm(directory), Client("web", directory=directory) as client:
        assert client.describe().pid == 7

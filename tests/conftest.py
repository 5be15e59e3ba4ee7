"""What tests of every kind share."""

import os
import signal

import pytest

from pyhyve.base.errors import HostError
from pyhyve.bhyve.boot import guestimage
from seedrows import pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401 (hooks)


def pytest_configure() -> None:
    """A shell's background job, or nohup, ignores signals, and so would every program that the tests start and end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def guest_image() -> guestimage.GuestImage:
    """A real guest, Debian's: from the user's cache, fetched if there is none. Where none can be had, tests that need
    it are skipped, but not in CI."""
    try:
        return guestimage.get()
    except HostError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))

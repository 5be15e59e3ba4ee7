"""Who is in the guest, and who waits for whom."""

import threading

import pytest

from pyhyve.vmm.memory.pmap import Pmap

HOST = 0x7F00_0000_0000


class Guest(threading.Thread):
    """A vCPU's thread: goes in and out until told to end; `kick` brings it out."""

    def __init__(self):
        super().__init__()
        self.pmap = Pmap(kick=self.kick)
        self.kicked = threading.Event()
        self.entered = threading.Event()
        self.ending = False
        self.inside = False
        self.generations = []

    def kick(self):
        if hasattr(self, "kicked"):
            self.kicked.set()

    def run(self):
        while not self.ending:
            generation = self.pmap.activate(0)
            self.inside = True
            if generation not in self.generations:
                self.generations.append(generation)
            self.entered.set()
            self.kicked.wait(5)
            self.kicked.clear()
            self.inside = False
            self.pmap.deactivate(0)


@pytest.fixture
def guest():
    guest = Guest()
    guest.start()
    assert guest.entered.wait(5)
    yield guest
    guest.ending = True
    guest.kick()
    guest.join()
    guest.pmap.close()


@pytest.mark.seed("S15")
def test_an_invalidation_kicks_the_guest_out_and_it_comes_back_with_the_new_generation(guest):
    guest.pmap.invalidate_all()
    assert guest.pmap.activity.wait_flushed(guest.pmap.eptgen, 5)
    guest.pmap.invalidate_all()
    assert guest.pmap.activity.wait_flushed(guest.pmap.eptgen, 5)
    with guest.pmap.activity.stopped():
        assert guest.generations[0] == 1
        assert guest.generations == sorted(guest.generations)


@pytest.mark.seed("S15")
def test_nobody_is_in_the_guest_while_it_is_stopped(guest):
    for _ in range(50):
        with guest.pmap.activity.stopped(), guest.pmap.activity.stopped():
            assert not guest.inside
    guest.entered.clear()
    assert guest.entered.wait(5)


@pytest.mark.seed("S15")
def test_waiting_for_a_vcpu_that_does_not_come_out_ends(guest):
    pmap = Pmap()
    assert pmap.activity.wait_flushed(1, 0)
    pmap.activate(3)
    pmap.invalidate_all()
    assert not pmap.activity.wait_flushed(pmap.eptgen, 0.01)
    pmap.deactivate(3)
    pmap.deactivate(3)
    assert pmap.activity.wait_flushed(pmap.eptgen, 0)
    pmap.close()


@pytest.mark.seed("S17")
def test_modified_is_exact_while_the_guest_is_stopped(guest):
    pmap = guest.pmap
    pmap.enter(0, HOST, 3, 1)
    pmap.wire(0, 4096)
    assert pmap.is_modified(0), "the guest may have written between our read and our store"
    pmap.clear_modified(0)
    with pmap.activity.stopped():
        pmap.wire(0, 4096, False)
        assert not pmap.is_modified(0)

"""Whether a connection would come to a listener of the relay itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relayd.core.own_listeners import OwnListeners

OWN = {"192.168.0.2", "fd00::2", "127.0.0.1"}
HOSTS = st.sampled_from(["192.168.0.2", "fd00::2", "0.0.0.0", "::"])


def own(host: str) -> bool:
    return host in OWN


def test_one_with_an_address_has_that_alone() -> None:
    listeners = OwnListeners()
    listeners.opens("192.168.0.2", 16000)
    assert listeners.has("192.168.0.2", 16000, own)
    assert not listeners.has("192.168.0.2", 80, own)
    assert not listeners.has("127.0.0.1", 16000, own)


def test_one_of_all_addresses_has_this_machine_s() -> None:
    listeners = OwnListeners()
    listeners.opens("0.0.0.0", 16000)
    assert listeners.has("192.168.0.2", 16000, own)
    assert listeners.has("127.0.0.1", 16000, own)
    assert not listeners.has("192.0.2.7", 16000, own), "another machine's"
    assert not listeners.has("192.168.0.2", 80, own)


@given(st.lists(st.tuples(HOSTS, st.integers(1, 2))))
def test_each_that_closes_leaves_the_others(opened: list[tuple[str, int]]) -> None:
    listeners = OwnListeners()
    for each in opened:
        listeners.opens(*each)
    for number, each in enumerate(opened):
        assert listeners.has(*each, own) or each[0] in ("0.0.0.0", "::")
        listeners.closes(*each)
        assert (each in listeners.opened) == (each in opened[number + 1 :])
    assert not listeners.opened
    listeners.closes("::", 1)
    assert not listeners.opened

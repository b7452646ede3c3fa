"""Who connects, and what they may do."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest

from relayd.control.peers import Right, Rights, peer_of
from relayd.control.steering import Asker


def test_the_kernel_says_who_it_is() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        found = peer_of(SimpleNamespace(socket=one))
    assert found == Asker(os.geteuid(), os.getegid(), os.getpid())
    assert str(found) == f"uid {os.geteuid()}, pid {os.getpid()}"


def test_a_socket_that_is_closed() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        one.close()
        with pytest.raises(OSError, match="descriptor"):
            peer_of(SimpleNamespace(socket=one))


@pytest.mark.parametrize(
    ("uid", "right"),
    [
        *((0, "change"), (499, "change"), (500, "change"), (501, "read")),
        *((502, "change"), (503, ""), (65534, ""), (2**32 - 1, "")),
    ],
)
def test_rights(uid: int, right: Right) -> None:
    """Of one who is in both lists, the more."""
    rights = Rights([500, 502], [501, 502], own=lambda: 499)
    assert rights.of(Asker(uid, 0, 1)) == right


def test_this_process_may_become_another_user() -> None:
    own = [0]
    rights = Rights(own=lambda: own[0])
    assert rights.of(Asker(33, 33, 1)) == ""
    own[0] = 33
    assert rights.of(Asker(33, 33, 1)) == "change"
    assert Rights().own() == os.geteuid()

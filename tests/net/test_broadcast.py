"""Which addresses are broadcasts."""

from __future__ import annotations

import errno
from unittest.mock import patch

import pytest

from relayd.net.broadcast import is_broadcast
from tests.datagrams.support import (
    problem,
)


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EACCES, None])
def test_what_is_a_broadcast(number: int | None) -> None:
    """EACCES may be a route's that prohibits it, and then is so again."""
    assert is_broadcast("127.255.255.255")
    assert not is_broadcast("127.0.0.1")
    assert not is_broadcast("::1")
    wrong = None if number is None else problem(number)
    with patch("relayd.net.broadcast.socket.socket") as made:
        made.return_value.__enter__.return_value.connect.side_effect = wrong
        assert not is_broadcast("192.0.2.255")
        # Of all networks, and of none that a route leads to.
        assert is_broadcast("255.255.255.255")

"""What splice(2) may say, and what a kernel is short of."""

from __future__ import annotations

import errno

import pytest
from twisted.internet.error import ConnectionLost

from relayd.net.transports import LOSSES
from relayd.plane.connection_base import EDGE_BOTH
from tests.support.pumping import LOTS, NOISE, Pump, Splices, pump, splices, tcp
from tests.support.standing import still

__all__ = ["pump", "splices", "still", "tcp"]


def test_a_source_that_has_nothing_to_splice_is_waited_for(
    tcp: Pump, splices: Splices
) -> None:
    """EAGAIN from the source: the next edge goes on, with the same pipe."""
    tcp.splice(tcp.client)
    tcp.settle()
    # That is what ended it: nothing is read in vain again and again.
    assert splices.moved[-1] == ("in", -errno.EAGAIN)
    calls = len(splices.moved)
    tcp.settle()
    assert len(splices.moved) == calls
    assert (tcp.pipes.users, tcp.pipes.in_use) == (1, 0)
    tcp.through(tcp.client, NOISE[:100_000])
    assert len(splices.moved) > calls


def test_a_sink_that_takes_nothing_yet_is_waited_for(
    tcp: Pump, splices: Splices
) -> None:
    """EAGAIN from the sink: what is in the pipe stays there until there is room."""
    client, server = tcp.client, tcp.server
    tcp.splice(client)
    got = len(server.peer.data)
    splices.refuse["out"] = [errno.EAGAIN]
    client.peer.socket.send(NOISE[:100_000])
    tcp.until(lambda: client.transport.blocked)
    read = client.told.read
    assert server.transport.unsent == read - got
    tcp.settle()
    assert client.told.read == read
    # The kernel, which has room, did not say so, as it did not refuse.
    tcp.plane.change_mask(server.transport.fileno(), EDGE_BOTH)
    tcp.take(server, got + 100_000)
    assert server.peer.data[got:] == NOISE[:100_000]
    assert tcp.plane.not_spliced == 0


#: What a kernel without splice(2) says, or a sandbox, or one that nobody knows.
REFUSALS = [
    errno.EINVAL,
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EIO,
    errno.EBADF,
    errno.ENOTTY,
]


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("where", ["in", "out"])
def test_a_socket_that_can_not_be_spliced_is_copied(
    where: str, number: int, pump: Pump, splices: Splices
) -> None:
    """By either side: asked once, counted, and what is in the pipe is kept."""
    splices.refuse[where] = [number] * 1000
    for _ in range(2):
        pump.client.peer.data.clear()
        pump.server.peer.data.clear()
        pump.send(pump.client, NOISE)
        assert pump.take(pump.server, LOTS) == NOISE
    failed = splices.moved.count((where, -number))
    assert failed == pump.plane.not_spliced == (1 if splices.moved else 0)
    assert (pump.pipes.users, pump.pipes.in_use) == (0, 0)
    # The end of data is none the less one.
    pump.client.peer.end()
    pump.until(lambda: "eof" in pump.client.events)
    assert not pump.client.protocol.lost


@pytest.mark.parametrize("number", REFUSALS)
def test_an_end_of_data_behind_a_refusal_is_no_loss(
    number: int, tcp: Pump, splices: Splices
) -> None:
    """It is there already when splice(2) is refused, by whatever errno."""
    tcp.splice(tcp.client)
    got = len(tcp.server.peer.data)
    tcp.client.transport.pauseProducing()
    tcp.client.peer.end()
    tcp.settle()
    splices.refuse["in"] = [number]
    tcp.client.transport.resumeProducing()
    tcp.until(lambda: tcp.client.events)
    assert tcp.client.events == ["eof"]
    assert len(tcp.server.peer.data) == got


@pytest.mark.parametrize("number", sorted(LOSSES))
def test_a_loss_that_splice_is_told_of_is_no_end_of_data(
    number: int, tcp: Pump, splices: Splices
) -> None:
    """The kernel tells of it once: to `recv` it looks like an end."""
    tcp.splice(tcp.client)
    tcp.client.transport.pauseProducing()
    tcp.client.peer.end()
    tcp.settle()
    splices.refuse["in"] = [number]
    tcp.client.transport.resumeProducing()
    tcp.until(lambda: tcp.client.events)
    assert tcp.client.events == ["lost"]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
@pytest.mark.parametrize("where", ["in", "out"])
def test_a_kernel_that_is_short_of_memory_is_asked_to_splice_again(
    where: str, number: int, tcp: Pump, splices: Splices
) -> None:
    splices.refuse[where] = [number]
    tcp.through(tcp.client, NOISE)
    assert tcp.plane.not_spliced == 1
    calls = len(splices.moved)
    tcp.through(tcp.client, NOISE)
    assert splices.total("out") > 0
    assert len(splices.moved) > calls


@pytest.mark.cost
def test_a_socket_that_can_not_be_spliced_is_not_asked_again(
    tcp: Pump, splices: Splices
) -> None:
    """A test of cost.  Not after its own full reads either."""
    splices.refuse["out"] = [errno.EINVAL] * 1000
    for _ in range(3):
        for side in (tcp.client, tcp.server):
            tcp.send(side, NOISE)
    assert tcp.take(tcp.client, 3 * LOTS) == NOISE * 3
    assert tcp.take(tcp.server, 3 * LOTS) == NOISE * 3
    assert len([each for each in splices.moved if each[1] < 0]) <= 2
    assert tcp.plane.not_spliced <= 2


def test_what_was_in_the_pipe_of_a_sink_that_can_not_be_spliced_is_first(
    tcp: Pump, splices: Splices
) -> None:
    """Before what was written to it meanwhile, and before what is read later."""
    sent, read = tcp.fill_pipe(tcp.client)
    tcp.server.transport.write(b"a word of ours")
    splices.refuse["out"] = [errno.EINVAL]
    got = tcp.take(tcp.server, sent + 14)
    assert got == NOISE[:read] + b"a word of ours" + NOISE[read:sent]
    assert tcp.plane.not_spliced == 1


@pytest.mark.parametrize("refused", [None, errno.EPERM])
def test_a_sink_whose_peer_is_gone_is_lost(
    refused: int | None, tcp: Pump, splices: Splices
) -> None:
    """Whoever is told of it first, splice or `send`; the pipe is closed.

    What its peer had sent is relayed before that is told.
    """
    client, server = tcp.client, tcp.server
    tcp.fill_pipe(client)
    server.peer.socket.send(b"last words")
    server.peer.reset()
    if refused is not None:
        splices.refuse["out"] = [refused]
    tcp.until(lambda: server.protocol.lost)
    assert splices.moved[-1][0] == "out"
    assert splices.moved[-1][1] < 0
    assert server.why is ConnectionLost
    assert tcp.take(client, 10) == b"last words"
    assert tcp.plane.not_spliced == 0
    # What it can't be given any more is not kept.
    assert (server.transport.unsent, tcp.pipes.in_use) == (0, 0)
    # The other side is somebody else's to end.
    assert client.events == []
    assert not client.transport.blocked


@pytest.mark.parametrize("refused", [None, *REFUSALS])
def test_a_source_that_is_reset_while_splicing_is_lost(
    refused: int | None, tcp: Pump, splices: Splices
) -> None:
    """Whoever is told of it first, splice or `recv`: never as an end of data."""
    client, server = tcp.client, tcp.server
    tcp.splice(client)
    tcp.settle()
    client.peer.reset()
    if refused is not None:
        splices.refuse["in"] = [refused]
    tcp.until(lambda: client.protocol.lost)
    assert splices.moved[-1][0] == "in"
    assert client.events == ["lost"]
    assert client.why is ConnectionLost
    assert server.events == []
    assert len(server.peer.data) == client.told.read
    assert tcp.plane.not_spliced == 0

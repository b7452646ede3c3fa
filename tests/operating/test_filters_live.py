"""Filters of living relays: put on, taken off and looked into, over real sockets."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from relayd.control.steering import Conflict, SessionQuery, Unknown
from relayd.operating.capturing import ENOUGH
from tests.operating.test_changes_live import Ends, relaying, web
from tests.support.process import TRANSPORTS
from tests.support.steered import ME, at, whole

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)


#: A relay whose clients say a header first, and are not relayed before.
LATER = {"accept_proxy": ["127.0.0.0/8"]}
HEADER = b"PROXY UNKNOWN\r\n"


def connect(ends: Ends, port: int = 20001) -> socket.socket:
    """A client that may say several things in a row: nothing waits for an ACK."""
    client = ends.client(port)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def bulk(ends: Ends, one: socket.socket, other: socket.socket) -> None:
    """Much is said: more than what is copied before a direction is spliced."""
    left, heard = memoryview(BULK), bytearray()
    one.setblocking(False)
    other.setblocking(False)

    def all_of_it() -> bool:
        nonlocal left
        with suppress(BlockingIOError):
            left = left[one.send(left) :]
        with suppress(BlockingIOError):
            heard.extend(other.recv(1 << 20))
        return len(heard) >= len(BULK)

    ends.relayd.reactor.until(all_of_it, "bulk")
    one.setblocking(True)


BULK = bytes(range(256)) * 4096


def comes(ends: Ends) -> Any:
    """The client that has come, and no other is there."""
    factory = ends.relayd.served("web")
    ends.relayd.reactor.until(lambda: len(factory.registry), "a client")
    [protocol] = factory.registry.living()
    return protocol


def rows(ends: Ends) -> list[Any]:
    """The filters of each session, the oldest first."""
    found = whole(ends.relayd.steered.sessions(SessionQuery()))["sessions"]
    return [each["filters"] for each in sorted(found, key=lambda each: each["id"])]


def spliced(ends: Ends) -> int:
    """Bytes that the kernel has moved, of the sessions that live."""
    return sum(
        each.session.up.spliced + each.session.down.spliced
        for shown in ends.relayd.steered._shown()
        for factory, _ in shown.generations
        for each in factory.registry.living()
    )


def dropped(ends: Ends, sock: Any, other: Any) -> None:
    """What one says, the other does not hear: a fault drops it."""
    sock.sendall(b"lost")
    ends.relayd.reactor.turn(20)
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(10)


def test_faults_are_put_on_sessions_that_go_on_and_taken_off(
    tmp_path: Path, kind: str
) -> None:
    """Whenever they have begun; and a session has the same after a reload."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        sessions = []
        for idle in (60, 70, 80):
            ends.relayd.set("web", idle_timeout=idle)
            client = connect(ends)
            sessions.append((client, ends.accept(server)))
            ends.talk(*sessions[-1])
        ends.relayd.set("web", filter=["timeout:timeout=0", "slow_close:0"])
        assert rows(ends) == [["timeout", "slow_close"]] * 3
        for client, upstream in sessions:
            dropped(ends, upstream, client)
            ends.pass_on(client, upstream, b"up")
        # It is a run-time change as any other.
        [change] = ends.relayd.steered.diff()["changes"][1:]
        assert change["now"] == ["timeout:timeout=0", "slow_close:0"]
        ends.relayd.set("web", filter="slow_close:0")
        assert rows(ends) == [["slow_close"]] * 3
        for each in sessions:
            ends.talk(*each)
        ends.relayd.reload(discard=True)
        assert rows(ends) == [[]] * 3
        before = spliced(ends)
        for client, upstream in sessions:
            bulk(ends, client, upstream)
        assert kind == "twisted" or spliced(ends) > before + len(BULK)


def test_one_that_is_not_relayed_yet_as_faults_change(
    tmp_path: Path, kind: str
) -> None:
    """It has those that its relay has once it is relayed: once each."""
    with relaying(tmp_path, kind, tcp=web(filter="timeout:timeout=0", **LATER)) as ends:
        server = ends.server(20009)
        client = connect(ends)
        assert not comes(ends).bridge
        ends.relayd.set("web", filter=["slow_close:0"])
        client.sendall(HEADER)
        upstream = ends.accept(server)
        ends.talk(client, upstream)
        assert rows(ends) == [["slow_close"]]


def test_of_a_relay_that_is_stopped(tmp_path: Path, kind: str) -> None:
    """Its sessions go on, with faults as those of others."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        client = connect(ends)
        upstream = ends.accept(server)
        ends.relayd.do("stop", "web")
        ends.relayd.set("web", filter="timeout:timeout=0")
        dropped(ends, upstream, client)
        ends.relayd.set("web", filter=[])
        ends.talk(client, upstream)


def test_other_relays_are_left_alone(tmp_path: Path, kind: str) -> None:
    other = {"listen": at(20002), "dest": at(20009)}
    with relaying(tmp_path, kind, tcp={**web(), "db": other}) as ends:
        server = ends.server(20009)
        connect(ends, 20002)
        ends.accept(server)
        connect(ends)
        ends.accept(server)
        ends.relayd.set("web", filter="timeout:timeout=0")
        assert rows(ends) == [[], ["timeout"]]


# -- captures


class Client:
    """Takes a capture, as the control socket does.

    :ivar why: it has ended.
    """

    def __init__(self, *, slow: bool = False) -> None:
        self.slow = slow
        self.blocks: list[bytes] = []
        self.why = ""

    def give(self, block: bytes) -> bool:
        if not self.slow:
            self.blocks.append(block)
        return not self.slow

    def end(self, why: str, last: bytes = b"") -> None:
        if not self.why:
            self.why = why
            self.blocks.append(last)


def capture(ends: Ends, most_bytes: int | None = None) -> tuple[Any, Client]:
    [session] = whole(ends.relayd.steered.sessions(SessionQuery()))["sessions"]
    stream = ends.relayd.steered.capture(session["id"], most_bytes, ME)
    client = Client()
    stream.begin(client)
    return stream, client


def test_a_session_is_captured_and_splices_again(tmp_path: Path, kind: str) -> None:
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        client = connect(ends)
        upstream = ends.accept(server)
        bulk(ends, client, upstream)
        before = spliced(ends)
        assert kind == "twisted" or before
        stream, reader = capture(ends)
        assert rows(ends) == [["capture"]]
        bulk(ends, client, upstream)
        ends.pass_on(client, upstream, b"question")
        ends.pass_on(upstream, client, b"the answer")
        # It is seen, and not spliced.
        assert spliced(ends) == before
        seen = b"".join(reader.blocks)
        assert b"question" in seen
        assert b"the answer" in seen
        stream.stop("its client has left")
        assert reader.why == "its client has left"
        assert reader.blocks[-1][:4] == b"\x05\0\0\0"
        assert rows(ends) == [[]]
        bulk(ends, client, upstream)
        assert kind == "twisted" or spliced(ends) > before


def test_a_capture_ends_with_its_bytes(tmp_path: Path, kind: str) -> None:
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        client = connect(ends)
        upstream = ends.accept(server)
        _, reader = capture(ends, 5)
        ends.pass_on(client, upstream, b"123")
        ends.pass_on(upstream, client, b"1234567")
        assert not reader.why
        ends.pass_on(client, upstream, b"45678")
        assert reader.why == ENOUGH
        ends.talk(client, upstream)
        assert rows(ends) == [[]]


def test_a_capture_ends_with_its_session(tmp_path: Path, kind: str) -> None:
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        client = connect(ends)
        upstream = ends.accept(server)
        stream, reader = capture(ends)
        ends.pass_on(client, upstream, b"bye")
        client.close()
        upstream.close()
        ends.relayd.reactor.until(lambda: reader.why, "its end")
        assert reader.why == "the session has ended (done)"
        # As the site does if its client leaves at the same time.
        stream.stop("its client has left")


def test_the_session_waits_for_no_reader(tmp_path: Path, kind: str) -> None:
    """What is missing is counted in the last block, which comes in any case."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        client = connect(ends)
        upstream = ends.accept(server)
        stream, reader = capture(ends)
        reader.slow = True
        before = len(reader.blocks)
        ends.talk(client, upstream)
        assert len(reader.blocks) == before
        stream.stop("its client has left")
        assert len(reader.blocks) == before + 1
        assert reader.blocks[-1][:4] == b"\x05\0\0\0"


def test_captures_of_one_session_at_once(tmp_path: Path, kind: str) -> None:
    """Two operators see the same; one that leaves takes nothing from the other."""
    with relaying(tmp_path, kind, tcp=web()) as ends:
        server = ends.server(20009)
        client = connect(ends)
        upstream = ends.accept(server)
        (one, first), (_, second) = capture(ends), capture(ends)
        one.stop("its client has left")
        ends.pass_on(client, upstream, b"question")
        assert b"question" not in b"".join(first.blocks)
        assert b"question" in b"".join(second.blocks)


def test_a_capture_is_stopped_while_its_session_ends(tmp_path: Path, kind: str) -> None:
    """The session waits for what a filter holds, and its filters change no more."""
    with relaying(tmp_path, kind, tcp=web(filter="latency:1h,direction=up")) as ends:
        server = ends.server(20009)
        client = connect(ends)
        ends.accept(server)
        protocol = comes(ends)
        stream, reader = capture(ends)
        client.sendall(b"held")
        ends.relayd.reactor.until(lambda: protocol.session.up.read, "what is held")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        ends.relayd.reactor.until(lambda: protocol.session.ending, "its end")
        assert not reader.why
        stream.stop("its client has left")
        assert reader.why == "its client has left"


@pytest.mark.parametrize("problem", [TypeError("a bridge of one's own"), None])
def test_one_that_takes_no_filter(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, problem: Any
) -> None:
    """As of a program that joins in a way of its own; or it has passed on all.

    That it is captured to a file makes no difference.
    """

    def change(*_: Any) -> None:
        if problem is not None:
            raise problem

    to_a_file = f"capture:{tmp_path}/web.pcapng"
    with relaying(tmp_path, kind, tcp=web(filter=to_a_file)) as ends:
        server = ends.server(20009)
        connect(ends)
        ends.accept(server)
        monkeypatch.setattr(type(comes(ends)), "change_filters", change)
        why = "a bridge of one's own" if problem else "is being closed"
        with pytest.raises(Conflict, match=why):
            capture(ends)


def test_a_session_that_can_not_be_captured(tmp_path: Path, kind: str) -> None:
    udp = {"dns": {"listen": at(20003), "dest": at(20009)}}
    with relaying(tmp_path, kind, tcp=web(**LATER), udp=udp) as ends:
        steered = ends.relayd.steered
        server = ends.server(20009)
        with pytest.raises(Unknown, match="there is no session 987654321"):
            steered.capture(987654321, None, ME)
        client = connect(ends)
        protocol = comes(ends)
        ident = protocol.session.id
        why = f"session {ident} is not relayed yet: it is header"
        with pytest.raises(Conflict, match=why):
            steered.capture(ident, None, ME)
        client.sendall(HEADER)
        ends.accept(server)
        ends.relayd.reactor.until(lambda: protocol.bridge, "both")
        stream = steered.capture(ident, None, ME)
        whole(steered.kill([ident], None, None, None, ME))
        with pytest.raises(Conflict, match=f"session {ident} is being closed"):
            stream.begin(Client())

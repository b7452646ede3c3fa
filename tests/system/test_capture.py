"""Captures as tshark reads them: which packets are there, and what they have said.

tshark reassembles each stream, checks every checksum, and says what looks wrong in the
order of sequence numbers (`tcp.analysis`).
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.filtering import SPLICE, Course
from relayd.core.session import Ending
from relayd.filters.capture import Capture
from relayd.filters.live_capture import LiveCapture
from tests.support.captured import COURSES, Captured
from tests.support.process import Server, connect, read_all, relay
from tests.system.programs import program, run
from tests.test_examples import EXAMPLES

pytestmark = pytest.mark.system

FIELDS = (
    *("tcp.stream", "ip.src", "ipv6.src", "tcp.srcport", "tcp.flags", "tcp.payload"),
    *("tcp.analysis.flags", "tcp.checksum.status", "ip.checksum.status"),
    *("tcp.analysis.lost_segment", "frame.comment"),
)

SYN, ACK, FIN, RST = 2, 16, 1, 4

CLIENTS = ["192.0.2.1:{}", "[2001:db8::1]:{}", "unix:/run/c", "-"]
SERVERS = ["198.51.100.1:7", "[2001:db8:f::1]:7", "db.example:7777", "unix:/run/s"]
ENDINGS = [Ending.DONE, Ending.DONE, Ending.DOWNSTREAM_RESET, Ending.UPSTREAM_RESET]


class Streams:
    """What tshark finds in a file.

    :ivar said: of each stream, by direction.
    :ivar finished: which directions have a FIN, in their order.
    :ivar reset: whether there is a RST.
    :ivar comments: all of them, by stream.
    :ivar lost: how many segments are missing, it says.
    """

    def __init__(self, path: Path, *, gaps: bool = False) -> None:
        self.said: dict[int, dict[str, list[str]]] = {}
        self.finished: dict[int, list[str]] = defaultdict(list)
        self.reset: set[int] = set()
        self.comments: dict[int, list[str]] = defaultdict(list)
        self.lost = 0
        clients: dict[int, tuple[str, ...]] = {}
        for line in self._lines(path):
            stream, v4, v6, port, flags, data, odd, tcp, ip, lost, comment = line
            number, bits, source = int(stream), int(flags, 16), (v4, v6, port)
            assert tcp == "1", "a checksum of TCP"
            assert ip == ("1" if v4 else ""), "a checksum of IPv4"
            if not gaps:
                assert not odd
            self.lost += bool(lost)
            if bits & SYN and not bits & ACK:
                assert number not in clients
                clients[number] = source
                self.said[number] = {"up": [], "down": []}
            course = "up" if clients[number] == source else "down"
            self.said[number][course].append(data)
            if bits & FIN:
                self.finished[number].append(course)
            if bits & RST:
                self.reset.add(number)
            if comment:
                self.comments[number].append(comment)

    @staticmethod
    def _lines(path: Path) -> Iterator[list[str]]:
        wanted = [each for field in FIELDS for each in ("-e", field)]
        options = [
            *("-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"),
            # Random bytes are no protocol of a port, whatever they look like.
            *("-d", "tcp.port==0-65535,data"),
        ]
        tshark = [program("tshark"), "-n", "-r", str(path), "-T", "fields"]
        text = run(*tshark, *wanted, *options)
        for line in text.splitlines():
            yield line.split("\t")

    def bytes_of(self, number: int, course: Course) -> bytes:
        """What a side has said."""
        return bytes.fromhex("".join(self.said[number][course]))


def test_a_thousand_sessions(tmp_path: Path) -> None:
    """At once and one after the other, with every kind of ends, chunks and endings."""
    path, clock, chance = tmp_path / "c.pcapng", Clock(), random.Random(21)
    factory = Capture(str(path), size=1 << 30)
    living: list[tuple[Captured, dict[Course, bytes], Ending]] = []
    wanted: list[tuple[Captured, dict[Course, bytes], Ending]] = []
    number = 0
    while number < 1000 or living:
        clock.advance(chance.choice([0, 1e-6, 0.01]))
        if number < 1000 and (len(living) < 5 or chance.random() < 0.2):
            number += 1
            client = chance.choice(CLIENTS).format(40_000 + number)
            server = chance.choice(SERVERS)
            one = Captured(factory, clock, number, client=client, upstream=server)
            wanted.append((one, {"up": b"", "down": b""}, chance.choice(ENDINGS)))
            living.append(wanted[-1])
            continue
        one, said, ending = chance.choice(living)
        course = chance.choice(COURSES)
        if chance.random() < 0.2:
            living = [each for each in living if each[0] is not one]
            if ending is Ending.DONE:
                one.end()
            else:
                one.close(ending)
        elif chance.random() < 0.05 and len(one.filters) == 2:
            # A half-close.
            made = one.filters.pop(course)
            made.end()
            made.close()
        elif course in one.filters:
            size = chance.choice([1, 7, 1460, 4096, 32768, 65536])
            data = chance.randbytes(chance.randint(1, size))
            one.say(course, data)
            said[course] += data
    found = Streams(path)
    assert len(found.said) == 1000
    for stream, (_, said, ending) in enumerate(wanted):
        for course in COURSES:
            assert found.bytes_of(stream, course) == said[course]
        assert (stream in found.reset) == (ending is not Ending.DONE)
        if ending is Ending.DONE:
            assert sorted(found.finished[stream]) == ["down", "up"]
        assert found.comments[stream][0].startswith(f"session={stream + 1} ")


@contextmanager
def echoing(count: int) -> Iterator[Server]:
    """A server that answers clients with what they have said, from its end."""

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.sendall(read_all(connection)[::-1])

    def accept() -> None:
        for _ in range(count):
            threading.Thread(target=serve, args=[server.accept()]).start()

    with Server() as server:
        thread = threading.Thread(target=accept)
        thread.start()
        yield server
        thread.join()


@pytest.mark.usefixtures("connections_of")
def test_sessions_of_a_relay(tmp_path: Path) -> None:
    path, chance = tmp_path / "c.pcapng", random.Random(21)
    sent: dict[str, bytes] = {}
    with (
        echoing(60) as server,
        relay(
            *("--listen", "127.0.0.1:0", "--dest", server.address),
            *("--filter", f"capture:{path}"),
        ) as running,
    ):
        port = running.port

        def speak(data: bytes) -> None:
            with connect(port) as client:
                client.settimeout(30)
                sent["{}:{}".format(*client.getsockname())] = data
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == data[::-1]

        for _ in range(6):
            threads = [
                threading.Thread(
                    target=speak,
                    args=[chance.randbytes(chance.choice([1, 999, 90_000]))],
                )
                for _ in range(10)
            ]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        running.ended("done", 60)
        running.signal()
        running.wait()
    found = Streams(path)
    assert len(found.said) == len(sent) == 60
    for stream, [comment] in found.comments.items():
        [client] = [each[7:] for each in comment.split() if each.startswith("client=")]
        assert found.bytes_of(stream, "up") == sent[client]
        assert found.bytes_of(stream, "down") == sent[client][::-1]
        assert found.finished[stream] == ["up", "down"]
    assert not found.reset


def test_a_live_capture_whose_reader_is_slow(tmp_path: Path) -> None:
    """tshark says what is missing: a segment, and how many in the statistics."""
    path, clock, taken = tmp_path / "c.pcapng", Clock(), [True]
    with path.open("wb") as file:

        def take(block: bytes) -> bool:
            if taken[0]:
                file.write(block)
            return taken[0]

        factory: Any = LiveCapture(take, most_bytes=100_000)
        one = Captured(factory, clock)
        one.say("up", b"GET /")
        taken[0] = False
        one.say("down", b"x" * 50_000)
        taken[0] = True
        assert one.say("down", b"y" * 50_000) is SPLICE
        one.end()
    found = Streams(path, gaps=True)
    assert found.lost == 1
    assert found.bytes_of(0, "up") == b"GET /"
    assert found.bytes_of(0, "down") == b"y" * 50_000
    about = run(program("capinfos"), path)
    assert "Number of stat entries = 1" in about


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    if os.geteuid():
        pytest.skip("only root may mount one")
    place = tmp_path / "disk"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    yield place
    run("umount", place)


@pytest.mark.usefixtures("connections_of")
def test_a_disk_that_fills_up_ends_the_capture_and_no_session(small_disk: Path) -> None:
    path, data = small_disk / "c.pcapng", random.Random(21).randbytes(3_000_000)
    with (
        echoing(1) as server,
        relay(
            *("--listen", "127.0.0.1:0", "--dest", server.address),
            *("--filter", f"capture:{path}"),
        ) as running,
        connect(running.port) as client,
    ):
        client.settimeout(30)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == data[::-1]
        [session] = running.ended("done")
        assert session["up"] == session["down"] == "3000000"
        [line] = running.wait_for("the capture to")
        assert f"{path} has ended: No space left on device" in line.string
    found = Streams(path)
    said = found.bytes_of(0, "up")
    assert 700_000 < len(said) < 1 << 20
    assert data.startswith(said)


@pytest.mark.usefixtures("connections_of")
def test_tshark_follows_a_stream_while_it_goes_on(tmp_path: Path) -> None:
    """The file is whole after each turn: who reads it meanwhile sees all of it."""
    path = tmp_path / "c.pcapng"
    with (
        Server() as server,
        relay(
            *("--listen", "127.0.0.1:0", "--dest", server.address),
            *("--filter", f"capture:{path}"),
        ) as running,
        connect(running.port) as client,
    ):
        client.sendall(b"question")
        with server.accept() as upstream:
            assert upstream.recv(100) == b"question"
            upstream.sendall(b"answer")
            assert client.recv(100) == b"answer"
            follow = ["-q", "-z", "follow,tcp,ascii,0"]
            text = run(program("tshark"), *follow, "-r", path)
    assert "question" in text
    assert "answer" in text


def test_a_client_that_comes_again_from_its_port(tmp_path: Path) -> None:
    """Two streams, and not one whose numbers are wrong."""
    path, clock = tmp_path / "c.pcapng", Clock()
    factory = Capture(str(path))
    for number in 1, 2:
        one = Captured(factory, clock, number, client="192.0.2.1:4000")
        one.say("up", b"%d" % number)
        one.end() if number == 2 else one.close(Ending.KILLED)
    found = Streams(path, gaps=True)
    assert [found.bytes_of(each, "up") for each in (0, 1)] == [b"1", b"2"]
    assert not found.lost


def test_one_client_whose_sessions_a_route_has_captured(tmp_path: Path) -> None:
    """The example: what others say is not there."""
    path = tmp_path / "one.pcapng"
    environment = {
        "PYTHONPATH": str(EXAMPLES),
        "CAPTURE": "127.0.0.2",
        "CAPTURE_FILE": str(path),
    }
    with Server() as server:
        args = ("-l", "127.0.0.1:0", "-d", server.address)
        route = ("--route", "capture_one_client:route")
        with relay(*args, *route, env=environment) as running:
            for host, said in (("127.0.0.2", b"one"), ("127.0.0.3", b"two")) * 2:
                there = ("127.0.0.1", running.port)
                with socket.create_connection(there, 10, (host, 0)) as client:
                    client.sendall(said)
                    client.shutdown(socket.SHUT_WR)
                    with server.accept() as upstream:
                        assert read_all(upstream) == said
                        upstream.sendall(b"answer")
                    assert read_all(client) == b"answer"
            running.ended("done", 4)
            running.signal()
            running.wait()
    found = Streams(path)
    assert len(found.said) == 2
    for number in found.said:
        assert found.bytes_of(number, "up") == b"one"
        assert found.bytes_of(number, "down") == b"answer"
        assert all("client=127.0.0.2:" in each for each in found.comments[number])

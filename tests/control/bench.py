"""A control site on fakes, with a still clock."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.main import CONNECTION_DONE
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from relayd.control.peers import Rights
from relayd.control.site import ControlSite
from relayd.control.steering import Asker
from tests.control.fake_steering import FakeSteering

#: Those who may do all, see all, and nothing.
OPERATOR, READER, STRANGER = 500, 501, 502


class Transport(StringTransport):
    """Keeps what it is told."""

    aborted = False

    def __init__(self, uid: int) -> None:
        super().__init__()
        self.uid = uid

    def abortConnection(self) -> None:
        self.aborted = True
        self.disconnected = True


class Client:
    """One connection."""

    def __init__(self, bench: Bench, uid: int) -> None:
        self._bench = bench
        self.transport = Transport(uid)
        self.channel: Any = bench.site.buildProtocol(None)
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        """Send; nothing is taken of a connection that is being closed."""
        if not (self.transport.disconnecting or self.transport.aborted):
            self.channel.dataReceived(data)
            self._bench.turns()

    @property
    def said(self) -> bytes:
        return self.transport.value()

    @property
    def gone(self) -> bool:
        return self.transport.aborted or self.transport.disconnecting

    def leave(self) -> None:
        self.channel.connectionLost(Failure(CONNECTION_DONE))


class Answer:
    """What an answer said."""

    def __init__(self, raw: bytes) -> None:
        head, _, rest = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {
            name.lower(): value for name, value in (each.split(": ") for each in lines)
        }
        self.body, self.rest = _body(self.headers, rest)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The only one."""
        [problem] = self.json["problems"]
        assert set(self.json) == {"problems"}
        return str(problem)


def _body(headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes]:
    if headers.get("transfer-encoding") != "chunked":
        length = int(headers.get("content-length", len(rest)))
        return rest[:length], rest[length:]
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        chunk, rest = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        body += chunk
        if not chunk:
            return body, rest


class Bench:
    """A site."""

    def __init__(self, sessions: int = 3) -> None:
        self.clock = Clock()
        self.steering = FakeSteering(sessions)
        rights = Rights([OPERATOR], [READER], own=lambda: 499)
        self.site = ControlSite(
            self.steering,
            self.clock,
            rights,
            peer=lambda transport: Asker(transport.uid, 1, 4711),
            secrets=["userid"],
        )
        self.clients: list[Client] = []

    def client(self, uid: int = OPERATOR) -> Client:
        made = Client(self, uid)
        self.clients.append(made)
        return made

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        uid: int = OPERATOR,
        **headers: str,
    ) -> Answer:
        """A request of a new connection, and its answer."""
        client = self.client(uid)
        client.send(request(method, path, body, **headers))
        answer = Answer(client.said)
        client.leave()
        self.clients.remove(client)
        return answer

    def turn(self) -> None:
        """What is due is called, but not what is asked for meanwhile."""
        now = self.clock.seconds()
        for call in [each for each in self.clock.calls if each.getTime() <= now]:
            if call.active():
                self.clock.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)

    def turns(self, count: int = 60) -> None:
        for _ in range(count):
            self.turn()

    def over(self) -> None:
        """Nothing is left."""
        self.site.close()
        for each in self.clients:
            each.leave()
        assert not self.site.channels
        assert not self.site.exchanges.answers.under_way
        assert not self.site.exchanges.streams.under_way
        assert not self.clock.getDelayedCalls()


def request(method: str, path: str, body: Any = None, **headers: str | None) -> bytes:
    """The text of a request.

    :param body: as it is, or made JSON of.
    :param headers: with underscores; None: without one that there would be.
    """
    own: dict[str, str | None] = {"host": "localhost"}
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        own |= {"content_type": "application/json", "content_length": str(len(data))}
    lines = [
        f"{name.replace('_', '-')}: {value}\r\n"
        for name, value in (own | headers).items()
        if value is not None
    ]
    head = f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n"
    return head.encode("latin-1") + data

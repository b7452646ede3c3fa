"""What name servers say, asked over loopback."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import fail, succeed
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs
from twisted.names import dns, server
from twisted.names.common import ResolverBase
from twisted.names.error import DNSNameError
from twisted.protocols.basic import Int16StringReceiver

from relayd.net.dns import Answer, Found, LookUpFailed, NameServers, name_servers
from tests.conftest import LoggedFailures
from tests.support.ports import free_port


class Zone(ResolverBase):
    """A name server's records, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Any] = {}

    def _lookup(self, name: bytes, cls: int, kind: int, timeout: Any) -> Any:
        found = self.records.get(name.decode(), DNSNameError())
        if isinstance(found, Exception):
            return fail(found)
        return succeed(
            (
                [
                    dns.RRHeader(name, one.TYPE, dns.IN, one.ttl, one, auth=True)
                    for one in found
                    if kind in (one.TYPE, dns.ALL_RECORDS) or one.TYPE == dns.CNAME
                ],
                [],
                [],
            )
        )


@pytest.fixture
def zone() -> Iterator[Zone]:
    made = Zone()
    listening: Any = reactor
    protocol = dns.DNSDatagramProtocol(server.DNSServerFactory(clients=[made]))
    made.port = listening.listenUDP(0, protocol, interface="127.0.0.1")  # type: ignore[attr-defined]
    yield made
    made.port.stopListening()  # type: ignore[attr-defined]
    # The sockets of queries are closed in the turn after their answers.
    pytest_twisted.blockon(deferLater(listening, 0))


@pytest.fixture
def asked(zone: Zone) -> NameServers:
    port = zone.port.getHost().port  # type: ignore[attr-defined]
    return NameServers(reactor, [("127.0.0.1", port)])


@pytest_twisted.inlineCallbacks
def test_the_addresses_of_a_name(zone: Zone, asked: NameServers) -> Any:
    zone.records["db.test"] = [
        dns.Record_A("10.0.0.1", ttl=40),
        dns.Record_A("10.0.0.2", ttl=30),
        dns.Record_AAAA("2001:db8::1", ttl=50),
        # As sockets show it.
        dns.Record_AAAA("::ffff:c000:201", ttl=50),
    ]
    answer = yield asked.host("db.test", 5432)
    hosts = ("10.0.0.1", "10.0.0.2", "2001:db8::1", "::ffff:192.0.2.1")
    assert answer == Answer([Found(each, 5432) for each in hosts], 30.0)


@pytest_twisted.inlineCallbacks
def test_a_look_up_logs_nothing(zone: Zone, asked: NameServers) -> Any:
    zone.records["db.test"] = [dns.Record_A("10.0.0.1", ttl=1)]
    with capturedLogs() as events:
        yield asked.host("db.test", 5432)
        for name in ("no.test", "db.test"):
            yield asked.host(name, 5432)
    said = [str(each.get("log_text")) for each in events]
    assert not [each for each in said if "starting" in each or "Closed" in each]


@pytest_twisted.inlineCallbacks
def test_a_name_without_an_address_and_no_name(zone: Zone, asked: NameServers) -> Any:
    zone.records["mail.test"] = [dns.Record_MX(name="m.test", ttl=30)]
    empty = yield asked.host("mail.test", 80)
    missing = yield asked.host("no.test", 80)
    assert not empty.found
    assert not missing.found
    assert (empty.why, missing.why) == ("it has no address", "there is no such name")


@pytest.mark.parametrize("fails", [dns.A, dns.AAAA])
@pytest_twisted.inlineCallbacks
def test_name_servers_that_fail_for_one_family(
    zone: Zone,
    asked: NameServers,
    fails: int,
    monkeypatch: pytest.MonkeyPatch,
    logged_failures: LoggedFailures,
) -> Any:
    """What is known of the other one is told."""
    look_up = zone._lookup

    def half(name: bytes, cls: int, kind: int, timeout: Any) -> Any:
        if kind == fails:
            return fail(OSError("broken"))
        return look_up(name, cls, kind, timeout)

    monkeypatch.setattr(zone, "_lookup", half)
    zone.records["db.test"] = [
        *(dns.Record_A("10.0.0.1", ttl=9), dns.Record_AAAA("2001:db8::1", ttl=9))
    ]
    zone.records["_db._tcp.test"] = [dns.Record_SRV(0, 1, 80, "db.test", ttl=9)]
    with pytest.raises(LookUpFailed, match="the name servers have failed") as caught:
        yield asked.host("db.test", 80)
    known = "10.0.0.1" if fails == dns.AAAA else "2001:db8::1"
    assert caught.value.half == [Found(known, 80)]
    with pytest.raises(LookUpFailed, match="the name servers have failed") as caught:
        yield asked.service("_db._tcp.test")
    assert not caught.value.half
    logged_failures.clear()


@pytest_twisted.inlineCallbacks
def test_name_servers_that_fail(
    zone: Zone, asked: NameServers, logged_failures: LoggedFailures
) -> Any:
    zone.records["db.test"] = zone.records["_db._tcp.test"] = OSError("broken")
    for ask in (
        lambda: asked.host("db.test", 80),
        lambda: asked.service("_db._tcp.test"),
    ):
        with pytest.raises(LookUpFailed, match="the name servers have failed"):
            yield ask()
    # The name server's own.
    logged_failures.clear()


@pytest_twisted.inlineCallbacks
def test_name_servers_that_are_silent(
    asked: NameServers, monkeypatch: pytest.MonkeyPatch
) -> Any:
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr("relayd.net.dns.QUERY_TIMEOUTS", (0.05,))
        asked = NameServers(reactor, [silent.getsockname()])
        with pytest.raises(
            LookUpFailed, match="db.test: the name servers don't answer"
        ):
            yield asked.host("db.test", 80)


@pytest_twisted.inlineCallbacks
def test_the_servers_of_a_service(zone: Zone, asked: NameServers) -> Any:
    zone.records["_db._tcp.test"] = [
        dns.Record_SRV(20, 0, 5433, "spare.test", ttl=60),
        dns.Record_SRV(10, 60000, 5432, "a.test", ttl=60),
        dns.Record_SRV(10, 30000, 5432, "b.test", ttl=60),
    ]
    for name, address in (("a", 1), ("b", 2), ("spare", 3)):
        zone.records[f"{name}.test"] = [dns.Record_A(f"10.0.0.{address}", ttl=20)]
    answer = yield asked.service("_db._tcp.test")
    assert sorted(answer.found) == [
        Found("10.0.0.1", 5432, 0, 256),
        Found("10.0.0.2", 5432, 0, 128),
        Found("10.0.0.3", 5433, 1, 1),
    ]
    assert answer.ttl == 20


@pytest_twisted.inlineCallbacks
def test_a_service_that_there_is_not(zone: Zone, asked: NameServers) -> Any:
    zone.records["_off._tcp.test"] = [dns.Record_SRV(0, 0, 0, b"", ttl=60)]
    zone.records["_lost._tcp.test"] = [dns.Record_SRV(0, 0, 1, "gone.test", ttl=60)]
    said = []
    for name in ("_off._tcp.test", "_lost._tcp.test", "_no._tcp.test"):
        answer = yield asked.service(name)
        assert not answer.found
        said.append(answer.why)
    assert said == [
        "it has no service",
        "its services have no address",
        "there is no such name",
    ]


def test_the_name_servers_of_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert name_servers(str(path)) == [("127.0.0.1", 53)]
    path.write_text(
        "# one\nnameserver 10.0.0.53\nnameserver\nnameserver here\noptions x\n"
        "nameserver 2001:db8::53\n"
    )
    assert name_servers(str(path)) == [("10.0.0.53", 53), ("2001:db8::53", 53)]
    path.write_text("nameserver 10.0.0.1\n" * 20)
    assert len(name_servers(str(path))) == 8


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    asked = NameServers(reactor, path=str(path))
    assert asked._asked().servers == [("127.0.0.1", 53)]
    path.write_text("nameserver 10.0.0.1\n")
    first = asked._asked()
    assert first.servers == [("10.0.0.1", 53)]
    assert asked._asked() is first


@pytest_twisted.inlineCallbacks
def test_a_query_that_cannot_be_sent_keeps_no_later_one_waiting(
    zone: Zone, asked: NameServers, monkeypatch: pytest.MonkeyPatch
) -> Any:
    zone.records["db.test"] = [dns.Record_A("10.0.0.1", ttl=9)]

    def full(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("relayd.net.dns._Port.createInternetSocket", full)
        with pytest.raises(LookUpFailed, match="Too many open files"):
            yield asked.host("db.test", 80)
    answer = yield asked.host("db.test", 80).addTimeout(2, reactor)
    assert answer.found == [Found("10.0.0.1", 80)]


class _ByTcp(Int16StringReceiver):
    """A name server by TCP.

    :cvar queries: how many it was asked.
    """

    queries = 0
    says: Any = staticmethod(lambda query: None)

    def connectionMade(self) -> None:
        self.factory.made.append(self)  # type: ignore[attr-defined]

    def stringReceived(self, data: bytes) -> None:
        type(self).queries += 1
        query = dns.Message()
        query.fromStr(data)
        if (reply := self.says(self, query)) is not None:
            self.sendString(reply.toStr())


class _Truncating(dns.DNSDatagramProtocol):
    """A name server whose answers don't fit."""

    def datagramReceived(self, data: bytes, addr: Any) -> None:
        query = dns.Message()
        query.fromStr(data)
        reply = dns.Message(query.id, answer=1, trunc=1)
        reply.queries = query.queries
        self.transport.write(reply.toStr(), addr)


@pytest.fixture
def truncating() -> Iterator[Any]:
    """A name server whose answers come by TCP; its protocol, and those of its peers."""
    listening: Any = reactor

    class Peer(_ByTcp):
        pass

    factory = Factory.forProtocol(Peer)
    factory.made = []  # type: ignore[attr-defined]
    port = free_port()
    by_tcp = listening.listenTCP(port, factory, interface="127.0.0.1")
    by_udp = listening.listenUDP(port, _Truncating(None), interface="127.0.0.1")
    yield Peer, factory, NameServers(reactor, [("127.0.0.1", port)])
    by_udp.stopListening()
    by_tcp.stopListening()
    for each in factory.made:  # type: ignore[attr-defined]
        each.transport.abortConnection()
    pytest_twisted.blockon(deferLater(listening, 0.05))


def _reply_to(query: Any, **flags: int) -> Any:
    reply = dns.Message(query.id, answer=1, **flags)
    reply.queries = query.queries
    [asked] = query.queries
    if not flags and asked.type == dns.A:
        record = dns.Record_A("10.0.0.1", ttl=9)
        reply.answers = [dns.RRHeader(asked.name.name, dns.A, dns.IN, 9, record)]
    return reply


@pytest_twisted.inlineCallbacks
def test_an_answer_that_is_truncated_by_tcp_too_is_asked_for_once(
    truncating: Any,
) -> Any:
    peer, _, asked = truncating
    peer.says = staticmethod(lambda _, query: _reply_to(query, trunc=1))
    with pytest.raises(LookUpFailed, match="the whole answer"):
        yield asked.host("db.test", 80).addTimeout(2, reactor)
    assert peer.queries == 2  # of A and AAAA


@pytest_twisted.inlineCallbacks
def test_a_connection_that_has_fallen_silent_is_left(
    truncating: Any, monkeypatch: pytest.MonkeyPatch
) -> Any:
    peer, factory, asked = truncating
    # Each connection answers once or twice, to those who asked while it was made.
    silent: set[Any] = set()
    peer.says = staticmethod(
        lambda one, query: None if one in silent else _reply_to(query)
    )
    answer = yield asked.host("db.test", 80)
    assert answer.found == [Found("10.0.0.1", 80)]
    silent.update(factory.made)
    monkeypatch.setattr("relayd.net.dns.TCP_TIMEOUT", 0.2)
    with pytest.raises(LookUpFailed, match="don't answer by TCP"):
        yield asked.host("db.test", 80)
    answer = yield asked.host("db.test", 80)
    assert answer.found == [Found("10.0.0.1", 80)]


@pytest_twisted.inlineCallbacks
@pytest.mark.parametrize("written", ["0.0.0.0", "0:0::0:1", "::"])
def test_a_name_server_may_be_written_in_other_ways(written: str) -> Any:
    made = Zone()
    made.records["db.test"] = [dns.Record_A("10.0.0.1", ttl=9)]
    listening: Any = reactor
    protocol = dns.DNSDatagramProtocol(server.DNSServerFactory(clients=[made]))
    host = "::1" if ":" in written else "127.0.0.1"
    port = listening.listenUDP(0, protocol, interface=host)
    answer = yield NameServers(reactor, [(written, port.getHost().port)]).host(
        "db.test", 80
    )
    yield port.stopListening()
    assert answer.found == [Found("10.0.0.1", 80)]

"""Addresses and services of names, asked of name servers, with how long they hold.

The system's resolver (:mod:`relayd.net.resolving`) says neither how long an answer
holds (its TTL) nor what a name's services are (SRV), so whoever follows a name asks the
name servers of `/etc/resolv.conf` themselves, by twisted.names.  Names are absolute: no
search list is tried, and no hosts file.

Three outcomes are told apart: there are addresses; there are none (the name does not
exist, or has no such record), which the name servers are sure of; and nobody knows, as
the name servers are silent or have failed (:class:`LookUpFailed`).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import attrs
from twisted.internet import base, error, udp
from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.internet.interfaces import IReactorFDSet
from twisted.names import client, dns
from twisted.names.error import DNSNameError
from twisted.python.failure import Failure

RESOLV_CONF = "/etc/resolv.conf"

#: What is read of it, in bytes, and how many name servers are asked.
_LONGEST, _MOST_NAME_SERVERS = 65536, 8

#: Seconds for the answers to a query that is sent again, of each name server.
QUERY_TIMEOUTS = (1, 2)

#: The same for an answer by TCP, of one name server.
TCP_TIMEOUT = 10

#: The most servers that a name may stand for.
MAX_SERVERS = 1024

#: The largest weight that a server is given for that of its SRV record.
_MAX_WEIGHT = 256

#: The seconds for which an answer without a TTL holds.
_NO_TTL = 60.0


class LookUpFailed(Exception):
    """Nobody knows: no name server has answered, or they have failed.

    :ivar half: of a name whose addresses of one family are known, and not those of the
        other: the servers that are known.  Some name servers fail for AAAA, always.
    """

    half: Sequence[Found] = ()


@attrs.frozen(order=True)
class Found:
    """A server that a name stands for.

    :ivar tier: 0 for those of the first choice (SRV: of the lowest priority), and so on
        up.
    """

    address: str
    port: int
    tier: int = 0
    weight: int = 1


@attrs.frozen
class Answer:
    """What the name servers say.

    :ivar found: in order; none if there are none.
    :ivar ttl: the seconds for which that holds.
    :ivar why: there are none: in words.
    """

    found: Sequence[Found]
    ttl: float
    why: str = ""


def name_servers(path: str = RESOLV_CONF) -> list[tuple[str, int]]:
    """The name servers of a resolv.conf(5); this machine, if it has none."""
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST).decode("utf-8", "replace")
    except OSError:
        text = ""
    found = []
    # One that is written in two ways is asked in one: its answers tell no difference.
    written: dict[str, tuple[str, int]] = {}
    for line in text.splitlines():
        word, *rest = line.split()[:2] or [""]
        if word == "nameserver" and rest:
            try:
                ipaddress.ip_address(rest[0])
            except ValueError:
                continue
            one = rest[0], dns.PORT
            found.append(written.setdefault(_as_it_answers(rest[0]), one))
    return found[:_MOST_NAME_SERVERS] or [("127.0.0.1", dns.PORT)]


def _as_it_answers(host: str) -> str:
    """A name server's address as the system writes that of its answers.

    Twisted compares the two as texts, and drops what comes from elsewhere.
    """
    # The zone of a link-local address is no part of it there.
    address = host.partition("%")[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    if not any(packed):
        # This machine (resolver(5)), which answers from another address.
        return "::1" if ":" in address else "127.0.0.1"
    return socket.inet_ntop(family, packed)


class NameServers:
    """Asks name servers.

    :param reactor: provides `IReactorUDP`, `IReactorTCP` and `IReactorTime`.
    :param servers: their addresses and ports; unless given, those of `path`, which is
        read again when it has changed.
    """

    def __init__(
        self,
        reactor: Any,
        servers: Sequence[tuple[str, int]] | None = None,
        path: str = RESOLV_CONF,
    ) -> None:
        self._reactor = reactor
        self._servers = servers
        self._path = path
        self._changed_at: float | None = None
        self._resolver: Any = None

    def _asked(self) -> Any:
        """The resolver of those that are the name servers now."""
        changed_at = 0.0
        if self._servers is None:
            try:
                changed_at = os.stat(self._path).st_mtime
            except OSError:
                changed_at = -1.0
        if self._resolver is None or changed_at != self._changed_at:
            self._changed_at = changed_at
            self._resolver = _Resolver(
                servers=list(self._servers or name_servers(self._path)),
                timeout=QUERY_TIMEOUTS,
                reactor=_Quiet(self._reactor),
            )
        return self._resolver

    def host(self, name: str, port: int) -> Deferred[Answer]:
        """The addresses of a name, each with `port`.

        :return: fails with :class:`LookUpFailed`.
        """
        return Deferred.fromCoroutine(self._host(name, port))

    def service(self, name: str) -> Deferred[Answer]:
        """The servers of a service (RFC 2782), such as `_postgres._tcp.example.com`.

        :return: fails with :class:`LookUpFailed`.
        """
        return Deferred.fromCoroutine(self._service(name))

    async def _host(self, name: str, port: int) -> Answer:
        addresses, ttl, why, failed = await self._addresses(name)
        found = [Found(each, port) for each in addresses]
        if failed is not None:
            failed.half = found
            raise failed
        return Answer(found, ttl, why)

    async def _addresses(
        self, name: str
    ) -> tuple[list[str], float, str, LookUpFailed | None]:
        """The addresses of a name, their TTL, and why there are none.

        At last why those of a family, or of both, are not known: as an answer, the
        others would drop the servers of that half.
        """
        resolver = self._asked()
        results = await DeferredList(
            [resolver.lookupAddress(name), resolver.lookupIPV6Address(name)],
            consumeErrors=True,
        )
        records: list[Any] = []
        missing = 0
        failed = None
        for succeeded, result in results:
            if succeeded:
                records += result[0]
            elif result.check(DNSNameError):
                missing += 1
            else:
                failed = failed or _failed(name, result)
        addresses = _texts(records)
        why = ""
        if not addresses:
            why = "there is no such name" if missing else "it has no address"
        return addresses[:MAX_SERVERS], _ttl(records), why, failed

    async def _service(self, name: str) -> Answer:
        try:
            records = (await self._asked().lookupService(name))[0]
        except DNSNameError:
            return Answer([], _NO_TTL, "there is no such name")
        except Exception as problem:
            raise _failed(name, problem) from None
        services = [each for each in records if each.type == dns.SRV]
        # RFC 2782: a target of "." says that there is no such service.
        targets = [
            each for each in services if str(each.payload.target) not in ("", ".")
        ]
        if not targets:
            return Answer([], _ttl(records), "it has no service")
        tiers = sorted({each.payload.priority for each in targets})
        heaviest = max(each.payload.weight for each in targets)
        ttl = _ttl(services)
        found: list[Found] = []
        for each in targets[:MAX_SERVERS]:
            record = each.payload
            addresses, holds, _, failed = await self._addresses(str(record.target))
            if failed is not None:
                raise failed
            ttl = min(ttl, holds)
            tier = tiers.index(record.priority)
            weight = _weight(record.weight, heaviest)
            found += [Found(one, record.port, tier, weight) for one in addresses]
        why = "" if found else "its services have no address"
        return Answer(found[:MAX_SERVERS], ttl, why)


class _Resolver(client.Resolver):
    """Twisted's, which comes back from what Twisted's own does not.

    A query that can't be sent (no descriptor is left) would make all later ones for its
    name wait for it; an answer that is truncated by TCP, too, would be asked for again,
    at once and for ever; and a connection that has fallen silent would be asked on.  It
    compares the address of an answer with that of its server as texts.
    """

    @cached_property
    def _written(self) -> dict[tuple[str, int], tuple[str, int]]:
        """The servers as they were given, by how the system writes them."""
        return {
            (_as_it_answers(host), port): (host, port) for host, port in self.servers
        }

    def _connectedProtocol(self, *at: str, **where: str) -> Any:
        """What sends one query: answers come from the servers as they are written."""
        made = super()._connectedProtocol(*at, **where)
        written = self._written
        heard = made.datagramReceived
        made.datagramReceived = lambda data, source: heard(
            data, written.get(source, source)
        )
        return made

    def messageReceived(self, *_: Any) -> None:
        """See `Resolver.messageReceived`: strangers' datagrams are no lines."""

    def _lookup(self, name: Any, cls: int, kind: int, timeout: Any) -> Deferred[Any]:
        try:
            found: Deferred[Any] = super()._lookup(name, cls, kind, timeout)
        except Exception:
            waiting: dict[Any, list[Deferred[Any]]] = self._waiting
            waiting.pop((name, kind, cls), None)
            return fail()
        return found

    def filterAnswers(self, message: Any) -> Any:
        """See `Resolver.filterAnswers`."""
        if not message.trunc:
            return super().filterAnswers(message)
        return self.queryTCP(message.queries).addCallback(self._whole)

    def _whole(self, message: Any) -> Any:
        """What has come by TCP, which has room for every answer."""
        if message.trunc:
            raise LookUpFailed("the name servers don't tell the whole answer")
        return super().filterAnswers(message)

    def queryTCP(self, queries: Any, *_: Any) -> Deferred[Any]:
        """See `Resolver.queryTCP`."""
        asked: Deferred[Any] = super().queryTCP(queries, TCP_TIMEOUT)
        return asked.addErrback(self._is_silent)

    def _is_silent(self, reason: Failure) -> Failure:
        """The next query has a connection of its own."""
        silent, self.connections = self.connections, []
        for each in silent:
            each.transport.abortConnection()
        return reason


class _Quiet:
    """A reactor on which a query leaves no line in the log, instead of two.

    A name of a short TTL is asked for every few seconds, twice, all day.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def listenUDP(
        self,
        port: int,
        protocol: Any,
        interface: str,
        maxPacketSize: int = 8192,  # noqa: N803
    ) -> Any:
        """See `IReactorUDP`."""
        protocol.noisy = False
        if not IReactorFDSet.providedBy(self._reactor):
            return self._reactor.listenUDP(port, protocol, interface, maxPacketSize)
        made = _Port(port, protocol, interface, maxPacketSize, self._reactor)
        made.startListening()
        return made


class _Port(udp.Port):
    """Twisted's port of datagrams, without what it logs: nothing else is different."""

    def startListening(self) -> None:
        sock = self.createInternetSocket()
        try:
            sock.bind((self.interface, self.port))
        except OSError as problem:
            sock.close()
            raise error.CannotListenError(
                self.interface, self.port, problem
            ) from problem
        self._realPortNumber = sock.getsockname()[1]
        self.connected = 1
        self.socket = sock
        self.fileno = sock.fileno  # type: ignore[method-assign]
        self._connectToProtocol()

    def connectionLost(self, reason: Any = None) -> None:
        self._realPortNumber = None
        base.BasePort.connectionLost(self, reason)
        self.protocol.doStop()
        self.socket.close()
        del self.socket, self.fileno
        stopped = self.__dict__.pop("d", None)
        if stopped is not None:
            stopped.callback(None)


def _weight(weight: int, heaviest: int) -> int:
    """The weight of a server for that of a record, which is up to 65535."""
    if heaviest > _MAX_WEIGHT:
        weight = round(weight * _MAX_WEIGHT / heaviest)
    # 0 is 'a very small chance'.
    return max(weight, 1)


def _texts(records: Iterable[Any]) -> list[str]:
    """The addresses in records, each once; aliases on the way are passed over."""
    found: dict[str, None] = {}
    kinds: dict[int, Callable[[Any], str]] = {
        dns.A: lambda record: str(record.payload.dottedQuad()),
        # ipaddress writes those that stand for IPv4 ones as its version of Python does.
        dns.AAAA: lambda record: socket.inet_ntop(
            socket.AF_INET6, record.payload.address
        ),
    }
    for each in records:
        if each.type in kinds:
            found[kinds[each.type](each)] = None
    return list(found)


def _ttl(records: Iterable[Any]) -> float:
    """The shortest TTL."""
    return float(min([each.ttl for each in records], default=_NO_TTL))


def _failed(name: str, problem: Any) -> LookUpFailed:
    raised = getattr(problem, "value", problem)
    kind = type(raised).__name__
    words = {
        "TimeoutError": "the name servers don't answer",
        "DNSQueryTimeoutError": "the name servers don't answer by TCP",
        "DNSServerError": "the name servers have failed",
        "DNSQueryRefusedError": "the name servers refuse",
        "DNSFormatError": "the name servers don't understand",
        "DNSNotImplementedError": "the name servers don't know how",
    }
    return LookUpFailed(f"{name}: {words.get(kind, str(raised) or kind)}")

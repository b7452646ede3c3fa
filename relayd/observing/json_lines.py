"""Lines of a log as JSON: one object a line, for collectors.

The keys are flat and dotted: those of the Elastic Common Schema and of OpenTelemetry's
semantic conventions where these have one, `relayd.…` for the rest.  A key that has
nothing to say is left out: a session without a server has no `server.address`, one that
has not ended no `event.outcome`.

An address is in two, `client.address` and `client.port`; an IPv6 address has its scope
(`fe80::1%eth0`), a UNIX socket its path and no port, and one without a name nothing.

Nothing that a peer chooses breaks a line: strings go through the encoder of the json
module, which leaves ASCII only, and the objects are made here, for a third of what
`json.dumps` takes.

Sources: https://www.elastic.co/guide/en/ecs/current/ecs-field-reference.html,
https://opentelemetry.io/docs/specs/semconv/registry/attributes/.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii

import attrs

from relayd.core.escapes import NOTHING
from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.core.session import Ending, Session
from relayd.observing.log_times import LogTimes

_DONE = Ending.DONE

#: The longest port: the port of an address is no number beyond that.
_PORT_DIGITS = 5

#: What stands for an address where there is none.
_NOTHING = ("", "-")


class JsonLine(str):
    """A line that is an object already, as the text of an event."""

    __slots__ = ()


def quoted(text: str) -> str:
    """A string of JSON, in ASCII."""
    # The encoder in C takes nothing but str itself.
    return encode_basestring_ascii(str(text))


def value(fact: object) -> str:
    """A fact of any kind as JSON; what JSON has no form for is its text."""
    if fact is None:
        return "null"
    kind = type(fact)
    if kind is bool:
        return "true" if fact else "false"
    if kind is int or (kind is float and math.isfinite(fact)):  # type: ignore[arg-type]
        return str(fact)
    return quoted(str(fact))


class JsonLines:
    """Makes objects; see :class:`relayd.observing.text_lines.TextLines`.

    :param times: of the key `@timestamp`.
    """

    def __init__(self, times: LogTimes | None = None) -> None:
        self._now = (LogTimes() if times is None else times).now

    def facts(self, facts: Iterable[tuple[str, object]]) -> str:
        """See :meth:`TextLines.facts`; their keys are `relayd.fact.…`."""
        return "".join(
            [
                f",{quoted(f'relayd.fact.{name}')}:{value(fact)}"
                for name, fact in facts
                if fact is not NOTHING
            ]
        )

    def session_closed(self, session: Session, facts: str) -> str:
        """See :meth:`TextLines.session_closed`."""
        ending = session.ending
        if ending is _DONE:
            end = ',"event.outcome":"success","relayd.ending":"done","relayd.code":"--"'
        elif ending is None:
            end = ',"event.outcome":"unknown"'
        else:
            word, code = ending.word, ending.code
            end = (
                f',"event.outcome":"failure","error.type":"{word}"'
                f',"relayd.ending":"{word}","relayd.code":"{code}"'
            )
        if session.rare is not None and session.detail:
            end += f',"relayd.detail":{quoted(session.detail)}'
        return f"{self._session('closed', session, session.duration)}{end}{facts}}}"

    def session_interim(self, session: Session, now: float, facts: str) -> str:
        """See :meth:`TextLines.session_interim`."""
        lasted = now - session.opened_at
        return f"{self._session('interim', session, lasted)}{facts}}}"

    def session_step(self, what: str, session: Session) -> str:
        """See :meth:`TextLines.session_step`."""
        where = (
            f"{_client(session)}{_local(session.listener)}"
            if what == "opened"
            else _server(session.upstream)
        )
        return (
            f'{{"@timestamp":"{self._now()}","event.name":"relayd.session.{what}"'
            f',"relayd.relay":{encode_basestring_ascii(session.relay)}'
            f',"relayd.session.id":{session.id}{where}}}'
        )

    def flow_closed(self, flow: Flow, facts: FlowFacts) -> str:
        """See :meth:`TextLines.flow_closed`."""
        ending = quoted(facts.ending)
        end = (
            ',"event.outcome":"success"'
            if facts.ending == "expired"
            else f',"event.outcome":"failure","error.type":{ending}'
        )
        by = f',"relayd.by":{quoted(facts.by)}' if facts.by else ""
        begin = self._flow("closed", flow, facts)
        return f'{begin}{end},"relayd.ending":{ending}{by}}}'

    def flow_interim(self, flow: Flow, facts: FlowFacts) -> str:
        """See :meth:`TextLines.flow_interim`."""
        return f"{self._flow('interim', flow, facts)}}}"

    def datagrams(self, relay: str, listeners: str, counters: Counters) -> str:
        """See :meth:`TextLines.datagrams`; a reason is a part of its key."""
        counts = []
        for name, count in attrs.asdict(counters).items():
            if isinstance(count, dict):
                counts += [(f"{name}.{why}", n) for why, n in sorted(count.items())]
            else:
                counts.append((name, count))
        said = "".join([f",{quoted(f'relayd.datagrams.{k}')}:{n}" for k, n in counts])
        return (
            f'{{"@timestamp":"{self._now()}","event.name":"relayd.datagrams"'
            f',"relayd.relay":{quoted(relay)}'
            f',"relayd.datagrams.listeners":{quoted(listeners)}{said}}}'
        )

    def message(
        self, logger: str, level: str, text: str, when: str = "", rest: str = ""
    ) -> str:
        """A line of the log that is about no session.

        :param when: its time as text; empty: now.
        :param rest: more keys, as JSON that begins with a comma.
        """
        return (
            f'{{"@timestamp":"{when or self._now()}","event.name":"relayd.log"'
            f',"log.level":{quoted(level)},"log.logger":{quoted(logger)}'
            f',"message":{quoted(text)}{rest}}}'
        )

    def _session(self, what: str, session: Session, lasted: float) -> str:
        """What the objects of a session begin with, without the brace that ends it."""
        # The session's own properties would be a hundredth of a short session more.
        dialed, connected, first = session.dialed_at, session.connected_at, ""
        if dialed is not None:
            waited: float | None = dialed - session.opened_at
            if session.rare is not None:
                waited = session.queue_seconds
            first = f',"relayd.queue_seconds":{waited:.6f}'
            if connected is not None:
                first += f',"relayd.connect_seconds":{connected - dialed:.6f}'
        return (
            f'{{"@timestamp":"{self._now()}","event.name":"relayd.session.{what}"'
            f',"relayd.relay":{encode_basestring_ascii(session.relay)}'
            f',"relayd.session.id":{session.id}'
            f"{_client(session)}{_local(session.listener)}{_server(session.upstream)}"
            f',"client.bytes":{session.up.read},"server.bytes":{session.down.read}'
            f',"event.duration":{int(lasted * 1e9)}{first}'
            f',"relayd.attempts":{session.attempts}'
        )

    def _flow(self, what: str, flow: Flow, facts: FlowFacts) -> str:
        return (
            f'{{"@timestamp":"{self._now()}","event.name":"relayd.flow.{what}"'
            f',"relayd.relay":{quoted(facts.relay)}'
            f"{_keys('client', facts.client)}{_keys('network.peer', facts.client)}"
            f"{_keys('network.local', facts.listener)}"
            f"{_keys('client.nat', facts.port)}{_server(facts.server)}"
            f',"network.transport":"udp"'
            f',"client.bytes":{flow.up_bytes},"client.packets":{flow.up_datagrams}'
            f',"server.bytes":{flow.down_bytes},"server.packets":{flow.down_datagrams}'
            f',"event.duration":{int(facts.age * 1e9)}'
        )


def split(name: str) -> tuple[str, str]:
    """An address in what the log calls it, and its port; either may be empty.

    A name of another form, such as an endpoint string, is an address as it is.
    """
    host, colon, port = name.rpartition(":")
    if not colon or not _is_port(port) or host.startswith("unix:"):
        # The name of a UNIX socket, which its client may have chosen, ends as it likes.
        return name.removeprefix("unix:"), ""
    if host[:1] == "[" and host[-1:] == "]":
        host = host[1:-1]
    return host, port


def _is_port(text: str) -> bool:
    return (
        text.isdigit()
        and text.isascii()
        and len(text) <= _PORT_DIGITS
        and (text[0] != "0" or text == "0")
    )


def _keys(what: str, name: str) -> str:
    """An address under its two keys, as JSON that begins with a comma."""
    host, port = split(name)
    if host in _NOTHING:
        return ""
    keys = f',"{what}.address":{encode_basestring_ascii(host)}'
    return f'{keys},"{what}.port":{port}' if port else keys


def _client(session: Session) -> str:
    client, peer = session.client, session.peer
    if peer and peer != client:
        return _keys("client", client) + _keys("network.peer", peer)
    # Most often they are one, and the same host comes again from another port.
    host, colon, port = client.rpartition(":")
    before = _before_ports(host) if colon and _is_port(port) else None
    if before is None:
        return _keys("client", client) + _keys("network.peer", client)
    return f"{before[0]}{port}{before[1]}{port}"


@functools.lru_cache(maxsize=1024)
def _before_ports(host: str) -> tuple[str, str] | None:
    """What is in front of both ports of a client that is its own peer.

    :return: None if this is no host, and so what follows it no port.
    """
    client, peer = _keys("client", f"{host}:0"), _keys("network.peer", f"{host}:0")
    return (client[:-1], peer[:-1]) if client.endswith(":0") else None


@functools.lru_cache(maxsize=256)
def _local(listener: str) -> str:
    """A listener, and what clients come by."""
    transport = "unix" if listener.startswith("unix:") else "tcp"
    return f'{_keys("network.local", listener)},"network.transport":"{transport}"'


@functools.lru_cache(maxsize=1024)
def _server(upstream: str) -> str:
    return _keys("server", upstream)

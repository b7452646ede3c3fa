"""A Steering in memory: three relays, as many sessions as a test wants, and no network.

Its answers have the shapes of real ones, and it refuses what a real one refuses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed

from relayd.control.steering import (
    Asker,
    Conflict,
    FlowQuery,
    Invalid,
    Json,
    ServerState,
    SessionQuery,
    Sink,
    Unknown,
    Work,
)

#: Sessions that are listed in one part of the work.
PART = 100

WHEN = "2026-12-24T03:00:00.000000Z"


class FakeStream:
    """A capture: gives what a test has it give.

    :ivar sink: once it has begun.
    :ivar stopped: why, if it was.
    :ivar blocks: that it gives as it begins; it ends then, if `ends`.
    """

    def __init__(self, blocks: Sequence[bytes] = (), ends: str = "") -> None:
        self.blocks, self.ends = blocks, ends
        self.sink: Sink | None = None
        self.stopped: list[str] = []

    def begin(self, sink: Sink) -> None:
        self.sink = sink
        for each in self.blocks:
            sink.give(each)
        if self.ends:
            sink.end(self.ends, b"its last")

    def stop(self, why: str) -> None:
        self.stopped.append(why)
        if self.sink is not None:
            self.sink.end(why, b"its last")


class FakeSteering:
    """See the module.

    :ivar calls: what was asked for that changes something: its name, and its values.
    :ivar parts: the parts of Works that were made.
    :ivar closed: the Works that were closed before their end.
    :ivar later: the Deferreds of changes, if they are to be slow.
    :ivar streams: the captures, if they are to go on; else they end at once.
    """

    def __init__(self, sessions: int = 3) -> None:
        self.count = sessions
        self.calls: list[tuple[Any, ...]] = []
        self.parts = self.closed = 0
        self.later: list[Deferred[Json]] | None = None
        self.revisions = dict.fromkeys(("web", "dns", "office"), 1)
        self.states = dict.fromkeys(self.revisions, "running")
        self.operator: dict[str, str | None] = {"10.0.0.5:80": None, "db/1": None}
        self.levels = {"relayd": "info"}
        self.kept: dict[str, dict[str, Any]] = {}
        self.waits = False
        self.streams: list[FakeStream] | None = None

    # -- what there is

    def _known(self, relay: str) -> None:
        if relay not in self.states:
            there = ", ".join(sorted(self.states))
            raise Unknown(f"there is no relay {relay!r}: there are {there}")

    def _server(self, relay: str, server: str) -> None:
        self._known(relay)
        if server not in self.operator:
            raise Unknown(f"{relay} has no server {server!r}")

    def _relay(self, name: str) -> Json:
        self._known(name)
        return {
            "name": name,
            "kind": {"web": "tcp", "dns": "udp"}.get(name, "socks4"),
            "state": self.states[name],
            "listen": ["127.0.0.1:8080"],
            "dest": list(self.operator),
            "sni": ["*.example.com=10.0.0.6:443"] if name == "web" else [],
            "route": "routes:tenant" if name == "office" else None,
            "sessions": self.count,
            "older_sessions": 0,
            "max_sessions": None,
            "refused": 0,
            "retries": None,
            "bytes_up": 0,
            "bytes_down": 2**40,
        }

    def status(self) -> Json:
        return {
            "version": "1",
            "pid": 2,
            "started_at": WHEN,
            "uptime": 1.5,
            "config": None,
            "loaded_at": WHEN,
            "state": "running",
            "relays": 3,
            "sessions": self.count,
            "flows": 0,
            "changes": len(self.kept),
            "needs_restart": [],
            "confirm": {"seconds_left": 2.5} if self.waits else None,
            "last_reload": {"at": WHEN, "ok": False, "problems": ["relayd.toml: no"]},
            "netfilter": {
                "managed": True,
                "mark": 4096,
                "relays": ["web"],
                "failures": 1,
                "lost": 0,
                "problems": ["no"],
            },
        }

    def _listed(self, key: str, rows: Sequence[Json], more: Json | None = None) -> Work:
        found = []
        ended = False
        try:
            for number, row in enumerate(rows):
                found.append(row)
                if number % PART == PART - 1:
                    self.parts += 1
                    yield
            ended = True
        finally:
            self.closed += not ended
        return {key: found, **(more or {})}

    def relays(self) -> Work:
        return self._listed("relays", [self._relay(each) for each in self.states])

    def relay(self, name: str) -> Json:
        settings = {
            "idle_timeout": {"value": 3600, "source": "default"},
            "filter": {"value": [], "source": "default"},
        }
        settings |= {
            key: {"value": value, "source": "run time"}
            for key, value in self.kept.get(name, {}).items()
        }
        return {**self._relay(name), "settings": settings}

    def revision(self, relay: str, server: str = "") -> str:
        if server:
            self._server(relay, server)
            return f"{self.revisions[relay]}-{self.operator[server]}"
        self._known(relay)
        return str(self.revisions[relay])

    def _matching(self, query: SessionQuery, row: Json) -> Work:
        if query.relay is not None:
            self._known(query.relay)
        if query.client is not None:
            _network(query.client)
        count = min(query.limit, self.count)
        rows = [{**row, "client": f"10.0.0.1:{number}"} for number in range(count)]
        key = {"id": "sessions", "replied": "flows"}.get(list(row)[-1], "entries")
        more = {"matched": self.count, "total": self.count}
        return self._listed(key, rows, more)

    def sessions(self, query: SessionQuery) -> Work:
        return self._matching(query, _SESSION)

    def flows(self, query: FlowQuery) -> Work:
        return self._matching(query, _FLOW)

    def nat(self, query: FlowQuery) -> Work:
        return self._matching(query, _ENTRY)

    def servers(self, relay: str | None) -> Work:
        if relay is not None:
            self._known(relay)
        rows = [self.server(relay or "web", each) for each in self.operator]
        return self._listed("servers", rows)

    def server(self, relay: str, server: str) -> Json:
        self._server(relay, server)
        return {
            "relay": relay,
            "pool": "default",
            "name": server,
            "label": None,
            "address": "10.0.0.5:80",
            "state": self.operator[server] or "up",
            "why": None,
            "weight": 1,
            "max_sessions": None,
            "sessions": 0,
            "fails": 0,
            "checked": True,
            "last_check": {"at": WHEN, "ok": True, "why": None},
            "backup": False,
            "operator": self.operator[server],
        }

    def limits(self) -> Work:
        row = {"what": "max_sessions", "relay": "web", "limit": 9, "now": 1, "hits": 0}
        return self._listed("limits", [row])

    def diff(self) -> Json:
        return {
            "changes": [
                {"relay": relay, "server": None, "key": key, "file": None, "now": value}
                for relay, settings in self.kept.items()
                for key, value in settings.items()
            ]
        }

    def merged(self) -> Json:
        return {"toml": "[tcp.web]\nlisten = '80'\n", "in_clear": []}

    def explain(
        self,
        relay: str,
        client: str,
        at: str | None,
        dest: str | None,
        first: str | None,
        sni: str | None,
        *,
        runs: bool,
    ) -> Deferred[Json]:
        self._known(relay)
        _network(client)
        if at is not None:
            try:
                datetime.fromisoformat(at)
            except ValueError:
                raise Invalid(f"bad time {at!r}") from None
        step = {"step": "rules", "result": "allowed", "why": f"it runs: {runs}"}
        return self._soon({"admitted": True, "steps": [step], "server": dest})

    # -- what can be changed

    def _changed(self, what: str, relay: str, *said: Any) -> Json:
        self.calls.append((what, relay, *said))
        if relay in self.revisions:
            self.revisions[relay] += 1
            return self._relay(relay)
        return {}

    def _soon(self, answer: Json) -> Deferred[Json]:
        if self.later is None:
            return succeed(answer)
        self.later.append(Deferred())
        return self.later[-1]

    def set(self, relay: str, settings: Mapping[str, Any], by: Asker) -> Deferred[Json]:
        self._known(relay)
        if "idle_timeout" in settings and settings["idle_timeout"] == "no":
            return fail(Invalid("web: idle_timeout: found 'no', expected seconds"))
        own = self.kept.setdefault(relay, {})
        for key, value in settings.items():
            own[key] = value
        return self._soon(self._changed("set", relay, dict(settings), by))

    def start(self, relay: str, by: Asker) -> Deferred[Json]:
        self._known(relay)
        self.states[relay] = "running"
        return self._soon(self._changed("start", relay, by))

    def stop(self, relay: str, cut: bool, by: Asker) -> Deferred[Json]:
        self._known(relay)
        self.states[relay] = "stopped"
        return self._soon(self._changed("stop", relay, cut, by))

    def drain(self, relay: str, within: float | None, by: Asker) -> Deferred[Json]:
        self._known(relay)
        self.states[relay] = "draining"
        return self._soon(self._changed("drain", relay, within, by))

    def pause(self, relay: str, seconds: float | None, by: Asker) -> Json:
        self._known(relay)
        self.states[relay] = "paused"
        return self._changed("pause", relay, seconds, by)

    def resume(self, relay: str, by: Asker) -> Json:
        self._known(relay)
        self.states[relay] = "running"
        return self._changed("resume", relay, by)

    def set_server(
        self,
        relay: str,
        server: str,
        state: ServerState | None,
        weight: int | None,
        within: float | None,
        by: Asker,
    ) -> Json:
        self._server(relay, server)
        self.operator[server] = None if state == "auto" else state
        self._changed("set_server", relay, server, state, weight, within, by)
        return self.server(relay, server)

    def kill(
        self,
        sessions: Sequence[int] | None,
        client: str | None,
        server: str | None,
        relay: str | None,
        by: Asker,
    ) -> Work:
        if relay is not None:
            self._known(relay)
        if client is not None:
            _network(client)
        self._changed("kill", "", sessions, client, server, relay, by)
        made = yield from self._listed("killed", [{}] * self.count)
        return {"killed": len(made["killed"])}

    def capture(self, session: int, most_bytes: int | None, by: Asker) -> FakeStream:
        if session >= 1000:
            raise Unknown(f"there is no session {session}")
        if session == 999:
            raise Conflict(f"session {session} is not relayed yet: it is dialing")
        self._changed("capture", "", session, most_bytes, by)
        if self.streams is None:
            return FakeStream([b"block"], "the session has ended")
        self.streams.append(FakeStream())
        return self.streams[-1]

    def reload(self, discard: bool, confirm: float | None, by: Asker) -> Deferred[Json]:
        self._changed("reload", "", discard, confirm, by)
        dropped = len(self.kept) if discard else 0
        if discard:
            self.kept.clear()
        self.waits = confirm is not None
        return self._soon(
            {
                "added": [],
                "removed": [],
                "changed": ["web"],
                "unchanged": 2,
                "needs_restart": [],
                "routes": ["myroutes:route"],
                "overlay": len(self.kept),
                "dropped": dropped,
                "confirm_within": confirm,
            }
        )

    def confirm(self, by: Asker) -> Json:
        if not self.waits:
            raise Conflict("nothing waits to be confirmed")
        self.waits = False
        self._changed("confirm", "", by)
        return {"confirmed": True}

    # -- the log

    def log_levels(self) -> Json:
        return {"levels": self.levels}

    def set_log_level(self, namespace: str, level: str, by: Asker) -> Json:
        self._changed("set_log_level", "", namespace, level, by)
        self.levels[namespace] = level
        return {"levels": self.levels}


def _network(client: str) -> None:
    try:
        ipaddress.ip_network(client, strict=False)
    except ValueError:
        raise Invalid(f"bad client {client!r}: expected an address") from None


_COUNTS: Json = {"age": 1.0, "idle": 0.5, "bytes_up": 1, "bytes_down": 2}

_SESSION: Json = {
    "relay": "web",
    "client": "",
    "peer": "10.0.0.1:4711",
    "listener": "127.0.0.1:8080",
    "upstream": "10.0.0.5:80",
    "stage": "RELAYING",
    **_COUNTS,
    "rate": 3.0,
    "attempts": 1,
    "older": False,
    "filters": ["latency"],
    "id": 7,
}

_FLOW: Json = {
    "relay": "dns",
    "client": "",
    "listener": "udp:127.0.0.1:53",
    "port": None,
    "server": "udp:9.9.9.9:53",
    **_COUNTS,
    "datagrams_up": 1,
    "datagrams_down": 1,
    "filters": ["latency"],
    "replied": True,
}

_ENTRY: Json = {
    "protocol": "tcp",
    "relay": "web",
    "client": "",
    "listener": "127.0.0.1:8080",
    "port": "10.0.0.9:40000",
    "server": "10.0.0.5:80",
    **_COUNTS,
    "datagrams_up": None,
    "datagrams_down": None,
}

"""What each answer of a running relayd looks like to people: its columns and notes."""

from __future__ import annotations

from typing import Any

from relayd.core.names import first_of
from relayd.ctl import amounts
from relayd.ctl.amounts import (
    NOTHING,
    counted,
    listed,
    literal,
    rate,
    text,
    when,
)
from relayd.ctl.tables import Column, Json, Table, View, number, rows_of, size, span

_RELAYS = (
    Column("relay", "name"),
    Column("kind", "kind", spare=3),
    Column("state", "state"),
    Column("listen", "listen", listed, folds=True),
    Column("dest", lambda row: _leads_to(row), listed, folds=True),
    Column("sessions", lambda row: _of(row, "sessions", "max_sessions"), right=True),
    number("older", "older_sessions", spare=2),
    number("refused", "refused"),
    number("retries", "retries", spare=1),
    size("up", "bytes_up", spare=4),
    size("down", "bytes_down", spare=4),
)

_SESSIONS = (
    number("id", "id"),
    Column("relay", "relay"),
    Column("client", "client"),
    Column("server", "upstream"),
    Column("stage", "stage", spare=5),
    span("age", "age"),
    span("idle", "idle", spare=4),
    size("up", "bytes_up"),
    size("down", "bytes_down"),
    Column("rate", "rate", rate, right=True, spare=6),
    number("tries", "attempts", spare=2),
    Column("older", lambda row: "older" if row.get("older") else None, spare=3),
    Column("filters", "filters", listed, spare=1),
)

_FLOWS = (
    Column("relay", "relay"),
    Column("client", "client"),
    Column("listener", "listener", spare=5),
    Column("port", "port"),
    Column("server", "server"),
    span("age", "age"),
    span("idle", "idle", spare=4),
    number("sent", "datagrams_up", spare=3),
    number("replies", "datagrams_down", spare=3),
    size("up", "bytes_up"),
    size("down", "bytes_down"),
    Column("replied", "replied", spare=2),
    Column("filters", "filters", listed, spare=1),
)

_NAT = (
    Column("proto", "protocol"),
    Column("relay", "relay", spare=3),
    Column("client", "client"),
    Column("listener", "listener"),
    Column("port", "port"),
    Column("server", "server"),
    span("age", "age"),
    span("idle", "idle", spare=2),
    size("up", "bytes_up"),
    size("down", "bytes_down"),
    number("sent", "datagrams_up", spare=1),
    number("replies", "datagrams_down", spare=1),
)

_SERVERS = (
    Column("relay", "relay"),
    Column("server", lambda row: called(row)),
    Column("address", "address", spare=2),
    Column("state", "state"),
    Column("why", lambda row: _why(row), folds=True),
    number("weight", "weight"),
    Column("sessions", lambda row: _of(row, "sessions", "max_sessions"), right=True),
    number("fails", "fails", spare=1),
    Column("last check", lambda row: _check(row), folds=True),
)

_LIMITS = (
    Column("what", "what"),
    Column("relay", "relay"),
    number("now", "now"),
    number("limit", "limit"),
    Column("used", lambda row: _used(row), right=True),
    number("hits", "hits"),
)

_CHANGES = (
    Column("relay", "relay"),
    Column("server", "server"),
    Column("key", "key"),
    Column("file", "file", literal, folds=True),
    Column("now", "now", literal, folds=True),
)

_SETTINGS = (
    Column("setting", "key"),
    Column("value", "value", literal, folds=True),
    Column("source", "source", folds=True),
)

_STEPS = (
    Column("step", "step"),
    Column("result", "result", folds=True),
    Column("why", "why", folds=True),
)

_LEVELS = (Column("namespace", "namespace"), Column("level", "level"))


def called(row: Json) -> Any:
    """What `relayctl server` takes for a server of a relay.

    It begins with the name of its pool, if that is not the default one; a label alone
    does not.
    """
    label, pool = row.get("label"), row.get("pool")
    if not label:
        return row.get("name")
    return label if pool in (None, "default") else f"{pool}/{label}"


def _leads_to(row: Json) -> list[Any]:
    """Where the clients of a relay may go."""
    lists = (row.get(key) for key in ("dest", "sni"))
    found = [each for some in lists if isinstance(some, list) for each in some]
    return [*found, f"route {row['route']}"] if row.get("route") else found


def _of(row: Json, key: str, limit: str) -> str:
    now, most = text(row.get(key)), row.get(limit)
    return now if most is None else f"{now}/{text(most)}"


def _used(row: Json) -> str | None:
    now, limit = row.get("now"), row.get("limit")
    if now is None or limit is None or not all(map(amounts.is_number, (now, limit))):
        return None
    return f"{100 * now / limit:.0f}%" if limit > 0 else None


def _why(row: Json) -> str | None:
    said = [row.get("why") or ""]
    if row.get("backup"):
        said.append("backup")
    return "; ".join(str(each) for each in said if each) or None


def _check(row: Json) -> str | None:
    if not row.get("checked"):
        return None
    last = row.get("last_check")
    if not isinstance(last, dict):
        return "not yet"
    result = "ok" if last.get("ok") else text(last.get("why") or "failed")
    return f"{result}, {when(last.get('at'))}"


def _pairs(pairs: list[tuple[str, str]]) -> Table:
    columns = (Column("what", "what", str), Column("value", "value", folds=True))
    rows = [{"what": what, "value": value} for what, value in pairs]
    return Table(columns, rows, headed=False)


def status(answer: Json) -> View:
    since = when(answer.get("started_at"))
    pairs = [
        ("state", text(answer.get("state"))),
        ("version", text(answer.get("version"))),
        ("pid", text(answer.get("pid"))),
        ("up for", f"{amounts.span(answer.get('uptime'))}, since {since}"),
        ("configuration", text(answer.get("config") or "no file")),
        ("loaded", when(answer.get("loaded_at"))),
        ("relays", text(answer.get("relays"))),
        ("sessions", text(answer.get("sessions"))),
        ("flows", text(answer.get("flows"))),
        ("run-time changes", text(answer.get("changes"))),
    ]
    last = answer.get("last_reload")
    if isinstance(last, dict):
        done = "done" if last.get("ok") else "not in effect"
        pairs.append(("last reload", f"{when(last.get('at'))}: {done}"))
        problems = last.get("problems")
        if isinstance(problems, list):
            pairs += [("", text(each)) for each in problems]
    if answer.get("needs_restart"):
        pairs.append(("needs a restart", listed(answer["needs_restart"])))
    netfilter = answer.get("netfilter")
    if isinstance(netfilter, dict) and netfilter.get("managed"):
        relays = netfilter.get("relays")
        named = [text(each) for each in relays] if isinstance(relays, list) else []
        whose = f"of {first_of(named) or 'no relay'}"
        if netfilter.get("lost"):
            whose += f"; changed by others {counted(netfilter['lost'], 'time')}"
        pairs.append(("netfilter rules", whose))
        problems = netfilter.get("problems")
        if isinstance(problems, list):
            pairs += [("", text(each)) for each in problems]
    confirm = answer.get("confirm")
    if isinstance(confirm, dict):
        left = amounts.span(confirm.get("seconds_left"))
        pairs.append(("to be confirmed", f"goes back in {left}: relayctl confirm"))
    return [_pairs(pairs)]


def relays(answer: Json) -> View:
    return [Table(_RELAYS, rows_of(answer, "relays"))]


def relay(answer: Json) -> View:
    """One, with its settings."""
    settings = answer.get("settings")
    rows = [
        {"key": key, **each}
        for key, each in (settings.items() if isinstance(settings, dict) else ())
        if isinstance(each, dict)
    ]
    return [Table(_RELAYS, [answer]), Table(_SETTINGS, rows)]


def _part(answer: Json, key: str, what: str) -> list[str]:
    """A note if not all that there are have been listed."""
    shown, matched = len(rows_of(answer, key)), answer.get("matched")
    if not isinstance(matched, int) or matched <= shown:
        return []
    return [f"{shown} of {counted(matched, what)} that match; --limit lists more"]


def sessions(answer: Json) -> View:
    note = _part(answer, "sessions", "session")
    return [Table(_SESSIONS, rows_of(answer, "sessions")), *note]


def flows(answer: Json) -> View:
    note = _part(answer, "flows", "flow")
    return [Table(_FLOWS, rows_of(answer, "flows")), *note]


def nat(answer: Json) -> View:
    entries = rows_of(answer, "entries")
    shown, matched = len(entries), answer.get("matched")
    note = []
    if isinstance(matched, int) and matched > shown:
        note = [f"{shown} of {matched} entries that match; --limit lists more"]
    return [Table(_NAT, entries), *note]


def servers(answer: Json) -> View:
    return [Table(_SERVERS, rows_of(answer, "servers"))]


def limits(answer: Json) -> View:
    return [Table(_LIMITS, rows_of(answer, "limits"))]


def diff(answer: Json) -> View:
    changes = rows_of(answer, "changes")
    if not changes:
        return ["No run-time changes since the settings were read."]
    return [Table(_CHANGES, changes)]


def explained(answer: Json) -> View:
    steps = rows_of(answer, "steps")
    server = text(answer.get("server"))
    end = "admitted" if answer.get("admitted") else "refused"
    if server != NOTHING:
        end += f", to {server}"
    return [Table(_STEPS, [*steps, {"step": "in the end", "result": end}])]


def levels(answer: Json) -> View:
    found = answer.get("levels")
    rows: list[dict[str, Any]] = [
        {"namespace": namespace, "level": level}
        for namespace, level in (found.items() if isinstance(found, dict) else ())
    ]
    return [Table(_LEVELS, rows)]


def reloaded(answer: Json) -> str:
    """What a reload has done, in a few lines."""
    lines = [
        f"{what}: {listed(answer[what])}"
        for what in ("added", "removed", "changed")
        if answer.get(what)
    ]
    lines.append(f"unchanged: {counted(answer.get('unchanged'), 'relay')}")
    for key, what in (("overlay", "kept"), ("dropped", "dropped")):
        if answer.get(key):
            lines.append(f"{what}: {counted(answer[key], 'run-time change')}")
    if answer.get("routes"):
        lines.append(f"read anew: {listed(answer['routes'])}")
    if answer.get("needs_restart"):
        lines.append(f"needs a restart: {listed(answer['needs_restart'])}")
    if answer.get("confirm_within") is not None:
        left = amounts.span(answer["confirm_within"])
        lines.append(f"It goes back in {left}, unless you say: relayctl confirm")
    return "\n".join(lines)


def confirmed(_: Json) -> str:
    return "The reload is confirmed, and stays."


def changed_relay(answer: Json) -> str:
    name, state = text(answer.get("name")), text(answer.get("state"))
    what = "flow" if answer.get("kind") == "udp" else "session"
    line = f"{name} is {state}, with {counted(answer.get('sessions'), what)}"
    if answer.get("older_sessions"):
        line += f", {text(answer['older_sessions'])} of them under earlier settings"
    return line


def changed_server(answer: Json) -> str:
    name = text(called(answer))
    line = f"{text(answer.get('relay'))}/{name}: {text(answer.get('state'))}"
    if why := _why(answer):
        line += f" ({text(why)})"
    line += f", weight {text(answer.get('weight'))}"
    return f"{line}, with {counted(answer.get('sessions'), 'session')}"


def killed(answer: Json) -> str:
    return f"killed: {text(answer.get('killed'))}"

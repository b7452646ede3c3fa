"""Lines that are JSON objects: one a line, and what the text says."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.address import IPv6Address, UNIXAddress
from twisted.logger import capturedLogs, formatEvent

from relayd.core.addresses import address_name
from relayd.core.escapes import NOTHING
from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.core.session import Ending, Session
from relayd.observing.flow_lines import FlowLog
from relayd.observing.json_lines import JsonLine, split
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import SessionLog, VerboseSessionLog
from tests.conftest import LoggedFailures
from tests.core.test_observers import Fact, a_session, with_facts
from tests.observing.test_line_log import FACTS, SESSIONS, TEXT

#: Names as the relay has them, and whatever else there is.
NAMES = (
    st.sampled_from(
        [
            *(
                "192.0.2.7:51514",
                "[2001:db8::7]:80",
                "[fe80::1%eth0]:80",
                "unix:/run/x",
            ),
            *(
                "unix:/run/x:80",
                "unix:",
                "-",
                "",
                "tls:example.com:443",
                "bind:1.2.3.4:5",
            ),
            *(
                "a:007",
                "a:0",
                "a:99999",
                "a:123456",
                "a:²",
                "[]:1",
                ":1",
                "[a:1",
                "unix:1",
            ),
        ]
    )
    | TEXT
)


def written(kind: Any, hook: str, *about: Any) -> tuple[str, dict[str, Any]]:
    """A line as text, and the object that says the same."""
    lines: list[str] = []

    def write(namespace: str, line: str) -> None:
        lines.append(line)

    for as_json in (False, True):
        getattr(kind(LineLog(write, as_json=as_json)), hook)(*about)
    text, line = lines
    assert line.isascii()
    assert line.isprintable()
    made = json.loads(line, object_pairs_hook=once)
    assert all(isinstance(each, str | int | float | None) for each in made.values())
    return text, made


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys it has once."""
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def names(made: dict[str, Any], what: str) -> set[str]:
    """What the text may call an address."""
    host, port = made.get(f"{what}.address"), made.get(f"{what}.port")
    if host is None:
        assert port is None
        return {"", "-", "unix:", "unix:-", ":1", "[]:1"}
    if port is None:
        return {host, f"unix:{host}"}
    return {f"{host}:{port}", f"[{host}]:{port}"}


def test_the_object_of_a_session() -> None:
    session = a_session(peer="192.0.2.1:50000", opened_at=99.0, detail='"why"\n')
    _, made = written(SessionLog, "closed", session)
    when = made.pop("@timestamp")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", when)
    assert made == {
        "event.name": "relayd.session.closed",
        "relayd.relay": "web",
        "relayd.session.id": 7,
        "client.address": "192.0.2.1",
        "client.port": 50000,
        "network.peer.address": "192.0.2.1",
        "network.peer.port": 50000,
        "network.local.address": "192.0.2.2",
        "network.local.port": 80,
        "network.transport": "tcp",
        "server.address": "192.0.2.3",
        "server.port": 8080,
        "client.bytes": 10,
        "server.bytes": 20,
        "event.duration": 2_500_000_000,
        "event.outcome": "success",
        "relayd.queue_seconds": 1.0,
        "relayd.connect_seconds": 0.25,
        "relayd.attempts": 1,
        "relayd.ending": "done",
        "relayd.code": "--",
        "relayd.detail": '"why"\n',
    }


def test_the_object_of_one_that_failed() -> None:
    """What it did not have has no keys; the client's balancer has its own."""
    session = a_session(
        peer="10.0.0.1:4000",
        client="[fe80::1%eth0]:50000",
        listener="unix:/run/web.sock",
        upstream="",
        dialed_at=None,
        connected_at=None,
        attempts=0,
        ending=Ending.NO_UPSTREAM,
    )
    _, made = written(SessionLog, "closed", session)
    assert made["event.outcome"] == "failure"
    assert made["error.type"] == made["relayd.ending"] == "no_upstream"
    assert made["relayd.code"] == "SC"
    assert (made["client.address"], made["client.port"]) == ("fe80::1%eth0", 50000)
    assert made["network.peer.address"] == "10.0.0.1"
    assert made["network.peer.port"] == 4000
    assert made["network.local.address"] == "/run/web.sock"
    assert made["network.transport"] == "unix"
    assert not [
        key
        for key in made
        if "server.a" in key or "server.p" in key or "seconds" in key
    ]
    assert "network.local.port" not in made
    assert "relayd.detail" not in made


def test_the_objects_before_the_end() -> None:
    session = a_session(peer="192.0.2.1:50000")
    for step in ("opened", "dialing", "connected"):
        _, made = written(VerboseSessionLog, step, session)
        assert made["event.name"] == f"relayd.session.{step}"
        assert (made["relayd.session.id"], made["relayd.relay"]) == (7, "web")
        assert ("client.port" in made) is ("network.local.port" in made)
        assert ("client.port" in made) is (step == "opened")
        assert ("server.port" in made) is (step != "opened")
    text, made = written(SessionLog, "interim", session, 160.0)
    assert text == (
        "interim session=7 relay=web client=192.0.2.1:50000 listener=192.0.2.2:80"
        " upstream=192.0.2.3:8080 connect=0.250 attempts=1 duration=60.000"
        " up=10 down=20"
    )
    assert made["event.name"] == "relayd.session.interim"
    assert made["event.duration"] == 60_000_000_000
    assert (made["client.bytes"], made["server.bytes"]) == (10, 20)
    ends = ("event.outcome", "error.type", "relayd.ending", "relayd.code")
    assert not made.keys() & set(ends)


@given(
    session=SESSIONS,
    client=NAMES,
    peer=NAMES,
    listener=NAMES,
    upstream=NAMES,
    facts=st.dictionaries(
        st.text(), st.integers() | TEXT | st.none() | st.booleans() | st.floats()
    ),
)
@example(
    session=a_session(),
    client="",
    peer="",
    listener="",
    upstream="",
    facts={"level": float("nan"), "id": float("inf"), "": "-"},
)
def test_an_object_says_what_the_text_says(
    session: Session, facts: dict[str, Any], **texts: str
) -> None:
    """Whatever names, details and facts there are, and which a client has chosen."""

    class WithFacts(Session):
        @property
        def facts(self) -> dict[str, Any]:
            return facts

    told = WithFacts(**(attrs.asdict(session, recurse=False) | texts))
    text, made = written(VerboseSessionLog, "closed", told)
    assert told.client in names(made, "client")
    assert (told.peer or told.client) in names(made, "network.peer")
    assert told.listener in names(made, "network.local")
    assert told.upstream in names(made, "server")
    assert made["relayd.session.id"] == told.id
    assert made["relayd.relay"] == told.relay
    assert made.get("relayd.detail", "") == told.detail
    numbers = re.findall(
        r" connect=(\S+) attempts=(\d+) duration=(\S+) up=(\d+) down=(\d+)"
        r" ending=(\w*) code=(\S*)",
        text,
    )
    connect, attempts, duration, up, down, ending, code = numbers[0]
    if connect == "-":
        assert "relayd.connect_seconds" not in made
    else:
        assert made["relayd.connect_seconds"] == pytest.approx(float(connect), abs=6e-4)
    assert made["relayd.attempts"] == int(attempts)
    assert made["event.duration"] / 1e9 == pytest.approx(float(duration), abs=6e-4)
    assert (made["client.bytes"], made["server.bytes"]) == (int(up), int(down))
    assert made.get("relayd.ending", "") == ending
    assert made.get("relayd.code", "") == code
    said = [key for key in made if key.startswith("relayd.fact.")]
    assert len(said) == len(facts)
    for fact in facts.values():
        # NaN and infinity have no form in JSON.
        assert any(made[key] in (fact, str(fact)) for key in said)


def test_a_fact_that_can_not_be_said_costs_itself(
    logged_failures: LoggedFailures,
) -> None:
    lines: list[str] = []
    log = SessionLog(LineLog(lambda _, line: lines.append(line), as_json=True))
    log.closed(with_facts({"a": 1, "bad": Fact(), "level": 2.5, "z": None}))
    made = json.loads(lines[0])
    facts = {key: made[key] for key in made if key.startswith("relayd.fact.")}
    assert facts == {
        "relayd.fact.a": 1,
        "relayd.fact.fact_level": 2.5,
        "relayd.fact.z": None,
    }
    logged_failures.take("a fact of a session can't be logged")


@pytest.mark.parametrize("others", [{}, {"level": 1}])
def test_a_fact_that_says_nothing_is_left_out(others: dict[str, object]) -> None:
    """Also where a name must be another one.  What is just the same is none."""
    lines: list[str] = []
    log = SessionLog(LineLog(lambda _, line: lines.append(line), as_json=True))
    facts = {"user": NOTHING, "reply": 91, "requested": "a-b", "own": "-"}
    log.closed(with_facts({**facts, **others}))
    made = json.loads(lines[0])
    assert {key: made[key] for key in made if key.startswith("relayd.fact.")} == {
        "relayd.fact.reply": 91,
        "relayd.fact.requested": "a-b",
        "relayd.fact.own": "-",
        **{f"relayd.fact.fact_{name}": others[name] for name in others},
    }


def test_an_event_is_the_object_and_has_the_fields() -> None:
    """For syslog, and for those who log by themselves."""
    with capturedLogs() as events:
        SessionLog(LineLog(as_json=True)).closed(a_session())
        VerboseSessionLog(LineLog(as_json=True)).opened(a_session())
        FlowLog(LineLog(as_json=True)).closed("dns", "a:1", Counters())
    for event, name in zip(
        events, ["session.closed", "session.opened", "datagrams"], strict=True
    ):
        assert isinstance(event["line"], JsonLine)
        made = json.loads(formatEvent(event))
        assert made["event.name"] == f"relayd.{name}"
        assert event["relay"] == made["relayd.relay"]


def a_flow() -> Flow:
    flow = Flow(1, "192.0.2.7", 0.0)
    flow.up_datagrams, flow.up_bytes = 1, 37
    flow.down_datagrams, flow.down_bytes = 2, 93
    flow.in_use = True
    return flow


FLOW = FlowFacts(
    relay="dns",
    client="192.0.2.7:53124",
    listener="192.0.2.1:53",
    port="10.0.0.2:40112",
    server="9.9.9.9:53",
    age=31.004,
    ending="expired",
)


def test_the_object_of_a_flow() -> None:
    _, made = written(FlowLog, "ended", a_flow(), FLOW)
    del made["@timestamp"]
    assert made == {
        "event.name": "relayd.flow.closed",
        "relayd.relay": "dns",
        "client.address": "192.0.2.7",
        "client.port": 53124,
        "network.peer.address": "192.0.2.7",
        "network.peer.port": 53124,
        "network.local.address": "192.0.2.1",
        "network.local.port": 53,
        "client.nat.address": "10.0.0.2",
        "client.nat.port": 40112,
        "server.address": "9.9.9.9",
        "server.port": 53,
        "network.transport": "udp",
        "client.bytes": 37,
        "client.packets": 1,
        "server.bytes": 93,
        "server.packets": 2,
        "event.duration": 31_004_000_000,
        "event.outcome": "success",
        "relayd.ending": "expired",
    }


def test_the_objects_of_other_flows() -> None:
    gone = attrs.evolve(FLOW, ending="evicted", by="192.0.2.9:5353")
    _, made = written(FlowLog, "ended", a_flow(), gone)
    assert made["event.outcome"] == "failure"
    assert made["error.type"] == made["relayd.ending"] == "evicted"
    assert made["relayd.by"] == "192.0.2.9:5353"
    text, made = written(FlowLog, "interim", a_flow(), attrs.evolve(FLOW, ending=""))
    assert text == (
        "interim flow relay=dns client=192.0.2.7:53124 listener=192.0.2.1:53"
        " port=10.0.0.2:40112 server=9.9.9.9:53 age=31.004 up=1/37 down=2/93"
    )
    assert made["event.name"] == "relayd.flow.interim"
    assert not made.keys() & {"event.outcome", "error.type", "relayd.ending"}


def test_the_object_of_the_counters() -> None:
    counters = Counters(received=3, sent=1, dropped=Counter(no_flow=2))
    _, made = written(FlowLog, "closed", "dns", "192.0.2.1:53", counters)
    del made["@timestamp"]
    assert made == {
        "event.name": "relayd.datagrams",
        "relayd.relay": "dns",
        "relayd.datagrams.listeners": "192.0.2.1:53",
        "relayd.datagrams.received": 3,
        "relayd.datagrams.sent": 1,
        "relayd.datagrams.replies_received": 0,
        "relayd.datagrams.replies_sent": 0,
        "relayd.datagrams.dropped.no_flow": 2,
        "relayd.datagrams.icmp_errors": 0,
        "relayd.datagrams.kernel_dropped": 0,
        "relayd.datagrams.resent": 0,
        "relayd.datagrams.not_resent": 0,
    }


@given(facts=FACTS, client=NAMES, port=NAMES, server=NAMES, name=TEXT)
def test_no_names_of_a_flow_break_its_object(
    facts: FlowFacts, name: str, **texts: str
) -> None:
    facts = attrs.evolve(facts, **texts)
    _, made = written(FlowLog, "ended", a_flow(), facts)
    assert facts.client in names(made, "client")
    assert facts.port in names(made, "client.nat")
    assert facts.server in names(made, "server")
    assert made.get("relayd.by", "") == facts.by
    _, made = written(FlowLog, "closed", name, name, Counters())
    assert made["relayd.relay"] == made["relayd.datagrams.listeners"] == name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("192.0.2.7:51514", ("192.0.2.7", "51514")),
        (address_name(IPv6Address("TCP", "fe80::1%eth0", 80)), ("fe80::1%eth0", "80")),
        (address_name(IPv6Address("TCP", "::ffff:192.0.2.7", 80)), ("192.0.2.7", "80")),
        (address_name(UNIXAddress(b"/run/x:80")), ("/run/x:80", "")),
        (address_name(UNIXAddress(b"/run/a b\n")), (r"/run/a\x20b\n", "")),
        (address_name(UNIXAddress(None)), ("", "")),
        ("tls:example.com:443", ("tls:example.com", "443")),
        ("a server", ("a server", "")),
        ("a:007", ("a:007", "")),
        ("a:²", ("a:²", "")),
    ],
)
def test_an_address_is_in_two(name: str, parts: tuple[str, str]) -> None:
    assert split(name) == parts

"""Lists of sessions: what is told of each, who is listed, in which order."""

from __future__ import annotations

import ipaddress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.control.steering import Invalid, SessionQuery, Unknown
from relayd.core.session import Session
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.operating.listing import PART, Shown, sessions
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.support.fakes import FakeEndpoint
from tests.support.relays import Relay
from tests.support.shown import Records, shown, steps, whole


def a_session(ident: int, client: str = "192.0.2.1:1", **facts: Any) -> Session:
    up, down = facts.pop("moved", (0, 0))
    opened_at = 100.0 - facts.pop("age", 10.0)
    made = Session(ident, client, "l:80", opened_at, "web", client, **facts)
    made.up.read, made.down.read = up, down
    return made


def ids(answer: Any) -> list[int]:
    return [each["id"] for each in answer["sessions"]]


def test_what_is_told_of_a_session() -> None:
    relay = Relay()
    relay.clock.advance(5)
    client = relay.client()
    [number] = relay.factory.sessions
    client.receive(b"hello")
    own = shown(relay.factory)
    dialed: Any = whole(sessions([own], SessionQuery()))
    assert dialed == {
        "sessions": [
            {
                "id": number,
                "relay": "web",
                "client": "192.0.2.1:50000",
                "peer": "192.0.2.1:50000",
                "listener": "192.0.2.2:80",
                "upstream": "server:80",
                "stage": "dialing",
                "age": 0.0,
                "idle": None,
                "bytes_up": 5,
                "bytes_down": 0,
                "rate": 0.0,
                "attempts": 1,
                "older": False,
                "filters": [],
            }
        ],
        "matched": 1,
        "total": 1,
    }
    server = relay.server.dial.connect()
    server.receive(b"answers")
    relay.clock.advance(2)
    [told] = whole(sessions([own], SessionQuery()))["sessions"]
    assert (told["stage"], told["upstream"]) == ("relaying", "192.0.2.1:9000")
    assert (told["age"], told["rate"], told["bytes_down"]) == (2, 6, 7)
    server.take()
    client.take()
    relay.clock.pump([1.0] * 10)
    [told] = whole(sessions([own], SessionQuery()))["sessions"]
    # To a tick, from when the first check has found that nothing moves any more.
    assert 8 <= told["idle"] <= 12
    client.lose()
    assert whole(sessions([own], SessionQuery()))["sessions"] == []


def test_what_is_not_known_yet() -> None:
    records = Records([a_session(1, stage=Stage.WAITING)])
    [told] = whole(sessions([shown(records)], SessionQuery()))["sessions"]
    assert (told["upstream"], told["idle"], told["stage"]) == (None, None, "waiting")


def test_those_of_settings_from_before() -> None:
    now, before = Records([a_session(2)]), Records([a_session(1)])
    own = Shown("web", "tcp", [now], [before])
    answer: Any = whole(sessions([own], SessionQuery()))
    assert [(each["id"], each["older"]) for each in answer["sessions"]] == [
        *((1, True), (2, False))
    ]


def test_a_server_is_found_by_its_name_its_label_and_its_address() -> None:
    labelled = Server(FakeEndpoint(), "a/db:80", label="a")
    plain = Upstream(FakeEndpoint(), "other:80")
    records = Records(
        [
            a_session(1, server=labelled, upstream="a/192.0.2.7:80"),
            a_session(2, server=labelled, upstream="a/db:80"),
            a_session(3, server=plain, upstream="192.0.2.8:80"),
            a_session(4, upstream="192.0.2.8:80"),
            a_session(5),
        ]
    )

    def found(server: str) -> list[int]:
        return ids(whole(sessions([shown(records)], SessionQuery(server=server))))

    assert found("a") == [1, 2]
    assert found("a/db:80") == [1, 2]
    assert found("db:80") == [2]
    assert found("192.0.2.7:80") == [1]
    assert found("other:80") == [3]
    assert found("192.0.2.8:80") == [3, 4]
    assert found("80") == []


def test_a_server_of_a_pool_is_found_with_it_and_without() -> None:
    """A session is found by what its line has, too: the address, and the label."""
    plain = Server(FakeEndpoint(), "ssh/db:22")
    labelled = Server(FakeEndpoint(), "ssh/a/db:23", label="a")
    other = Server(FakeEndpoint(), "a/db:23", label="a")
    Pool([plain, labelled], name="ssh")
    records = Records(
        [
            a_session(1, server=plain, upstream="192.0.2.7:22"),
            a_session(2, server=plain, upstream="ssh/db:22"),
            a_session(3, server=labelled, upstream="a/192.0.2.7:23"),
            a_session(4, server=labelled, upstream="ssh/a/db:23"),
            a_session(5, server=other, upstream="a/192.0.2.7:23"),
        ]
    )

    def found(server: str) -> list[int]:
        return ids(whole(sessions([shown(records)], SessionQuery(server=server))))

    assert found("ssh/db:22") == [1, 2]
    assert found("192.0.2.7:22") == [1]
    assert found("db:22") == [2]
    assert found("a") == [3, 4, 5]
    assert found("ssh/a") == found("ssh/a/db:23") == [3, 4]
    assert found("192.0.2.7:23") == [3, 5]
    assert found("a/db:23") == [5]
    assert found("ssh") == found("a/") == []


@pytest.mark.parametrize(
    ("client", "found"),
    [
        ("10.1.2.3", [1]),
        ("10.0.0.0/8", [1, 2]),
        ("2001:db8::/32", [3]),
        ("::ffff:10.1.2.3", [1]),
        ("unix", [4]),
        ("192.0.2.1", []),
    ],
)
def test_a_client_is_an_address_or_a_network(client: str, found: list[int]) -> None:
    records = Records(
        [
            a_session(1, "10.1.2.3:1"),
            a_session(2, "10.9.9.9:2"),
            a_session(3, "[2001:db8::7]:3"),
            a_session(4, "unix:"),
        ]
    )
    assert ids(whole(sessions([shown(records)], SessionQuery(client=client)))) == found


@pytest.mark.parametrize("client", ["10.1.2.3/8", "web", "", "10.0.0.1:80"])
def test_what_is_no_client(client: str) -> None:
    with pytest.raises(Invalid, match="^client "):
        whole(sessions([shown(Records())], SessionQuery(client=client)))


def test_what_is_no_server() -> None:
    with pytest.raises(Invalid, match="server is empty: give a name"):
        whole(sessions([shown(Records())], SessionQuery(server="")))


def test_a_relay_that_is_not_there() -> None:
    relays = [shown(Records(), name=f"web{n}") for n in range(12)]
    with pytest.raises(Unknown, match="no relay 'db': there are web0, .* and 2 more"):
        whole(sessions(relays, SessionQuery(relay="db")))
    with pytest.raises(Unknown, match="no relay 'db': there is web0$"):
        whole(sessions(relays[:1], SessionQuery(relay="db")))


def test_flows_are_no_sessions() -> None:
    flows = SimpleNamespace()
    answer = whole(sessions([shown(flows, name="dns", kind="udp")], SessionQuery()))
    assert answer == {"sessions": [], "matched": 0, "total": 0}


#: What a session may be like: its client, its server, its age and what has moved.
SESSIONS = st.lists(
    st.tuples(
        st.sampled_from(["10.0.0.1:1", "10.0.0.2:2", "10.1.0.1:3", "[2001:db8::1]:4"]),
        st.sampled_from([None, 0, 1]),
        st.sampled_from([0.0, 1.0, 2.0, 50.0]),
        st.integers(0, 3),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=30,
)


@given(
    given=SESSIONS,
    query=st.builds(
        SessionQuery,
        relay=st.sampled_from([None, "web", "db"]),
        client=st.sampled_from([None, "10.0.0.1", "10.0.0.0/16", "2001:db8::/64"]),
        server=st.sampled_from([None, "a", "b/host:80", "nobody"]),
        sort=st.sampled_from([None, "bytes", "age", "rate"]),
        limit=st.integers(0, 12),
    ),
)
def test_lists_are_as_a_simple_model_says(given: Any, query: Any) -> None:
    servers = [
        Server(FakeEndpoint(), f"{label}/host:80", label=label) for label in "ab"
    ]
    made = {"web": Records(), "db": Records()}
    everything = []
    for ident, (client, server, age, up, down, web) in enumerate(given, 1):
        session = a_session(
            ident,
            client,
            age=age,
            moved=(up, down),
            server=None if server is None else servers[server],
            upstream="" if server is None else servers[server].name,
        )
        made["web" if web else "db"].add(session)
        everything.append(("web" if web else "db", session))

    there = [each for each in everything if query.relay in (None, each[0])]

    def is_meant(session: Session) -> bool:
        if query.client is not None:
            host = session.client.rpartition(":")[0].strip("[]")
            address = ipaddress.ip_address(host)
            if address not in ipaddress.ip_network(query.client):
                return False
        if query.server is None:
            return True
        server = session.server
        return server is not None and query.server in (server.name, server.label)

    def weight(session: Session) -> float:
        moved, age = session.up.read + session.down.read, 100 - session.opened_at
        rate = moved / age if age else 0.0
        return {"bytes": moved, "age": age, "rate": rate, None: age}[query.sort]

    meant = [session for _, session in there if is_meant(session)]
    meant.sort(key=lambda each: (-weight(each), each.id))
    shows = [shown(each, name=name) for name, each in made.items()]
    answer = whole(sessions(shows, query))
    assert ids(answer) == [each.id for each in meant[: query.limit]]
    assert (answer["matched"], answer["total"]) == (len(meant), len(there))


@given(st.data())
def test_sessions_that_come_and_go_meanwhile(data: st.DataObject) -> None:
    """Who lived when the list was begun, and does as it is told, is in it once."""
    records = Records([a_session(n) for n in range(1, 3 * PART)])
    before = set(records.protocols)
    work, next_id, gone = sessions([shown(records)], SessionQuery()), 3 * PART, set()
    while True:
        try:
            next(work)
        except StopIteration as done:
            answer: Any = done.value
            break
        for _ in range(data.draw(st.integers(0, 3))):
            ident = data.draw(st.sampled_from(sorted(records.protocols)))
            records.end(ident)
            gone.add(ident)
            records.add(a_session(next_id))
            next_id += 1
    found = ids(answer)
    assert len(found) == len(set(found))
    assert set(found) <= before
    assert before - gone <= set(found)
    assert answer["matched"] == answer["total"] >= len(found)


def test_ten_thousand_are_told_in_small_parts() -> None:
    records = Records([a_session(n) for n in range(10_000)])
    work = sessions([shown(records)], SessionQuery(sort="bytes", limit=10_000))
    assert steps(work) >= 3 * 10_000 // PART


def test_pools_are_none_of_a_proxys() -> None:
    """What is shown of a relay need have no servers."""
    assert shown(SimpleNamespace(pool=Pool([]))).pools
    assert not shown(SimpleNamespace()).pools

"""What an explanation says is what the gate, the pool and the policy do."""

from __future__ import annotations

import ipaddress
import json
import tomllib
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.admission.client_rules import parse_client_rule
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates, HoursGate, RulesGate
from relayd.admission.hours import OpeningHours, parse_hours
from relayd.admission.per_client import ConnectRate
from relayd.admission.session_limits import SessionLimits
from relayd.configuring.config import Admission, Config, Relay, Socks4Relay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.errors import ConfigError, Refused
from relayd.core.flows import NewFlow
from relayd.core.ordinals import Ordinals
from relayd.operating.explaining import (
    State,
    explain,
    explain_file,
    relay_of,
    relay_of_file,
)
from relayd.operating.explaining_pools import pool_of, why_not
from relayd.operating.explanation import client_of, destination_of, instant_of
from relayd.upstreams.balance import First
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


def config_of(toml: str) -> Config:
    """The settings that a file with this text makes."""
    given = json.dumps(tomllib.loads(toml)).encode()
    return configure(read_layers("-", BytesIO(given)))


def one(toml: str) -> Any:
    """The only relay of a file."""
    return config_of(toml).relays[0]


def web(extra: str = "", dest: str = '"10.0.0.1:80"') -> Any:
    return one(f'[tcp.web]\nlisten = "127.0.0.1:8080"\ndest = {dest}\n{extra}')


def steps(found: Any) -> dict[str, tuple[str, str]]:
    """The last step of each name."""
    return {each.step: (each.result, each.why) for each in found.steps}


# -- as the real gate

ADDRESSES = st.ip_addresses(network="10.0.0.0/29") | st.ip_addresses(
    network="2001:db8::/125"
)
NETWORKS = st.builds(
    lambda address, length: str(
        ipaddress.ip_network(f"{address}/{address.max_prefixlen - length}", False)
    ),
    ADDRESSES,
    st.integers(0, 3),
)
RULES = st.lists(
    st.builds(
        lambda text, allow: parse_client_rule(text, allow=allow),
        NETWORKS | st.just("unix"),
        st.booleans(),
    ),
    max_size=5,
)
HOURS = st.lists(
    st.builds(
        lambda begin, length, zone: parse_hours(
            f"{begin:02}:00-{(begin + length) % 24:02}:00 {zone}"
        ),
        st.integers(0, 23),
        st.integers(1, 23),
        st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]),
    ),
    max_size=2,
)
MOMENTS = st.integers(0, 400 * 24 * 60).map(lambda n: NOW + timedelta(minutes=n))
CLIENTS = ADDRESSES.map(str) | st.just("unix")


class Real:
    """A gate of these settings, as a relay has it, at a moment."""

    def __init__(self, rules: Any, hours: Any, moment: Any, limits: Any) -> None:
        self.moment, self.clock = moment, Clock()
        rate, most, each, queue = limits
        gates: list[Any] = []
        if rules:
            gates.append(RulesGate(rules))
        if hours:
            opening = OpeningHours(hours, self.clock, lambda: self.moment)
            gates.append(HoursGate(opening))
        if rate:
            gates.append(ConnectRates(ConnectRate(rate, 60.0), self.clock))
        if most or each:
            limit = SessionLimits(
                *(most, each), queue=queue if most else None, clock=self.clock
            )
            gates.append(limit)
        self.gate = Gates(gates)

    def enter(self, client: str) -> tuple[str, Any]:
        """What becomes of a client, and what it holds."""
        name = client_of(client)
        try:
            lease = self.gate.enter(NewFlow(name, name, "", "web"))
        except Refused as refusal:
            return refusal.why, None
        if hasattr(lease, "cr_frame"):
            # A coroutine does nothing until it is driven.
            from twisted.internet.defer import ensureDeferred

            return "waits", ensureDeferred(lease)
        return "", lease


OPTIONAL = st.none() | st.integers(1, 3)


@settings(max_examples=70)
@given(
    RULES,
    HOURS,
    MOMENTS,
    st.tuples(OPTIONAL, OPTIONAL, OPTIONAL, OPTIONAL),
    st.lists(CLIENTS, max_size=8),
)
def test_it_agrees_with_the_gate(
    rules: Any, hours: Any, moment: datetime, limits: Any, clients: list[str]
) -> None:
    """For each of those who come, those who come before it still being there."""
    real = Real(rules, hours, moment, limits)
    relay = Relay(["x"], ["y"], "web", admission=Admission(clients=rules, hours=hours))  # type: ignore[list-item]
    state = State(gate=real.gate, pool=Pool([Server(None, "y")]))  # type: ignore[arg-type]
    held = []
    for client in clients:
        twice = [explain(relay, client, at=moment, state=state) for _ in range(2)]
        assert twice[0] == twice[1], "asking changes nothing"
        found = twice[0]
        told, lease = real.enter(client)
        assert found.admitted == (told in ("", "waits"))
        if not found.admitted:
            why = found.steps[-1].why
            assert told in why or told.removeprefix("outside ") in why
        waits = any(each.result == "waits" for each in found.steps)
        assert waits == (told == "waits")
        held.append(lease)
    for lease in held:
        if hasattr(lease, "cancel"):
            lease.addErrback(lambda _: None)
            lease.cancel()
    assert not real.clock.getDelayedCalls()


def test_each_step_in_the_order_in_which_clients_meet_them() -> None:
    relay = web(
        'clients = ["allow 10.0.0.0/8"]\nhours = "08:00-18:00 Europe/Berlin"\n'
        'max_connects_per_client = "10/60"\nmax_sessions = 5\nqueue = 2\n'
        'max_sessions_per_client = 2\nbandwidth = "1MB"\nmax_age = "1h"\n'
        'accept_proxy = "192.0.2.0/24"\n'
    )
    found = explain(relay, "10.0.0.5", at="2026-12-24T08:00")
    assert found.admitted
    assert found.server == "10.0.0.1:80"
    assert [(each.step, each.result) for each in found.steps] == [
        ("accept_proxy", "ok"),
        ("rules", "ok"),
        ("hours", "ok"),
        ("rates", "ok"),
        ("limits", "ok"),
        ("queue", "ok"),
        ("age", "limited"),
        ("bandwidth", "limited"),
        ("pool", "1 of 1 can be chosen"),
        ("server", "10.0.0.1:80"),
    ]
    said = steps(found)
    assert said["rules"] == ("ok", "--allow-client 10.0.0.0/8")
    assert said["hours"][1].startswith("Thu 2026-12-24 08:00 Europe/Berlin is within")
    assert said["rates"][1] == "--max-connects-per-client 10/60: 10 left at once"
    assert said["limits"][1] == (
        "--max-sessions 5: 0 now; --max-sessions-per-client 2: 0 now"
    )
    assert str(found).endswith("\nadmitted, to 10.0.0.1:80")
    early = explain(relay, "10.0.0.5", at="2026-12-24T07:59")
    assert early.steps[-1].step == "hours"
    assert not early.admitted
    assert str(early).endswith("\nrefused")
    with pytest.raises(LookupError, match="no step 'pool'"):
        early.said("pool")


def test_without_rules_all_are_served() -> None:
    found = explain(web(), "2001:db8::5")
    assert found.said("rules").why == "no rule: all are served"
    assert found.said("hours").why == "no hours: always"
    denied = web('clients = ["deny 10.0.0.0/8"]')
    said = explain(denied, "192.0.2.1").said("rules")
    assert (said.result, said.why) == (
        *("ok", "no rule is about this client, and none allows others"),
    )
    refused = explain(web('clients = ["allow 10.0.0.0/8"]'), "unix")
    assert refused.said("rules").why == "no --allow-client names this client"


def test_a_peer_that_has_to_say_whose_connection_it_is() -> None:
    relay = web('accept_proxy = ["192.0.2.0/24", "unix"]')
    for peer in ("192.0.2.7", "192.0.2.7:40000", "::ffff:192.0.2.7", "unix"):
        result = explain(relay, peer).said("accept_proxy").result
        assert result == "a header is expected"
    assert explain(relay, "10.0.0.1").said("accept_proxy").result == "ok"


# -- pools

THREE = '["10.0.0.1:80", "10.0.0.2:80,weight=2", "10.0.0.3:80,backup"]'


def test_which_servers_may_be_chosen_and_which_not() -> None:
    dest = (
        '["10.0.0.1:80,disabled", "10.0.0.2:80,weight=0", "10.0.0.3:80",'
        ' "10.0.0.4:80,backup"]'
    )
    found = explain(web(dest=dest), "10.0.0.5")
    assert found.server == "10.0.0.3:80"
    assert [each.why for each in found.steps if each.result == "not chosen"] == [
        "10.0.0.1:80: it is disabled",
        "10.0.0.2:80: its weight is 0",
        "10.0.0.4:80: it is a backup, and one before it can be chosen",
    ]


@given(
    *(st.booleans() for _ in range(5)),
    st.sampled_from([None, "up", "down", "drain"]),
    st.integers(0, 2),
    st.none() | st.integers(1, 2),
    st.integers(0, 2),
)
def test_why_a_server_is_not_chosen(
    disabled: bool,
    draining: bool,
    up: bool,
    ejected: bool,
    on_trial: bool,
    word: Any,
    weight: int,
    limit: int | None,
    sessions: int,
) -> None:
    """There is a reason exactly if it can't be chosen, and a known one."""
    nowhere: Any = None
    server = Server(nowhere, "a", disabled=disabled, weight=weight, max_sessions=limit)
    server.draining, server.checked_up, server.ejected = draining, up, ejected
    server.on_trial, server.sessions, server.operator = on_trial, sessions, word
    if not up:
        server.why = "connection refused"
    pool = Pool([server], First())
    why = why_not(server, pool.candidates)
    assert bool(why) == (pool.choose(NewFlow("10.0.0.1:1", "", "", "")) is None)
    assert why != "it can't be chosen now"
    assert "no address" not in why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"operator": "drain"}, "it is drain: "),
        ({"operator": "down"}, "it is down: "),
        ({"ejected": True, "why": "3 dials failed"}, "it is ejected: 3 dials failed"),
        ({"draining": True}, "it is draining: it is none of its pool's servers"),
        ({"sessions": 4}, "it has as many sessions as it may have: max=4"),
    ],
)
def test_in_which_words(change: dict[str, Any], why: str) -> None:
    nowhere: Any = None
    server = Server(nowhere, "a", max_sessions=4)
    for name, value in change.items():
        setattr(server, name, value)
    assert why_not(server, Pool([server], First()).candidates).startswith(why)


@pytest.mark.parametrize(
    ("balance", "server", "why"),
    [
        ("round-robin", None, "whose turn it is can't be told before"),
        ("least-sessions", None, "whose turn it is can't be told before"),
        ("random", None, "chance decides"),
        ("first", "10.0.0.1:80", "before the others, in their order"),
        ("client-hash", "10.0.0.2:80", "the same for this client, while it is usable"),
    ],
)
def test_a_choice_that_can_be_told_before(
    balance: str, server: str | None, why: str
) -> None:
    relay = web(f'balance = "{balance}"', THREE)
    found = explain(relay, "10.0.0.9")
    assert found.admitted
    assert found.server == server
    assert found.steps[-1].why == f"{balance}: {why}"
    assert found.steps[-1].result == (server or "one of these")


@given(
    st.sampled_from(["round-robin", "least-sessions", "client-hash", "first"]),
    st.lists(st.integers(1, 9), max_size=12),
)
def test_it_agrees_with_a_pool_that_runs(balance: str, hosts: list[int]) -> None:
    relay = web(f'balance = "{balance}"', THREE)
    pool, ordinals = pool_of(relay), Ordinals()
    factory = SimpleNamespace(gate=None, pool=pool, ordinals=ordinals)
    for host in hosts:
        client = f"10.1.0.{host}:1"
        found = explain(relay, client, state=State.of(factory))
        asked = NewFlow(client, client, "", "web", next(ordinals))
        chosen = pool.choose(asked)
        assert isinstance(chosen, Server)
        assert found.server == chosen.name
        chosen.began()


@pytest.mark.parametrize(
    ("when_none", "admitted", "result"),
    [("fail", False, "refused"), ("wait=5", True, "waits"), ("try-all", True, "a")],
)
def test_no_server_that_can_be_chosen(
    when_none: str, admitted: bool, result: str
) -> None:
    relay = web(f'when_none = "{when_none}"', '["10.0.0.1:80,name=a,weight=2"]')
    pool = pool_of(relay)
    pool.servers[0].checked(up=False, why="connection refused")
    found = explain(relay, "10.0.0.9", state=State(pool=pool))
    assert found.admitted == admitted
    last = found.steps[-1]
    assert last.result == ("a/10.0.0.1:80" if result == "a" else result)
    if result != "a":
        assert last.why.endswith(f"--when-none {when_none}")
        out = "a/10.0.0.1:80: it is down: connection refused"
        assert found.steps[-2].why == out


def test_names_are_not_looked_up() -> None:
    found = explain(web(dest='["dns:db.example.com:5432"]'), "10.0.0.9")
    assert found.admitted
    assert found.server is None
    assert found.steps[-1].result == "not known"
    assert "dns:db.example.com:5432: not looked up" in found.steps[-1].why


def test_ranges_of_ports_are_told_of_the_first() -> None:
    relay = one('[tcp.web]\nlisten = "5000-5002"\ndest = "10.0.0.5:6000-6002"')
    found = explain(relay, "10.0.0.9")
    assert found.server == "10.0.0.5:6000"
    assert found.said("pool").why.endswith("; likewise for each of its 3 ports")


def test_long_pools_are_shortened() -> None:
    dest = [f"10.0.{n}.1:80{',disabled' * (n % 2)}" for n in range(60)]
    found = explain(web(dest=str(dest).replace("'", '"')), "10.0.0.9")
    assert found.said("pool").why.endswith(", 10.0.38.1:80 and 10 more")
    assert [each.why for each in found.steps if each.result == "not chosen"][-1] == (
        "10 more"
    )


# -- datagrams


def test_udp() -> None:
    relay = one(
        '[udp.dns]\nlisten = "5300"\ndest = ["10.0.0.1:53", "ns.example.com:53"]\n'
        'balance = "client-hash"\nmax_flows = 100\nmax_flows_per_client = 3'
    )
    found = explain(relay, "10.0.0.5:4000")
    assert found.server in ("10.0.0.1:53", "ns.example.com:53")
    assert found.server == explain(relay, "10.0.0.5:4001").server
    assert [each.step for each in found.steps] == [
        *("rules", "hours", "rates", "limits", "bandwidth", "pool", "server"),
    ]
    assert found.said("limits").why == (
        "--max-flows 100, --max-flows-per-client 3: a new flow takes the place of one"
        " not in use"
    )
    one_server = one('[udp.dns]\nlisten = "5300"\ndest = "ns.example.com:53"')
    assert explain(one_server, "10.0.0.5").server == "ns.example.com:53"
    each = one(
        '[udp.log]\nlisten = "5140"\ndest = ["10.0.0.1:514", "10.0.0.2:514"]\n'
        'udp_balance = "datagram"'
    )
    found = explain(each, "10.0.0.5")
    assert (found.admitted, found.server) == (True, None)
    assert found.steps[-1].why == "--udp-balance datagram: each datagram has its own"


# -- proxies

PROXY = """
[socks4.out]
listen = ["127.0.0.1:1080", "192.0.2.1:1080"]
clients = ["allow 10.0.0.0/8", "allow 127.0.0.1"]
destinations = ["deny *:25", "allow 10.9.0.0/16", "deny *.bad.example"]
"""


@pytest.mark.parametrize(
    ("dest", "why"),
    [
        ("198.51.100.7:25", "198.51.100.7 is denied by --deny-dest *:25"),
        ("10.8.0.1:80", "10.8.0.1 is private: it takes --allow-dest 10.0.0.0/8"),
        ("224.0.0.1:80", "224.0.0.1 is multicast"),
        ("x.bad.example:80", "is denied by --deny-dest *.bad.example"),
        ("[::1]:80", "::1 is loopback: it takes --allow-dest ::1/128"),
    ],
)
def test_destinations_that_are_refused(dest: str, why: str) -> None:
    found = explain(one(PROXY), "10.0.0.5", dest=dest)
    assert not found.admitted
    assert found.server is None
    assert found.steps[-1].step == "destination"
    assert why in found.steps[-1].why


def test_destinations_that_are_not() -> None:
    proxy = one(PROXY)
    found = explain(proxy, "10.0.0.5", dest="10.9.0.1:80")
    assert (found.admitted, found.server) == (True, "10.9.0.1:80")
    assert found.said("destination").why.startswith("--allow-dest 10.9.0.0/16")
    named = explain(proxy, "10.0.0.5", dest="good.example:80")
    assert (named.admitted, named.server) == (True, "good.example:80")
    assert "not looked up here" in named.steps[-1].why
    assert explain(proxy, "10.0.0.5").steps[-1].result == "not known"
    everything = one(PROXY.replace('"deny *:25"', '"deny 0.0.0.0/0"'))
    refused = explain(everything, "10.0.0.5", dest="good.example:80").steps[-1]
    assert refused.why.startswith("good.example, at whatever public IPv4 address, is")


@pytest.mark.parametrize(
    "rule", ["deny 203.0.113.0/24", "deny 198.51.100.1", "allow 203.0.113.0/24"]
)
def test_a_name_is_not_taken_for_an_address_that_a_rule_means(rule: str) -> None:
    proxy = one(f'[socks4.out]\nlisten = "127.0.0.1:1080"\ndestinations = ["{rule}"]')
    found = explain(proxy, "127.0.0.1", dest="example.com:80")
    assert found.admitted
    assert found.said("destination").why == "no rule is about it"


def test_users_and_ident() -> None:
    proxy = one(
        '[socks4.out]\nlisten = "127.0.0.1:1080"\nuserid = ["joe"]\nident = true'
    )
    assert not explain(proxy, "127.0.0.1").admitted
    found = explain(proxy, "127.0.0.1", user="joe", dest="198.51.100.7:80")
    assert found.said("user").why == "--userid joe"
    assert found.said("ident").result == "not known"
    assert isinstance(proxy, Socks4Relay)


# -- what is asked


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("10.0.0.5", "10.0.0.5:0"),
        ("10.0.0.5:80", "10.0.0.5:80"),
        ("::ffff:10.0.0.5", "10.0.0.5:0"),
        ("2001:db8::5", "[2001:db8::5]:0"),
        ("[2001:db8::5]:9", "[2001:db8::5]:9"),
        ("[2001:db8::5]", "[2001:db8::5]:0"),
        ("fe80::1%eth0", "[fe80::1%eth0]:0"),
        ("unix", "unix:"),
        ("unix:/run/x", "unix:"),
    ],
)
def test_how_clients_are_written(text: str, name: str) -> None:
    assert client_of(text) == name


@given(st.text(max_size=20) | st.text("[]%:.0189af", max_size=9))
@example("[]")
@example("[]:80")
@example(":80")
@example("%")
def test_anything_else_is_one_clear_line(text: str) -> None:
    for read, noun in (
        (client_of, "client"),
        (destination_of, "destination"),
        (lambda given: instant_of(given, ()), "time"),
    ):
        try:
            read(text)
        except ConfigError as problem:
            assert str(problem).startswith(f"bad {noun} {text!r}: expected ")


def test_instants() -> None:
    berlin, york = (
        parse_hours("08:00-18:00 Europe/Berlin"),
        parse_hours("08:00-18:00 America/New_York"),
    )
    assert instant_of("2026-12-24T03:00", [berlin]).astimezone(UTC).hour == 2
    assert instant_of("2026-12-24T03:00", []).astimezone(UTC).hour == 3
    assert instant_of("2026-12-24T03:00+05:00", [berlin]).astimezone(UTC).day == 23
    assert instant_of(NOW, [berlin, york]) is NOW
    with pytest.raises(ConfigError, match="Europe/Berlin, America/New_York: give it"):
        instant_of("2026-12-24T03:00", [berlin, york])
    with pytest.raises(ConfigError, match="set forward past it"):
        instant_of("2026-03-29T02:30", [berlin])


def test_a_destination_is_for_proxies() -> None:
    with pytest.raises(ConfigError, match="are for SOCKS4 proxies"):
        explain(web(), "10.0.0.5", dest="10.0.0.1:80")


# -- of a file

TWO = """
[tcp.web]
listen = "8080"
dest = "10.0.0.1:80"
clients = "allow 10.0.0.0/8"
[tcp.mail]
listen = "8025"
dest = "10.0.0.2:25"
"""


def test_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "relayd.toml"
    path.write_text(TWO)
    found = explain_file(str(path), "web", "192.0.2.1")
    assert found == {
        "admitted": False,
        "steps": [
            {
                "step": "accept_proxy",
                "result": "ok",
                "why": "no --accept-proxy: who connects is the client",
            },
            {
                "step": "rules",
                "result": "refused",
                "why": "no --allow-client names this client",
            },
        ],
        "server": None,
    }
    assert explain_file(str(path), "mail", "192.0.2.1")["server"] == "10.0.0.2:25"
    for name, why in ((None, "which relay"), ("ftp", "there is no relay 'ftp'")):
        with pytest.raises(ConfigError, match=f"{why}: there are web, mail$"):
            explain_file(str(path), name, "192.0.2.1")
    path.write_text(TWO.replace("8025", "eighty").replace("dest", "desst", 1))
    with pytest.raises(ConfigError) as problem:
        relay_of_file(str(path), "web")
    assert len(str(problem.value).splitlines()) == 3


def test_relays_of_settings() -> None:
    config = config_of(TWO)
    assert relay_of(config, "mail") is config.relays[1]
    unnamed = config_of('[tcp.web]\nlisten = "80"\ndest = "10.0.0.1:80"')
    assert relay_of(unnamed) is unnamed.relays[0]


def test_a_relay_that_is_stopped() -> None:
    found = explain(web(), "10.0.0.5", state=State(stopped="it was stopped"))
    assert not found.admitted
    assert [str(each) for each in found.steps] == ["state: refused: it was stopped"]
    found = explain(web("enabled = false"), "10.0.0.5")
    assert [str(each) for each in found.steps] == [
        "state: refused: it is stopped at start: enabled = false"
    ]


def test_a_relay_that_is_paused() -> None:
    found = explain(web(), "10.0.0.5", state=State(held=True))
    assert (found.admitted, found.server) == (True, "10.0.0.1:80")
    assert str(found.steps[0]) == "state: waits: it is paused: until relayctl resume"

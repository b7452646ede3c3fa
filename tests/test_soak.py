"""The soak's pure parts: its pattern, what it draws, what it reads, its verdict.

The rest is a program that is run by hand: `python -m bench.soak`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.soak import listener_hosts, parse_arguments, relay_options
from bench.soak_ends import (
    CHUNK,
    PERIOD,
    End,
    Violation,
    check_time,
    pattern_bytes,
    pattern_matches,
    pattern_start,
)
from bench.soak_log import RelayLog, SessionLine, parse_session_line
from bench.soak_relay import MIB, Reading, count_kinds
from bench.soak_scripts import SCRIPTS, Session, Where, draw_session
from bench.soak_stops import Stops
from bench.soak_traffic import HOSTS, client_host, judge_line
from bench.soak_verdict import PIPE_BOUND, Outcome, failures
from bench.soak_violations import Violations
from relayd.session import Ending

# -- the pattern

positions = st.integers(min_value=0, max_value=3 * PERIOD)
starts = st.integers(min_value=0, max_value=PERIOD - 1)
counts = st.integers(min_value=1, max_value=CHUNK)


@given(start=starts, position=positions, count=counts)
def test_what_is_sent_is_what_is_expected(
    start: int, position: int, count: int
) -> None:
    data = pattern_bytes(start, position, count)
    assert len(data) == count
    assert pattern_matches(start, position, data)


@pytest.mark.parametrize("lost", [1, 512, CHUNK])
def test_lost_or_doubled_bytes_show(lost: int) -> None:
    data = pattern_bytes(17, 4096 + lost, 16)
    assert not pattern_matches(17, 4096, data)
    assert not pattern_matches(17, 4096 + 2 * lost, data)


def test_another_session_or_direction_shows() -> None:
    seen = {
        bytes(pattern_bytes(pattern_start(number, up), 0, 16))
        for number in range(1, 5000)
        for up in (False, True)
    }
    assert len(seen) == 2 * 4999


def test_a_wrong_byte_shows_wherever_it_is() -> None:
    data = bytearray(pattern_bytes(0, PERIOD - 10, CHUNK))
    data[-1] ^= 1
    assert not pattern_matches(0, PERIOD - 10, bytes(data))


# -- what an end sees


def ends(*, shut: bool, sent: int, stops: Stops | None = None) -> tuple[End, End]:
    """A client that is about to see an end of data, and its server."""
    session = draw_session(1, 1)
    sock: Any = SimpleNamespace(fileno=lambda: -1)
    stops = stops or Stops()
    client = session.client = End(sock, session, True, stops)
    server = session.server = End(sock, session, False, stops)
    server.shut, server.sent = shut, sent
    return client, server


@pytest.mark.parametrize(
    ("shut", "sent", "wrong"),
    [(True, 100, ""), (True, 101, "100 of 101"), (False, 100, "nobody sent")],
)
def test_an_end_must_be_the_peers_and_behind_all_it_sent(
    shut: bool, sent: int, wrong: str
) -> None:
    async def run() -> None:
        client, _ = ends(shut=shut, sent=sent)
        client.received = 100
        client.check_end()

    if wrong:
        with pytest.raises(Violation, match=wrong):
            asyncio.run(run())
    else:
        asyncio.run(run())


@pytest.mark.parametrize(("waited", "fine"), [(2.9, False), (3.0, True), (8.1, False)])
def test_a_cut_is_neither_early_nor_late(waited: float, fine: bool) -> None:
    if fine:
        check_time("cut", waited, 3, 8)
    else:
        with pytest.raises(Violation, match=r"cut after .* expected 3\.0 to 8\.0 s"):
            check_time("cut", waited, 3, 8)


@pytest.mark.parametrize("stopped", [0.0, 10.0])
def test_a_cut_may_be_later_by_what_the_relay_was_stopped(stopped: float) -> None:
    async def run() -> None:
        stops = Stops()
        client, server = ends(shut=True, sent=0, stops=stops)
        now = asyncio.get_running_loop().time()
        stops.begin(now - 15)
        stops.end(now - 15 + stopped)
        poll: Any = SimpleNamespace(register=lambda *_: None, poll=lambda _: [1])
        client.moved_at = server.moved_at = now - 20
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bench.soak_ends.select.poll", lambda: poll)
            await client.until_cut(5, early=True)

    if stopped:
        asyncio.run(run())
    else:
        with pytest.raises(Violation, match=r"cut after 20\.\d s, expected"):
            asyncio.run(run())


# -- what is drawn


def drawn(session: Session) -> tuple[object, ...]:
    return attrs.astuple(session, recurse=False)


def test_a_seed_draws_the_same_sessions_again() -> None:
    first = [drawn(draw_session(7, number)) for number in range(1, 200)]
    assert first == [drawn(draw_session(7, number)) for number in range(1, 200)]
    assert first != [drawn(draw_session(8, number)) for number in range(1, 200)]


def test_every_script_is_drawn() -> None:
    names = {draw_session(7, number).script.name for number in range(1, 5000)}
    assert names == {script.name for script in SCRIPTS}
    assert len(names) == len(SCRIPTS)


def test_scripts_expect_endings_that_there_are() -> None:
    words = {ending.word for ending in Ending}
    assert {word for script in SCRIPTS for word in script.endings} <= words


# -- the log

LINE = (
    "2026-11-21T01:05:51+0000 [relayd.session#info] session=17 relay=relay1"
    " client=127.0.0.1:5151 listener=127.0.0.3:8080 upstream=127.0.0.2:80"
    " duration=0.123 up=78 down=1048 ending=done code=--"
)


def test_a_session_line() -> None:
    assert parse_session_line(LINE) == SessionLine(
        client="127.0.0.1:5151",
        listener="127.0.0.3:8080",
        duration=0.123,
        up=78,
        down=1048,
        ending="done",
    )


def test_a_session_line_with_a_detail_and_without_a_server() -> None:
    line = LINE.replace("=127.0.0.2:80 ", "=- ").replace(
        "ending=done code=--", "ending=idle code=cD detail='nothing moved for 20 s'"
    )
    found = parse_session_line(line)
    assert found is not None
    assert found.ending == "idle"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "2026-11-21T01:05:51+0000 [relayd.service#info] SIGTERM: stopping",
        LINE.replace("relayd.session#info", "relayd.stream#critical"),
        LINE.replace(" ending=done code=--", ""),
    ],
)
def test_other_lines_are_not_of_a_session(line: str) -> None:
    assert parse_session_line(line) is None


def test_the_relays_log_is_counted() -> None:
    log = RelayLog()
    session = log.hear(LINE)
    assert session is not None
    for line in (
        "… [relayd.service#info] listening on 127.0.0.1:4000, relaying to 127.0.0.1:9",
        "… [relayd.service#info] listening on 127.0.0.2:4001, relaying to 127.0.0.1:9",
        "… [relayd.listening#warn] 127.0.0.1:4000: hardly any descriptor is left",
        "… [relayd.stream#critical] session 3 failed",
        "\tTraceback (most recent call last):",
        "\tbuiltins.ValueError: x",
        "… [relayd.wheel#error] x",
    ):
        assert log.hear(line) is None
    assert log.listeners == ["127.0.0.1:4000", "127.0.0.2:4001"]
    assert log.troubles == 3
    assert len(log.remarks) == 5


def test_a_clock_that_is_set_shows_in_the_log() -> None:
    log = RelayLog()
    for line, steps in (
        ("2026-11-21T01:05:51+0000 [x#info] a", 0),
        ("2026-11-21T01:06:13+0000 [x#info] b", 0),
        ("2026-11-21T03:06:13+0000 [x#info] c", 1),
        ("\tbuiltins.ValueError: x", 1),
        ("2026-11-21T03:06:14+0000 [x#info] d", 1),
        ("2026-11-21T01:06:15+0000 [x#info] e", 2),
    ):
        log.hear(line)
        assert log.steps == steps


def test_the_relays_remarks_are_bounded() -> None:
    log = RelayLog()
    for _ in range(10 * log.REMARKS):
        log.hear("[x#error] again")
    assert log.troubles == 10 * log.REMARKS
    assert len(log.remarks) == log.REMARKS


def session_of(name: str) -> Session:
    for number in range(1, 5000):
        session = draw_session(1, number)
        if session.script.name == name:
            return session
    raise LookupError(name)


def line_of(
    ending: str, up: int = 0, down: int = 0, duration: float = 0.0
) -> SessionLine:
    return SessionLine("127.0.0.1:1", "127.0.0.1:2", duration, up, down, ending)


def judged(line: SessionLine, session: Session, stops: Stops | None = None) -> str:
    """What is wrong with a line about a session that began ten seconds ago."""
    began_at = session.client.opened_at if session.client else 0.0
    return judge_line(line, session, began_at + 10, stops or Stops())


def test_the_logs_ending_must_be_one_of_the_scripts() -> None:
    session = session_of("client stalls")
    assert not judged(line_of("downstream_stalled"), session)
    assert "expected downstream_stalled" in judged(line_of("done"), session)


@pytest.mark.parametrize(
    ("duration", "fine"),
    [(-0.001, False), (0.0, True), (10.0, True), (10.1, False), (-3576.9, False)],
)
def test_the_logs_duration_must_be_possible(duration: float, fine: bool) -> None:
    async def run() -> None:
        client, _ = ends(shut=True, sent=0)
        [ending, *_] = client.session.script.endings
        wrong = judged(line_of(ending, duration=duration), client.session)
        assert (wrong == "") is fine
        assert fine or wrong.startswith(f"duration={duration:.3f} in the log, 10.000 s")

    asyncio.run(run())


@pytest.mark.parametrize("stopped", [False, True])
def test_some_endings_are_due_to_a_stop(stopped: bool) -> None:
    async def run() -> None:
        stops = Stops()
        client, _ = ends(shut=True, sent=0, stops=stops)
        client.session.script = session_of("client leaves during the dial").script
        if stopped:
            stops.begin(client.opened_at + 1)
        wrong = judged(line_of("connect_timeout"), client.session, stops)
        assert (wrong == "") is stopped
        assert judged(line_of("idle"), client.session, stops)

    asyncio.run(run())


def test_the_logs_bytes_must_be_those_that_were_sent() -> None:
    async def run() -> None:
        client, _ = ends(shut=True, sent=20)
        client.sent = 10
        session = client.session
        session.script = session_of("bulk up").script
        assert not judged(line_of("done", up=10, down=20), session)
        wrong = judged(line_of("done", up=10, down=19), session)
        assert "sent were 10 and 20" in wrong

    asyncio.run(run())


def test_clients_addresses_are_loopback_and_seldom_shared() -> None:
    hosts = Counter(client_host(number) for number in range(1 << 19))
    assert all(ip_address(host).is_loopback for host in hosts)
    assert max(hosts.values()) == len(HOSTS)


def test_violations_are_counted_once_a_session_and_told_a_few_times() -> None:
    violations = Violations()
    for number in range(1, 400):
        session = draw_session(1, number)
        violations.add(session, "client", "wrong bytes")
        violations.add(session, "server", "so what")
    assert violations.count == 399
    assert len(violations.lines()) == violations.FIRST


def test_a_violation_has_the_logs_word() -> None:
    violations = Violations()
    session = session_of("idle for ever")
    violations.add(session, "client", "hung")
    session.ending = "done"
    assert violations.lines() == [
        f"idle for ever, connection {session.number}, client: hung; ending=done"
    ]


# -- the relay


def test_kinds_of_descriptors() -> None:
    assert count_kinds(
        [
            "socket:[4711]",
            "socket:[4712]",
            "pipe:[13]",
            "anon_inode:[eventpoll]",
            "/dev/null",
            "/tmp/socket:[1]",
        ]
    ) == {"socket": 2, "pipe": 1, "other": 3}


def test_each_listener_has_its_destinations() -> None:
    @attrs.frozen
    class Servers:
        addresses: dict[Where, list[str]]

    servers = Servers({where: [f"127.0.0.1:{where.name}"] for where in Where})
    options = relay_options("plane", servers)  # type: ignore[arg-type]
    assert options[:2] == ["--transport", "plane"]
    listening = [i for i, option in enumerate(options) if option == "--listen"]
    assert [options[i + 3] for i in listening] == [
        f"127.0.0.1:{where.name}" for where, _ in listener_hosts()
    ]


# -- the verdict

QUIET = Reading(sockets=11, pipes=6, other=3, rss=50 * MIB, threads=1, cpu=1.0)
LOAD = attrs.evolve(QUIET, sockets=4011, pipes=60, rss=60 * MIB)
FINE = Outcome(
    start=attrs.evolve(QUIET, rss=48 * MIB),
    baseline=QUIET,
    load=[LOAD] * 9,
    final=QUIET,
    violations=0,
    troubles=0,
    failed=0,
    status=0,
)


def final(**changes: int) -> Outcome:
    return attrs.evolve(FINE, final=attrs.evolve(QUIET, **changes))


def load(sizes: Sequence[float]) -> Outcome:
    return attrs.evolve(
        FINE, load=[attrs.evolve(LOAD, rss=int(size * MIB)) for size in sizes]
    )


@pytest.mark.parametrize(
    "outcome",
    [
        FINE,
        final(rss=57 * MIB),
        final(rss=30 * MIB),
        load([60]),
        load([60, 63.9]),
        # The outliers of a busy moment.
        load([60, 60, 75, 60, 61, 60, 60, 75, 60]),
        # What the first minute adds shows in no comparison.
        load([50, 60, 61, 62, 63, 63, 63, 63, 63]),
    ],
)
def test_a_soak_that_passes(outcome: Outcome) -> None:
    assert failures(outcome) == []


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (final(sockets=12), "sockets: 12 at the end, 11 at the start"),
        (final(sockets=10), "sockets: 10 at the end, 11 at the start"),
        (final(pipes=8), "pipes: 8 at the end, 6 at the start"),
        (final(other=4), "other descriptors: 4 at the end, 3 at the start"),
        (final(threads=2), "threads: 2 at the end, 1 at the start"),
        (
            final(rss=59 * MIB),
            "rss in quiet: from 50.0 to 59.0 MiB, 8.0 MiB more allowed",
        ),
        (
            load([60, 60, 60, 62, 63, 64, 65, 66, 67]),
            "rss under load: from 60.0 to 66.0 MiB, 4.0 MiB more allowed",
        ),
        (
            attrs.evolve(FINE, load=[attrs.evolve(LOAD, pipes=7 + PIPE_BOUND)]),
            "pipes: 167 under load, 6 at the start and 160 more allowed",
        ),
        (attrs.evolve(FINE, violations=3), "violations: 3"),
        (attrs.evolve(FINE, troubles=2), "errors or tracebacks in the relay's log: 2"),
        (attrs.evolve(FINE, failed=1), "sessions that failed inside the relay: 1"),
        (attrs.evolve(FINE, status=1), "the relay's exit status: 1"),
        (attrs.evolve(FINE, status=-9), "the relay's exit status: -9"),
        (attrs.evolve(FINE, status=None), "the relay still ran 5 s after SIGTERM"),
        (attrs.evolve(FINE, steps=0), "the relay's wall clock was never set"),
    ],
)
def test_a_soak_that_fails(outcome: Outcome, line: str) -> None:
    assert failures(outcome) == [line]


def test_a_leak_in_the_warm_up_does_not_hide() -> None:
    leaked = attrs.evolve(QUIET, sockets=13)
    assert failures(attrs.evolve(FINE, baseline=leaked, final=leaked)) != []


def test_every_failure_is_told() -> None:
    assert len(failures(attrs.evolve(FINE, violations=1, troubles=1, status=1))) == 3


# -- the command line


def test_the_defaults_are_those_of_the_long_soak() -> None:
    options = parse_arguments([])
    assert (options.minutes, options.connections) == (10, 2000)
    assert (options.transport, options.reactor, options.seed) == ("both", "epoll", None)
    assert (options.flows, options.stop, options.step) == (200, 10, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--minutes", "x"],
        ["--connections", "0"],
        ["--flows", "-1"],
        ["--stop", "16"],
        ["--stop", "-1"],
        ["--step", "nan"],
        ["--transport", "pigeon"],
    ],
)
def test_bad_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err

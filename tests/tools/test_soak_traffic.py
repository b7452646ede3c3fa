"""How the soak judges the relay's log line about a session."""

from __future__ import annotations

import asyncio
from collections import Counter
from ipaddress import ip_address

import pytest

from soak.ends import Session
from soak.log import SessionLine
from soak.servers import HOSTS
from soak.stops import Stops
from soak.traffic import client_host, judge_line
from tests.tools.sessions import ends, session_of


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

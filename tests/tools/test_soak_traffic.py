"""How the soak judges the relay's log line about a session."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from ipaddress import ip_address

import pytest

from soak.ends import Session, Where
from soak.kernel import Drops
from soak.log import SessionLine
from soak.servers import HOSTS, Servers
from soak.stops import Stops
from soak.traffic import Traffic, acted_late, client_host, judge_line
from soak.violations import Violations
from tests.support.process import PATIENCE
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


def test_an_ending_by_timeout_may_be_excused_and_nothing_else_with_it() -> None:
    async def run() -> None:
        client, _ = ends(shut=True, sent=20)
        session = client.session
        session.script = session_of("bulk both ways").script
        now = client.opened_at + 10
        for ending, fine in (
            ("half_closed", True),
            ("upstream_stalled", True),
            ("failed", False),
        ):
            assert judge_line(line_of(ending), session, now, Stops())
            said = judge_line(line_of(ending), session, now, Stops(), excused=True)
            assert (said == "") is fine
        late = line_of("half_closed", duration=11.0)
        assert judge_line(late, session, now, Stops(), excused=True)

    asyncio.run(run())


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_session_that_the_kernel_held_back_does_not_count(dropped: int) -> None:
    """A relay that takes nothing of an upload, and then resets it.

    That counts, but where the kernel had dropped some of it: then a timeout was due.
    """
    counted = [0]
    told: list[str] = []

    async def run() -> int:
        servers = Servers()
        with socket.create_server(("127.0.0.1", 0)) as relay:
            relay.setblocking(False)
            address = relay.getsockname()
            traffic = Traffic(
                # Draws a long upload, as fast as it goes.
                190,
                servers,
                {where: [address] for where in Where},
                Violations(told.append),
                Stops(),
                Drops(lambda: counted[-1]),
            )

            async def open_one() -> None:
                # None is opened where this process was late.
                while not traffic.opened:
                    await traffic.keep(1, 100, 0.05)

            opening = asyncio.ensure_future(open_one())
            async with asyncio.timeout(PATIENCE):
                leg, client = await asyncio.get_running_loop().sock_accept(relay)
                await opening
            counted.append(dropped * Drops.MANY)
            leg.close()
            async with asyncio.timeout(PATIENCE):
                await traffic.over()
            name = "{}:{}".format
            line = SessionLine(name(*client), name(*address), 0.01, 0, 0, "idle")
            traffic.check_line(line)
        await traffic.close()
        servers.close()
        return traffic.excused.total()

    assert asyncio.run(run()) == dropped
    if dropped:
        assert told == []
    else:
        [said] = told
        assert said.startswith("bulk up, connection 1, client: ")
        assert "reset by peer, which was not due" in said


@pytest.mark.parametrize(
    ("script", "closed", "late", "excused"),
    [
        # Waits for 3 s of 5.
        ("server half-closes", "half", 0.6, False),
        ("server half-closes", "half", 0.7, True),
        # Has pauses of 1 s, of 5.
        ("bulk both ways", "half", 1.3, False),
        ("bulk both ways", "half", 1.4, True),
        # Waited for 8 s, but before that.
        ("server closes first", "whole", 1.3, False),
        ("server closes first", "whole", 1.4, True),
        # Waits for 15 s of 20.
        ("idle, then on", "", 1.6, False),
        ("idle, then on", "", 1.7, True),
    ],
)
def test_a_process_that_was_late_may_have_let_a_session_look_idle(
    script: str, closed: str, late: float, excused: bool
) -> None:
    async def run() -> None:
        stops = Stops()
        client, server = ends(shut=True, sent=0)
        session = client.session
        session.script = session_of(script).script
        session.delay = session.script.delay
        server.half_closed, server.done = closed == "half", closed == "whole"
        now = client.opened_at + 60
        # Late twice, and once before that time.
        stops.was_late(now - 40, now - 30)
        stops.was_late(now - 5, now - 5 + late)
        stops.was_late(now - 0.5, now)
        assert acted_late(session, now, stops) is excused

    asyncio.run(run())


def test_clients_addresses_are_loopback_and_rarely_equal() -> None:
    hosts = Counter(client_host(number) for number in range(1 << 19))
    assert all(ip_address(host).is_loopback for host in hosts)
    assert max(hosts.values()) == len(HOSTS)

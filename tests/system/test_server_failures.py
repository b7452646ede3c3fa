"""Servers that fail under a steady load: no client notices what can be tried again.

nginx and HAProxy are two servers of a relay, on a machine of their own.  One of them is
stopped, refuses, is out of reach or behind a network that drops its packets, while
clients come at a steady rate; or in its place is one that resets whoever comes.  A
server that is frozen is another matter: its kernel
accepts connections and takes what is sent, so that nobody may send it to another one.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attrs
import pytest

from tests.support.process import RelayProcess, eventually, relay, reset
from tests.system.namespaces import PROXY, SERVER, Machine, Machines, machines
from tests.system.open_loop import RATE, OpenLoop, Request, answers, p99, steady
from tests.system.programs import program, run
from tests.system.web_servers import WebServer, haproxy, nginx

pytestmark = pytest.mark.system

#: The ports of the two servers, `a` and `b`, and of the relay.
A, B, RELAY = 8001, 8002, 8080

#: Seconds that a dial may take, where nobody answers.
DIAL = 0.3

#: What a busy machine adds to a request at most, in seconds.  How often a server is
#: dialled, and for how long, is said by other things than the time that it takes.
NOISE = 2.0

FAST = ("--check-every", "100ms", "--check-timeout", "200ms")

#: What the network does to packets for `a`.
REFUSED = "tcp flags & (syn | ack) == syn reject with tcp reset"
UNREACHABLE = "tcp flags & (syn | ack) == syn reject with icmpx type host-unreachable"
DROPPED = "drop"
#: Once it is connected, by the last packet of the handshake.
RESET = "tcp flags & (syn | ack) == ack reject with tcp reset"


@pytest.fixture(scope="module")
def network() -> Iterator[Machines]:
    with machines() as three:
        with three.server.inside():
            # It says of each packet what became of it, not of one a second.
            Path("/proc/sys/net/ipv4/icmp_ratelimit").write_text("0")
        yield three


def filtered(machine: Machine, verdict: str) -> None:
    """From now on, this becomes of what comes for `a`."""
    rule = f"tcp dport {A} {verdict}"
    chain = "type filter hook input priority 0;"
    table = f"table inet fault {{ chain coming {{ {chain} {rule}; }}; }}"
    run(*machine.runs(program("nft"), table))


def unfiltered(machine: Machine) -> None:
    run(*machine.runs(program("nft"), "flush ruleset"))


@attrs.frozen
class Scene:
    """Two servers, a relay and a load."""

    network: Machines
    a: WebServer
    b: WebServer
    relay: RelayProcess
    load: OpenLoop

    def is_told(self, what: str, count: int = 1) -> None:
        self.relay.wait_for(f"relay1: a/{SERVER}:{A} is {what}", count)

    def attempts(self, begun: int, count: int) -> set[tuple[str, str]]:
        """The servers of so many sessions, and how many attempts each had."""
        ids = range(begun + 1, begun + count + 1)

        def those() -> list[dict[str, str]]:
            return [s for s in self.relay.sessions(0) if int(s["session"]) in ids]

        eventually(lambda: len(those()) == count)
        return {(each["upstream"][0], each["attempts"]) for each in those()}


@contextmanager
def scene(
    network: Machines,
    folder: Path,
    *options: str,
    rate: int = RATE,
    listen: str = "",
    silence: float = 0.0,
) -> Iterator[Scene]:
    """`a` is an nginx, `b` a HAProxy."""
    where = network.server
    a = WebServer(where, nginx(folder, "a", A, SERVER, listen), SERVER, A)
    b = WebServer(where, haproxy(folder, "b", B, SERVER), SERVER, B)
    to = ("-d", f"{SERVER}:{A},name=a", "-d", f"{SERVER}:{B},name=b")
    args = ("-l", f"{PROXY}:{RELAY}", *to, *options)
    with ExitStack() as stack:
        for each in (a, b):
            stack.enter_context(each.started())
        running = stack.enter_context(relay(*args, twistd=network.proxy.twistd))
        # A relay's first sessions are slow: its modules are not all loaded.
        with steady(network.client, (PROXY, RELAY), rate, silence) as load:
            load.next(rate // 4)
            yield Scene(network, a, b, running, load)


def all_by(requests: list[Request], *names: str) -> None:
    """Each of them was answered, by all of these."""
    assert set(answers(requests)) == set(names), answers(requests)


# -- what can be tried again

Fault = Callable[[Scene], object]

FAULTS: dict[str, Fault] = {
    "nginx stopped": lambda scene: scene.a.stop(),
    "HAProxy stopped": lambda scene: scene.b.stop(),
    "refused": lambda scene: filtered(scene.network.server, REFUSED),
    "unreachable": lambda scene: filtered(scene.network.server, UNREACHABLE),
    "black hole": lambda scene: filtered(scene.network.server, DROPPED),
}


@pytest.mark.parametrize("name", FAULTS)
def test_no_request_fails(
    network: Machines,
    tmp_path: Path,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Every second session goes to the server that has failed first."""
    options = ("--retries", "2", "--max-fails", "0", "--connect-timeout", "300ms")
    with scene(network, tmp_path, *options) as now:
        try:
            before = now.load.next()
            all_by(before, "a", "b")
            begun = now.load.pausing(lambda: FAULTS[name](now))
            during = now.load.wait(begun, RATE)
        finally:
            unfiltered(network.server)
        left = "a" if name == "HAProxy stopped" else "b"
        all_by(during, left)
        was, is_now = p99(before), p99(during)
        record_property("p99 before and during", (was, is_now))
        print(f"{name}: p99 {was * 1000:.1f} ms before, {is_now * 1000:.1f} ms during")
        if name == "black hole":
            assert DIAL <= is_now < DIAL + NOISE + 3 * was
        else:
            assert is_now <= 3 * was + NOISE
        whole = now.load.end()
        assert set(answers(whole)) == {"a", "b"}
        # Those that went to the other one first were tried once more, and no more.
        had = now.attempts(begun, RATE)
        assert had == {(left, "1"), (left, "2")}


def test_servers_that_are_restarted_in_turn(network: Machines, tmp_path: Path) -> None:
    """With what a pool of several servers has anyway, and shorter times."""
    with scene(network, tmp_path, "--fail-time", "500ms") as now, ExitStack() as stack:
        for server, other in ((now.a, "b"), (now.b, "a")):
            begun = now.load.pausing(server.stop)
            gone = now.load.wait(begun, RATE // 2)
            all_by(gone, other)
            stack.enter_context(server.started())
            now.relay.wait_for(f":{server.port} is back: it is connected again")
            all_by(now.load.next(RATE // 4), "a", "b")
        whole = now.load.end()
        all_by(whole, "a", "b")
        # Three dials had failed when it was taken out, and its trials.
        eventually(lambda: len(now.relay.sessions(0)) == len(whole))
        again = [each for each in now.relay.sessions(0) if each["attempts"] != "1"]
        assert 6 <= len(again) < 20, again


@pytest.mark.parametrize("name", ["nginx stopped", "black hole"])
def test_checks_find_it_and_its_return(
    network: Machines, tmp_path: Path, name: str
) -> None:
    """Once it is down no session goes to it; once it is up it has its share."""
    options = ("--check", "tcp", *FAST, "--rise", "2", "--fall", "3")
    # Its dials that fail meanwhile don't keep it out any longer.
    own = ("--retries", "2", "--fail-time", "60", "--connect-timeout", "300ms")
    with scene(network, tmp_path, *options, *own) as now, ExitStack() as stack:
        now.load.pausing(lambda: FAULTS[name](now))
        now.is_told("down")
        down, _ = now.load.under_way()
        gone = now.load.wait(down + 1, RATE // 2)
        all_by(gone, "b")
        # None of them has tried the other one first.  A client may overtake another.
        assert now.attempts(down + 5, RATE // 2 - 10) == {("b", "1")}
        if name == "black hole":
            unfiltered(network.server)
        else:
            stack.enter_context(now.a.started())
        now.is_told("up")
        back = answers(now.load.next())
        assert back["a"] + back["b"] == RATE, back
        assert abs(back["a"] / RATE - 0.5) <= 0.05, back
        all_by(now.load.end(), "a", "b")


def test_clients_wait_while_both_are_away(network: Machines, tmp_path: Path) -> None:
    """Latency instead of errors, while a database fails over."""
    options = ("--check", "tcp", *FAST, "--fall", "1", "--when-none", "wait=8")
    own = ("--retries", "20", "--max-fails", "0")
    with scene(network, tmp_path, *options, *own, rate=50) as now:
        with ExitStack() as stack:

            def both_stop() -> None:
                now.a.stop()
                now.b.stop()

            begun = now.load.pausing(both_stop)
            now.is_told("down")
            now.relay.wait_for(f"b/{SERVER}:{B} is down")
            waiting, _ = now.load.under_way()
            eventually(lambda: now.load.under_way()[0] >= waiting + 10)
            assert len(now.load.under_way()[1]) >= 10
            stack.enter_context(now.b.started())
            all_by(now.load.wait(begun, 50), "b")
            now.load.end()


@pytest.mark.parametrize("transport", ["plane", "twisted"])
def test_reset_before_the_client_has_said_anything(
    network: Machines, tmp_path: Path, transport: str
) -> None:
    """As by a proxy before a server that is gone: there is another one in time."""
    own = ("--retries", "2", "--max-fails", "0", "--transport", transport)
    with scene(network, tmp_path, *own, rate=50, silence=1.0) as now:
        try:
            begun = now.load.pausing(lambda: filtered(network.server, RESET))
            all_by(now.load.wait(begun, 50), "b")
        finally:
            unfiltered(network.server)
        all_by(now.load.end(), "a", "b")


@contextmanager
def resetting(machine: Machine) -> Iterator[None]:
    """In the place of `a`, a server that accepts, and resets at once."""
    with machine.inside():
        listening = socket.socket()
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((SERVER, A))
        listening.listen(1024)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    reset(listening.accept()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("transport", ["plane", "twisted"])
def test_a_server_that_accepts_and_resets(
    network: Machines, tmp_path: Path, transport: str
) -> None:
    """Clients that say nothing for a moment get another one; then it is out."""
    own = ("--retries", "2", "--transport", transport)
    with ExitStack() as stack, scene(network, tmp_path, *own, silence=1.0) as now:

        def change() -> None:
            now.a.stop()
            stack.enter_context(resetting(network.server))

        begun = now.load.pausing(change)
        all_by(now.load.wait(begun, RATE), "b")
        now.is_told("out: 3 dials have failed")
        # Those that were under way as it went out have tried it as well.
        assert now.attempts(begun, RATE) == {("b", "1"), ("b", "2")}
        all_by(now.load.end(), "a", "b")


@pytest.mark.parametrize("transport", ["plane", "twisted"])
def test_a_server_that_resets_those_who_speak_at_once(
    network: Machines,
    tmp_path: Path,
    transport: str,
    record_property: Callable[[str, object], None],
) -> None:
    """It had their requests, which nobody sends again; so it is out soon."""
    own = ("--retries", "2", "--fail-time", "500ms", "--transport", transport)
    with ExitStack() as stack, scene(network, tmp_path, *own) as now:

        def change() -> None:
            now.a.stop()
            stack.enter_context(resetting(network.server))

        begun = now.load.pausing(change)
        during = now.load.wait(begun, 2 * RATE)
        now.is_told("out: 3 dials have failed")
        now.is_told("out: its trial has failed", 2)
        lost = [each for each in during if not each.answer]
        record_property("lost of all", (len(lost), len(during)))
        print(f"{transport}: {len(lost)} of {len(during)} requests were lost")
        # Three, those that were under way with them, and one or two for each trial; or
        # else it were half of them.
        assert len(lost) <= len(during) // 10
        all_by([each for each in during if each.answer], "b")
        now.load.end()


# -- what can't


@pytest.mark.parametrize("what", ["keep", "cut"])
def test_a_frozen_server(network: Machines, tmp_path: Path, what: str) -> None:
    """What it was sent waits, until it goes on or its sessions are cut."""
    # A check that is late for want of a processor is not to cut the other one's.
    patient = ("--check-every", "100ms", "--check-timeout", "1s", "--fall", "2")
    options = ("--check", "http:///", *patient, "--on-down", what)
    with scene(network, tmp_path, *options, rate=100) as now:
        begun = now.load.pausing(lambda: now.a.signal(signal.SIGSTOP))
        try:
            now.is_told("down")
            down, _ = now.load.under_way()
            # From now on nobody comes to it, and nobody waits.
            after = now.load.wait(down + 1, 50)
            all_by(after, "b")
            assert p99(after) < DIAL + NOISE
        finally:
            now.a.signal(signal.SIGCONT)
        whole = now.load.end()
        first = whole[begun : down + 1]
        lost = [each for each in whole if not each.answer]
        if what == "keep":
            assert lost == []
            assert 1 <= answers(first)["a"] <= len(first) // 2 + 1
        else:
            assert all(each in first for each in lost)
            assert 1 <= len(lost) <= len(first) // 2 + 1
            ended = now.relay.ended("upstream_down", len(lost))
            assert {each["attempts"] for each in ended} == {"1"}


def test_a_frozen_server_whose_queue_is_full(network: Machines, tmp_path: Path) -> None:
    """Its kernel accepts two connections; the others go to the other server."""
    options = ("--connect-timeout", "300ms", "--retries", "2", "--max-fails", "0")
    with scene(network, tmp_path, *options, rate=100, listen="backlog=1") as now:
        begun = now.load.pausing(lambda: now.a.signal(signal.SIGSTOP))
        try:
            eventually(lambda: now.load.under_way()[0] > begun + 150)
            # Those that wait for it have begun long before the last.
            first = now.load.requests[begun : begun + 20]
            waiting = [each for each in first if not each.over]
            assert 1 <= len(waiting) <= 5
            all_by(now.load.wait(begun + 20, 50), "b")
        finally:
            now.a.signal(signal.SIGCONT)
        whole = now.load.end()
        all_by(whole, "a", "b")


def test_what_a_server_had_is_not_sent_to_another(
    network: Machines, tmp_path: Path
) -> None:
    """It is killed with requests in its hands: these fail, and no others."""
    with scene(network, tmp_path, "--retries", "2", rate=100) as now:
        begun = now.load.pausing(lambda: now.a.signal(signal.SIGSTOP))
        eventually(lambda: len(now.load.under_way()[1]) >= 15)
        now.a.stop()
        at, _ = now.load.under_way()
        now.load.wait(begun, at - begun + 50)
        whole = now.load.end()
        lost = [each for each in whole if not each.answer]
        # HAProxy's may be under way, too; and clients may overtake each other.
        assert 3 <= len(lost) <= (at - begun) // 2 + 3
        ended = now.relay.ended("upstream_reset", len(lost))
        assert {each["attempts"] for each in ended} == {"1"}
        eventually(lambda: len(now.relay.sessions(0)) == len(whole))

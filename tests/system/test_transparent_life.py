"""The rules of a relay that is a gateway, from its start to its end, and without it.

Each test leaves the machine as it was: `network` compares all rules and routes.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.process import (
    PATIENCE,
    RelayProcess,
    command,
    eventually,
    read_all,
    relay,
)
from tests.system.gateway import (
    GATEWAY_PORT,
    V4,
    V6,
    Addresses,
    Gateway,
    accepted,
    asking,
    listening,
    says,
    stopped,
)
from tests.system.namespaces import Machine
from tests.system.programs import program, run
from tests.system.wire import at

pytestmark = pytest.mark.system

FILE = """\
control = "unix:{socket}"
{settings}

[tcp.web]
listen = "{asked}:{port}"
dest = "{server}:80"
transparent = true
intercept = "{asked}:80"

[udp.dns]
listen = "udp::{port}"
dest = "udp:original"
transparent = true
intercept = ["{server}:53", "[{server6}]:53"]
"""

MANAGED = "manage_netfilter = true"

#: The user of one that may do nothing.
NOBODY = 65534


class Operated:
    """A relay of a file, and its operator.

    :param folder: of the file and the control socket.
    """

    def __init__(self, network: Gateway, folder: Path, settings: str = MANAGED) -> None:
        self.network = network
        self.file, self.socket = folder / "relayd.toml", folder / "control"
        self.file.write_text(
            FILE.format(
                socket=self.socket,
                settings=settings,
                asked=V4.asked,
                server=V4.server,
                server6=V6.server,
                port=GATEWAY_PORT,
            )
        )

    @contextmanager
    def started(self, *before: str) -> Iterator[RelayProcess]:
        """It runs, for the length of a block, or until it is stopped.

        :param before: what the command line begins with.
        """
        where: dict[str, Any] = {"namespace": self.network.relay.name}
        if before:
            where = {"twistd": self.network.relay.runs(*before, *command())}
        with relay("--config", str(self.file), **where) as running:
            running.listening(2)
            yield running

    def ctl(self, *args: str) -> str:
        """A command about the running one, which must succeed."""
        return self.network.relayctl("--control", self.socket, *args)


def served(network: Gateway, host: str = V4.server) -> None:
    """A client of the web relay is served by this server, which sees the client."""
    with listening(network, host) as server, asking(network, V4.asked) as client:
        upstream, seen = accepted(server)
        with upstream:
            assert seen.startswith(f"{V4.client}:")
            says(client, upstream, b"hello")
            says(upstream, client, b"hello")


def turned_away(network: Gateway, host: str = V4.asked) -> None:
    """Nobody listens for a client of the web relay's any more."""
    with pytest.raises(ConnectionRefusedError):
        asking(network, host)


def test_stop_and_start(network: Gateway, tmp_path: Path) -> None:
    """The rules are there as long as the relay is; the same ones each time."""
    operated, before = Operated(network, tmp_path), network.state()
    with operated.started() as running:
        there = network.state()
        assert there != before
        served(network)
        operated.ctl("stop", "web")
        eventually(lambda: "web" not in network.state(), "its rules are gone")
        assert "dns" in network.state()
        turned_away(network)
        operated.ctl("start", "web")
        assert sorted(network.state().split()) == sorted(there.split())
        served(network)
        operated.ctl("stop", "web")
        operated.ctl("stop", "dns")
        eventually(lambda: network.state() == before, "all rules are gone")
        operated.ctl("start", "web")
        served(network)
        stopped(running)
    assert network.state() == before


@pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
def test_flows_of_one_family_outlive_a_stop(
    network: Gateway, tmp_path: Path, family: Addresses
) -> None:
    """Its relay listens for both, and is started while they live; and once they don't.

    By TPROXY: rules are taken away and come back, and so do the client's datagrams.
    """
    operated, before = Operated(network, tmp_path), network.state()
    with (
        operated.started() as running,
        datagrams(network.server, family, (family.server, 53)) as server,
        datagrams(network.client, family) as client,
    ):

        def asks(data: bytes) -> None:
            client.sendto(data, (family.server, 53))
            said, seen = server.recvfrom(100)
            assert said == data
            # The client's very own.
            assert seen[:2] == (family.client, client.getsockname()[1])
            server.sendto(data[::-1], seen)
            said, whose = client.recvfrom(100)
            assert (said, whose[:2]) == (data[::-1], (family.server, 53))

        asks(b"one")
        for _ in range(2):
            operated.ctl("stop", "dns")
            operated.ctl("start", "dns")
            asks(b"two")
        for _ in range(2):
            operated.ctl("stop", "dns", "--cut")
            operated.ctl("start", "dns")
            asks(b"three")
        stopped(running)
    assert network.state() == before


@contextmanager
def datagrams(
    machine: Machine, family: Addresses, where: tuple[str, int] | None = None
) -> Iterator[socket.socket]:
    """A socket of a machine's, which waits for what comes."""
    with machine.inside():
        sock = socket.socket(family.kind, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(PATIENCE)
        sock.bind(where or (family.client, 0))
        yield sock


def test_a_session_that_outlives_its_relay(network: Gateway, tmp_path: Path) -> None:
    """A stopped relay takes no clients; its session goes on until it ends."""
    operated, before = Operated(network, tmp_path), network.state()
    with (
        operated.started() as running,
        listening(network, V4.server) as server,
        asking(network, V4.asked) as client,
    ):
        upstream, _ = accepted(server)
        with upstream:
            says(client, upstream, b"hello")
            operated.ctl("stop", "dns")
            operated.ctl("stop", "web")
            turned_away(network)
            says(client, upstream, b"still")
            says(upstream, client, b"there")
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b""
        assert read_all(client) == b""
        running.ended("done")
        eventually(lambda: network.state() == before, "all rules are gone")


def test_changes_at_run_time(network: Gateway, tmp_path: Path) -> None:
    """Another real server, another port of the relay's own, another port asked for."""
    operated = Operated(network, tmp_path)
    with operated.started() as running:
        served(network)
        operated.ctl("set", "web", f"dest={V4.other}:80")
        served(network, V4.other)
        other = GATEWAY_PORT + 1
        operated.ctl("set", "web", f"listen={V4.asked}:{other}")
        served(network, V4.other)
        given = {each.given for each in network.translations()}
        assert given >= {at(V4.asked, other), at(V4.asked, GATEWAY_PORT)}
        assert f":{GATEWAY_PORT}" not in web_rules(network)
        operated.ctl("set", "web", f"intercept={V4.inner}:80")
        turned_away(network)
        with (
            listening(network, V4.other) as server,
            asking(network, V4.inner) as client,
            accepted(server)[0] as upstream,
        ):
            says(client, upstream, b"hello")
        stopped(running)


@pytest.mark.parametrize(
    ("first", "then"), [("redirect", "tproxy"), ("tproxy", "redirect")]
)
def test_another_kind_of_rules(
    network: Gateway, tmp_path: Path, first: str, then: str
) -> None:
    """Of the same address and port: what is under way stays with those that brought it.

    What is left of them goes with the last session.
    """
    operated, before = Operated(network, tmp_path), network.state()
    file = operated.file.read_text()
    operated.file.write_text(file.replace(':80"\n\n', f':80,by={first}"\n\n'))
    with operated.started() as running, ExitStack() as ended:
        operated.ctl("stop", "dns")
        sessions = []
        for kind in (first, then, first):
            operated.ctl("set", "web", f"intercept={V4.asked}:80,by={kind}")
            with listening(network, V4.server) as server:
                client = ended.enter_context(asking(network, V4.asked))
                sessions.append((client, ended.enter_context(accepted(server)[0])))
            for client, upstream in sessions:
                says(client, upstream, b"under way")
                says(upstream, client, b"under way")
        operated.ctl("stop", "web")
        for client, upstream in sessions:
            says(client, upstream, b"under way")
        ended.close()
        running.ended("done", 3)
        eventually(lambda: network.state() == before, "all rules are gone")
        stopped(running)


def web_rules(network: Gateway) -> str:
    """The lines of nftables that are about the relay "web"."""
    lines = network.state().splitlines()
    return "\n".join(each for each in lines if "relay web" in each)


def test_changes_of_the_file(network: Gateway, tmp_path: Path) -> None:
    """What a reload changes; and what another file says, after a stop and a start."""
    operated = Operated(network, tmp_path)
    text = operated.file.read_text()
    with operated.started() as running:
        there = network.state()
        operated.file.write_text(text.replace(f'"{V4.server}:80"', f'"{V4.other}:80"'))
        operated.ctl("reload")
        served(network, V4.other)
        assert network.state() == there
        stopped(running)
    operated.file.write_text(text.replace(str(GATEWAY_PORT), "17000"))
    with operated.started() as running:
        served(network)
        assert ":17000" in web_rules(network)
        stopped(running)


def test_killed_and_started_again(network: Gateway, tmp_path: Path) -> None:
    """After a crash nothing is there twice; after the next stop, nothing at all."""
    operated, before = Operated(network, tmp_path), network.state()
    with operated.started() as running:
        there = network.state()
        running.signal(signal.SIGKILL)
        running.wait()
    assert network.state() == there
    with operated.started() as running:
        assert network.state() == there
        served(network)
        stopped(running)
    assert network.state() == before


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that any user may go to, and write in."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def test_rules_of_root_and_a_relay_without_rights(
    network: Gateway, everybodys: Path
) -> None:
    """As the unit has it: the relay keeps CAP_NET_RAW alone, and relayctl does it."""
    operated, before = Operated(network, everybodys, ""), network.state()
    alone = [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--inh-caps=-all,+net_raw", "--ambient-caps=-all,+net_raw"),
        *("--bounding-set=-all,+net_raw", "--no-new-privs"),
    ]
    program("setpriv")
    shown = network.relayctl("netfilter", "show", "--config", operated.file)
    assert network.state() == before
    network.relayctl("netfilter", "apply", "--config", operated.file)
    there = network.state()
    network.relayctl("netfilter", "apply", "--config", operated.file)
    assert network.state() == there
    for line in nft_rules(there):
        assert line in shown
    with operated.started(*alone) as running:
        served(network)
        stopped(running)
    assert network.state() == there
    network.relayctl("netfilter", "remove", "--config", operated.file)
    assert network.state() == before
    network.relayctl("netfilter", "remove", "--config", operated.file)


def nft_rules(state: str) -> list[str]:
    lines = [each.strip() for each in state.splitlines()]
    found = [each for each in lines if 'comment "relayd' in each]
    assert found
    return found


def test_foreign_rules_stay(network: Gateway, tmp_path: Path) -> None:
    """Nothing that others have set up is touched, nor counted as ours."""
    mark = "0x1000"
    ip = network.relay.runs("ip")
    for words in (
        *("rule add pref 4000 fwmark 0x2/0x2 lookup 77",),
        *("route add 203.0.113.0/24 dev outside table 77",),
    ):
        run(*ip, *words.split())
    nft = network.relay.runs("nft")
    run(*nft, "add table inet others")
    run(*nft, "add chain inet others input { type filter hook input priority 0; }")
    run(*nft, f"add rule inet others input meta mark {mark} counter accept")
    try:
        before = network.state()
        with Operated(network, tmp_path).started() as running:
            served(network)
            stopped(running)
        after = network.state()
        assert without_counts(after) == without_counts(before)
    finally:
        run(*nft, "delete table inet others")
        run(*ip, "rule", "delete", "pref", "4000")
        run(*ip, "route", "flush", "table", "77")


def without_counts(state: str) -> list[str]:
    return [each.partition("counter packets")[0] for each in state.splitlines()]


@pytest.mark.parametrize(
    ("settings", "lacks", "wanted"),
    [
        # Either of these two would do for IP_TRANSPARENT (ip(7)).
        ("", ["net_raw", "net_admin"], "CAP_NET_RAW"),
        (MANAGED, ["net_admin"], "CAP_NET_ADMIN"),
    ],
    ids=["net_raw", "net_admin"],
)
def test_without_a_right(
    network: Gateway, tmp_path: Path, settings: str, lacks: list[str], wanted: str
) -> None:
    """A clear line at the start, and nothing is left of it."""
    operated = Operated(network, tmp_path, settings)
    dropped = ",".join(f"-{each}" for each in lacks)
    without = (f"--bounding-set={dropped}", f"--inh-caps={dropped}")
    twistd = network.relay.runs(program("setpriv"), *without, *command())
    running = RelayProcess("--config", str(operated.file), twistd=twistd)
    try:
        assert running.wait() != 0
        said = [each for each in running.lines if "relayd: " in each]
        assert any(wanted in each for each in said)
        assert not [each for each in running.lines if "Traceback" in each]
    finally:
        running.stop()

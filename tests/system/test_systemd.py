"""Relays under systemd itself: ready, watched, stopped, and given their sockets."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.process import (
    PATIENCE,
    START,
    TWISTD,
    RelayProcess,
    Server,
    UdpServer,
    connect,
    eventually,
    read_all,
    read_exactly,
    udp_client,
)
from tests.system.managers import Manager, managed, relay_part
from tests.system.programs import program
from tests.system.test_unit import RELAYCTL, UNIT, analyze, unknown

pytestmark = pytest.mark.system

SOCKET_UNIT = UNIT.with_suffix(".socket")


@contextmanager
def service(
    folder: Path, config: str, *options: str, **settings: str
) -> Iterator[Manager]:
    """The unit of contrib under a manager, with a file of settings of the test's."""
    with managed(folder) as manager:
        (folder / "etc/relayd.toml").write_text(config)
        manager.write("relayd.service", UNIT.read_text())
        part = relay_part(
            folder, "--config", "/tmp/etc/relayd.toml", *options, **settings
        )
        manager.write("relayd.service.d/test.conf", part)
        yield manager


def exchange(client: socket.socket, server: Server, patience: float = PATIENCE) -> None:
    """A question and an answer, and the end.

    :param patience: seconds until the relay comes; START, where a client starts it.
    """
    server.socket.settimeout(patience)
    with server.accept() as there:
        client.sendall(b"question")
        assert read_exactly(there, 8) == b"question"
        there.sendall(b"answer")
        there.close()
        assert read_all(client) == b"answer"


def test_a_relay_under_its_unit(tmp_path: Path) -> None:
    """As another user, with few system calls; it stops in its own time.

    systemd would kill it after a second, but is asked for more.
    """
    port = free_port()
    with (
        Server() as server,
        service(
            tmp_path,
            f'[tcp.web]\nlisten = "127.0.0.1:{port}"\ndest = "{server.address}"\n',
            *("--shutdown-delay", "1.5", "--drain-timeout", "30"),
            TimeoutStopSec="1",
        ) as manager,
    ):
        manager.start()
        # It returns when all listeners stand.
        manager.do("start", "relayd.service")

        def status() -> list[str]:
            return manager.show("relayd.service", "ActiveState", "StatusText")

        assert sorted(status()) == ["0 sessions, 0 flows", "active"]
        asked = ("UID", "MainPID")
        assert all(int(each) > 0 for each in manager.show("relayd.service", *asked))
        with connect(port) as client:
            client.sendall(b"question")
            with server.accept() as there:
                assert read_exactly(there, 8) == b"question"
                manager.do("stop", "--no-block", "relayd.service")
                eventually(
                    lambda: "1 sessions, 0 flows, stopping" in status(), "it stops"
                )
                # It accepts clients still.
                with connect(port) as late:
                    exchange(late, server)
                eventually(
                    lambda: "1 sessions, 0 flows, draining" in status(), "it drains"
                )
                there.sendall(b"answer")
                there.close()
                assert read_all(client) == b"answer"
        eventually(lambda: "inactive" in status(), "it has stopped")
        assert manager.show("relayd.service", "Result") == ["success"]
        output = manager.output()
        assert "clients are accepted for 1.5 s more" in output
        assert output.count("] session=") == 2
        assert "Traceback" not in output


def test_a_relay_that_hangs_is_started_again(tmp_path: Path) -> None:
    """By the watchdog: the reactor says nothing any more."""
    port = free_port()
    with (
        Server() as server,
        service(
            tmp_path,
            f'[tcp.web]\nlisten = "127.0.0.1:{port}"\ndest = "{server.address}"\n',
            WatchdogSec="1",
            WatchdogSignal="SIGKILL",
        ) as manager,
    ):
        manager.start()
        manager.do("start", "relayd.service")
        manager.do("kill", "--signal=SIGSTOP", "relayd.service")

        def again() -> bool:
            shown = manager.show("relayd.service", "NRestarts", "ActiveState")
            return sorted(shown) == ["1", "active"]

        eventually(again, "it was started again", START)
        with connect(port) as client:
            exchange(client, server)


def test_a_relay_that_can_not_listen_is_not_ready(tmp_path: Path) -> None:
    """The manager hears of a failure, and the log says why in one line."""
    with Server() as server:
        config = f'[tcp.web]\nlisten = "{server.address}"\ndest = "127.0.0.1:9"\n'
        with service(tmp_path, config, Restart="no") as manager:
            manager.start()
            manager.ask("start", "relayd.service")
            assert not manager.succeeded
            assert "failed" in manager.show("relayd.service", "ActiveState")
            assert "Address already in use" in manager.output()


def test_a_relay_is_given_its_sockets(tmp_path: Path) -> None:
    """The first client starts it; nobody is refused while it is started anew."""
    web, dns = free_port(), free_port()
    config = """
[tcp.web]
listen = "systemd:web"
dest = "{server}"
[udp.dns]
listen = "udp:systemd:dns"
dest = "{datagrams}"
"""
    with Server() as server, UdpServer() as datagrams:
        where = {
            "server": server.address,
            "datagrams": datagrams.address.removeprefix("udp:"),
        }
        with service(tmp_path, config.format(**where)) as manager:
            lines = re.sub(
                r"(ListenStream=.*\n)+",
                f"ListenStream=127.0.0.1:{web}\nListenStream=[::1]:{web}\n",
                SOCKET_UNIT.read_text(),
            )
            manager.write("relayd.socket", lines)
            manager.write(
                "relayd-dns.socket",
                f"[Socket]\nListenDatagram=127.0.0.1:{dns}\nFileDescriptorName=dns\n"
                "Service=relayd.service\n",
            )
            manager.start()
            manager.do("start", "relayd.socket", "relayd-dns.socket")
            assert manager.show("relayd.service", "ActiveState") == ["inactive"]
            with connect(web) as client:
                exchange(client, server, START)
            assert manager.show("relayd.service", "ActiveState") == ["active"]
            with udp_client(dns) as asking:
                asking.send(b"question")
                datagrams.send(*datagrams.receive())
                assert asking.recv(100) == b"question"
            manager.do("restart", "--no-block", "relayd.service")
            with connect(web, host="::1") as client:
                exchange(client, server, START)
            for address in (f"127.0.0.1:{web}", f"[::1]:{web}", f"udp:127.0.0.1:{dns}"):
                there = f"listening on {address}, "
                # The client may have been the last of the one before.
                eventually(
                    lambda there=there: manager.output().count(there) == 2,
                    patience=START,
                )
            assert "Traceback" not in manager.output()


def test_the_socket_unit_is_valid(tmp_path: Path) -> None:
    for unit in (UNIT, SOCKET_UNIT):
        text = unit.read_text().replace("/usr/bin/twistd", TWISTD)
        (tmp_path / unit.name).write_text(text.replace("/usr/bin/relayctl", RELAYCTL))
    found = analyze("verify", str(tmp_path / SOCKET_UNIT.name))
    assert (found.returncode, unknown(found.stdout + found.stderr)) == (0, "")


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("balanced", [False, True])
def test_sockets_without_a_manager(
    transport: str, balanced: bool, tmp_path: Path
) -> None:
    """As systemd-socket-activate(1) passes them: two of one name, and of two kinds."""
    trusted = ("--accept-proxy=127.0.0.1", "--accept-proxy=unix") if balanced else ()
    port, path = free_port(), tmp_path / "s"
    with Server() as server:
        running = RelayProcess(
            *("--listen", "systemd:web", "--dest", server.address),
            *("--transport", transport, *trusted),
            twistd=(
                *(program("systemd-socket-activate"), "--fdname=web:web"),
                *("-l", f"127.0.0.1:{port}", "-l", str(path)),
                *(TWISTD, "-n", "--pidfile="),
            ),
        )
        try:
            running.wait_for(f"Listening on {path}")
            header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n" if balanced else b""
            with connect(port) as client:
                client.sendall(header)
                exchange(client, server, START)
            with closing(socket.socket(socket.AF_UNIX)) as client:
                client.settimeout(PATIENCE)
                client.connect(str(path))
                client.sendall(header)
                exchange(client, server)
            assert len(running.sessions(2)) == 2
            running.signal()
            assert running.wait(PATIENCE) == 0
        finally:
            running.stop()


def test_datagrams_without_a_manager() -> None:
    port = free_port()
    with UdpServer() as server:
        running = RelayProcess(
            *("--listen", "udp:systemd:dns", "--dest", server.address),
            twistd=(
                *(program("systemd-socket-activate"), "--datagram", "--fdname=dns"),
                *("-l", f"127.0.0.1:{port}", TWISTD, "-n", "--pidfile="),
            ),
        )
        try:
            running.wait_for("Listening on")
            # The client starts an interpreter.
            server.socket.settimeout(START)
            with udp_client(port) as client:
                client.send(b"question")
                server.send(*server.receive())
                assert client.recv(100) == b"question"
            running.signal()
            assert running.wait(PATIENCE) == 0
        finally:
            running.stop()


@pytest.mark.parametrize(
    ("listen", "dest", "says"),
    [
        ("systemd:ftp", "127.0.0.1:9", "no socket with this name, but 'web'"),
        ("udp:systemd:web", "udp:127.0.0.1:9", "for streams, and should be for data"),
    ],
)
def test_a_socket_that_was_not_passed_is_one_line(
    listen: str, dest: str, says: str
) -> None:
    port = free_port()
    running = RelayProcess(
        *("--listen", listen, "--dest", dest),
        twistd=(
            *(program("systemd-socket-activate"), "--fdname=web"),
            *("-l", f"127.0.0.1:{port}", TWISTD, "-n", "--pidfile="),
        ),
    )
    try:
        running.wait_for("Listening on")
        with connect(port):
            # It starts first.
            assert running.wait(START) != 0
        *_, line = running.lines
        assert f"bad endpoint '{listen}': " in line
        assert says in line
    finally:
        running.stop()

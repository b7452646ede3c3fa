"""The metrics and the health of a running relay.

Known traffic goes through it, and three witnesses have to agree: the metrics, the log,
and the sockets of the test.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    UdpServer,
    connect,
    eventually,
    own_host,
    read_all,
    read_exactly,
    relay,
    udp_client,
)

METRICS = ("--metrics", "127.0.0.1:0")

#: Enough for a splice, several times over.
LARGE = 8 << 20


def address(running: RelayProcess) -> tuple[str, int]:
    """Where its metrics are."""
    host, _, port = running.wait_for(r"metrics on (\S+)")[0][1].rpartition(":")
    return host, int(port)


def get(
    running: RelayProcess | tuple[str, int], path: str, method: str = "GET"
) -> tuple[int, str]:
    """A request: the status, and the body."""
    where = running if isinstance(running, tuple) else address(running)
    client = HTTPConnection(*where, timeout=PATIENCE)
    try:
        client.request(method, path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    finally:
        client.close()


class Samples:
    """A scrape: `samples("relayd_sessions_active", relay="web")` is a number."""

    def __init__(self, running: RelayProcess) -> None:
        status, text = get(running, "/metrics")
        assert status == 200
        self.text = text
        self._values = {
            (each.name, frozenset(each.labels.items())): each.value
            for family in text_string_to_metric_families(text)
            for each in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._values.get((name, frozenset(labels.items())), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """The sum of those that have these labels."""
        return sum(
            value
            for (found, its), value in self._values.items()
            if found == name and labels.items() <= dict(its).items()
        )


@pytest.mark.usefixtures("connections_of")
def test_metrics_log_and_wire_agree(server: Server) -> None:
    """Sessions that end well, that are spliced, that live, and that fail."""
    with socket.create_server((own_host(), 0)) as closed:
        dead = "{}:{}".format(*closed.getsockname())
    options = (*METRICS, "--name", "web", "-l", "127.0.0.1:0", "-d", server.address)
    options += ("--name", "dead", "-l", "127.0.0.1:0", "-d", dead)
    sent = got = 0
    with relay(*options) as running:
        web, nowhere = (int(each.rpartition(":")[2]) for each in running.listening(2))
        for size in (1, 1000, 70_000):
            with connect(web) as client, server.accept() as upstream:
                client.sendall(b"q" * size)
                client.shutdown(socket.SHUT_WR)
                assert len(read_all(upstream)) == size
                upstream.sendall(b"a" * 3 * size)
                upstream.shutdown(socket.SHUT_WR)
                assert len(read_all(client)) == 3 * size
            sent, got = sent + size, got + 3 * size
        for _ in range(2):
            with connect(nowhere) as client:
                assert read_all(client) == b""
        running.sessions(5)
        with connect(web) as client, server.accept() as upstream:
            client.sendall(b"x" * 11)
            read_exactly(upstream, 11)
            said = Samples(running)
            assert said("relayd_relayed_bytes_total", relay="web", direction="up") == (
                sent + 11
            )
            assert said("relayd_sessions_active", relay="web") == 1
            assert (
                said(
                    "relayd_upstream_sessions_active",
                    relay="web",
                    upstream=server.address,
                )
                == 1
            )
        sent += 11
        logged = running.sessions(6)
        said = Samples(running)
        for name, ending, count in (("web", "done", 4), ("dead", "connect_refused", 2)):
            mine = [each for each in logged if each["relay"] == name]
            assert len(mine) == count
            assert said("relayd_sessions_opened_total", relay=name) == count
            closed_so = said("relayd_sessions_closed_total", relay=name, ending=ending)
            assert closed_so == count == sum(each["ending"] == ending for each in mine)
            assert said("relayd_sessions_active", relay=name) == 0
            for direction in ("up", "down"):
                moved = said(
                    "relayd_relayed_bytes_total", relay=name, direction=direction
                )
                assert moved == sum(int(each[direction]) for each in mine)
            durations = "relayd_session_duration_seconds"
            assert said(f"{durations}_count", relay=name) == count
            logged_seconds = sum(float(each["duration"]) for each in mine)
            assert said(f"{durations}_sum", relay=name) == pytest.approx(
                logged_seconds, abs=0.0006 * count
            )
        assert said("relayd_relayed_bytes_total", relay="web", direction="up") == sent
        assert said("relayd_relayed_bytes_total", relay="web", direction="down") == got
        dials = {"relay": "web", "upstream": server.address}
        assert said("relayd_upstream_connects_total", **dials, result="connected") == 4
        assert said("relayd_upstream_connect_seconds_count", relay="web") == 4
        assert said("relayd_upstream_connect_seconds_count", relay="dead") == 0
        dials = {"relay": "dead", "upstream": dead}
        refused = said(
            "relayd_upstream_connects_total", **dials, result="connect_refused"
        )
        assert refused == 2
        assert said("relayd_upstream_up", relay="web", upstream=server.address) == 1
        assert said("relayd_upstream_up", relay="dead", upstream=dead) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="splice(2) is Linux's")
def test_what_the_kernel_moves_is_counted(server: Server) -> None:
    """While it moves, and afterwards."""
    with relay(*METRICS, "-l", "127.0.0.1:0", "-d", server.address) as running:
        with connect(running.port) as client, server.accept() as upstream:
            upstream.settimeout(PATIENCE)
            client.setblocking(False)
            done = 0
            block = b"z" * (1 << 20)
            while done < LARGE:
                with_room = True
                while with_room and done < LARGE:
                    try:
                        done += client.send(block[: LARGE - done])
                    except BlockingIOError:
                        with_room = False
                upstream.setblocking(False)
                try:
                    while upstream.recv(1 << 20):
                        pass
                except BlockingIOError:
                    upstream.settimeout(PATIENCE)
            during = Samples(running)("relayd_spliced_bytes_total", relay="relay1")
            client.setblocking(True)
            client.shutdown(socket.SHUT_WR)
            read_all(upstream)
        [logged] = running.sessions()
        said = Samples(running)
        assert int(logged["up"]) == LARGE
        spliced = said("relayd_spliced_bytes_total", relay="relay1")
        assert 0 < during <= spliced <= LARGE
        assert said("relayd_pipes_in_use") == 0


@pytest.mark.usefixtures("connections_of")
def test_datagrams_are_counted_as_the_log_has_them() -> None:
    """Of flows that live as of those that are over."""
    with UdpServer() as server:
        options = ("--name", "dns", "-l", "udp:127.0.0.1:0", "-d", server.address)
        options += ("--udp-unreplied-timeout", "1", "--udp-timeout", "1")
        with relay(*METRICS, *options) as running:
            port = int(running.listening()[0].rpartition(":")[2])
            with udp_client(port) as client:
                for size in (0, 10, 500):
                    client.send(b"q" * size)
                    question, peer = server.receive()
                    assert len(question) == size
                    server.send(b"a" * 2 * size, peer)
                    assert len(client.recv(2048)) == 2 * size
                seen = Samples(running)
                [flow] = running.flows(1)
            said = Samples(running)
            for each in (seen, said):
                for direction, datagrams, size in (("up", 3, 510), ("down", 3, 1020)):
                    labels = {"relay": "dns", "direction": direction}
                    assert each("relayd_udp_datagrams_total", **labels) == datagrams
                    assert each("relayd_udp_bytes_total", **labels) == size
                    assert flow[direction] == f"{datagrams}/{size}"
                assert each.total("relayd_udp_dropped_total") == 0
            assert said("relayd_udp_flows_active", relay="dns") == 0
            running.signal()
            running.wait_for(r"datagrams relay=dns .* sent=3 .* replies_sent=3 ")


def test_a_proxys_clients_name_no_series(server: Server) -> None:
    """However many destinations, and however many are refused."""
    args = ("-l", "127.0.0.1:0", "--deny-dest", "*:1", *METRICS)
    with relay(*args, plugin="socks4") as running:
        with connect(running.port) as client:
            client.sendall(b"\x04\x01\x00\x01\x7f\x00\x00\x01\x00")
            assert read_all(client)[1] == 91
        with connect(running.port) as client:
            port = int(server.address.rpartition(":")[2])
            client.sendall(b"\x04\x01" + port.to_bytes(2) + b"\x7f\x00\x00\x01me\x00")
            server.accept().close()
            assert read_all(client)[1] == 90
        running.sessions(2)
        said = Samples(running)
        assert said("relayd_refused_total", relay="relay1", reason="denied") == 1
        assert (
            said("relayd_sessions_closed_total", relay="relay1", ending="denied") == 1
        )
        assert said("relayd_upstream_connect_seconds_count", relay="relay1") == 1
        assert "upstream=" not in said.text
        assert "127.0.0.1" not in said.text


def test_the_process() -> None:
    """What is read of it is what its system says."""
    with relay(*METRICS, "-l", "127.0.0.1:0", "-d", "127.0.0.1:9") as running:
        said = Samples(running)
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        limit = re.search(r"Max open files\s+(\d+)", limits)
        assert limit
        assert said("relayd_max_descriptors") == int(limit[1])
        # A scrape's own connection is one of them.  The timer comes and goes, as does
        # what it reads of itself: so they are counted until both agree.
        opened = Path(f"/proc/{running.process.pid}/fd")
        eventually(
            lambda: (
                Samples(running)("relayd_open_descriptors")
                == len([*opened.iterdir()]) + 1
            )
        )
        assert said("relayd_stopping") == 0
        assert said("relayd_log_lines_dropped_total") == 0
        assert said("relayd_accept_pauses_total") == 0
        assert said.total("relayd_build_info") == 1
        loaded = said("relayd_config_last_load_success_timestamp_seconds")
        assert loaded > 1.7e9


def test_a_relay_that_stops_says_so_while_it_drains(server: Server) -> None:
    """From the first signal on; the metrics are there to the end."""
    options = ("--name", "web", "-l", "127.0.0.1:0", "-d", server.address)
    with relay(*METRICS, *options, "--drain-timeout", "30") as running:
        assert get(running, "/readyz") == (200, "ok\n")
        assert get(running, "/readyz/web") == (200, "ok\n")
        with connect(running.port) as client, server.accept():
            client.sendall(b"x")
            running.signal()
            running.wait_for("sessions may finish")
            for path in ("/readyz", "/readyz/web"):
                assert get(running, path) == (503, "stopping\n")
            assert get(running, "/livez") == (200, "ok\n")
            said = Samples(running)
            assert said("relayd_stopping") == 1
            assert said("relayd_sessions_active", relay="web") == 1
            where = address(running)
            running.signal(signal.SIGINT)
        assert running.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            get(where, "/livez")


def test_balancers_are_told_while_clients_are_accepted(server: Server) -> None:
    """Not ready from the first signal on, and nobody is refused for the delay."""
    options = ("--name", "web", "-l", "127.0.0.1:0", "-d", server.address)
    with relay(*METRICS, *options, "--shutdown-delay", "2") as running:
        where = address(running)
        running.signal()
        running.wait_for("clients are accepted for 2 s more")
        assert get(where, "/readyz") == (503, "stopping\n")
        with connect(running.port) as client, server.accept() as there:
            client.sendall(b"question")
            there.close()
        assert running.wait() == 0


def test_a_dead_server_is_its_own_relays_matter(server: Server) -> None:
    with socket.create_server((own_host(), 0)) as closed:
        dead = "{}:{}".format(*closed.getsockname())
    options = (*METRICS, "--name", "web", "-l", "127.0.0.1:0", "-d", server.address)
    options += ("--name", "dead", "-l", "127.0.0.1:0", "-d", dead)
    with relay(*options) as running:
        with connect(int(running.listening(2)[1].rpartition(":")[2])) as client:
            assert read_all(client) == b""
        why = "dials to all of its servers have failed"
        assert get(running, "/readyz?verbose") == (
            200,
            f"[+] web: ok\n[-] dead: {why}\nok\n",
        )
        assert get(running, "/readyz/dead") == (503, f"{why}\n")
        assert get(running, "/readyz/other")[0] == 404


def test_metrics_on_a_unix_socket(tmp_socket: Path) -> None:
    """Which is there as long as they are."""
    options = ("--metrics", f"unix:{tmp_socket}", "-l", "127.0.0.1:0", "-d", "9")
    with relay(*options) as running:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(tmp_socket))
            client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
            assert read_all(client).endswith(b"\r\n\r\nok\n")
        running.signal()
        assert running.wait() == 0
        assert not tmp_socket.exists()


def test_metrics_in_a_file(tmp_path: Path) -> None:
    """The same words."""
    file = tmp_path / "relayd.toml"
    file.write_text(
        'metrics = "127.0.0.1:0"\n[tcp.web]\nlisten = "127.0.0.1:0"\ndest = "9"\n'
    )
    with relay("--config", str(file)) as running:
        assert get(running, "/readyz/web") == (200, "ok\n")


def test_a_relay_that_is_stopped(server: Server, tmp_path: Path) -> None:
    """It takes no address, is not ready, and has series; the others are as ever."""
    file = tmp_path / "relayd.toml"
    taken = "{}:{}".format(*server.socket.getsockname())
    file.write_text(f"""
metrics = "127.0.0.1:0"
[tcp.web]
listen = "127.0.0.1:0"
dest = "{server.address}"
[tcp.spare]
enabled = false
listen = "{taken}"
dest = "{taken}"
""")
    with relay("--config", str(file)) as running:
        running.wait_for("relay spare is stopped")
        assert get(running, "/readyz?verbose") == (
            200,
            "[+] web: ok\n[-] spare: stopped\nok\n",
        )
        assert get(running, "/readyz/spare") == (503, "stopped\n")
        assert Samples(running)("relayd_sessions_opened_total", relay="spare") == 0
        with connect(running.port) as client, server.accept() as there:
            client.sendall(b"x")
            there.close()
        running.signal()
        assert running.wait() == 0
    # A process of such relays alone, which a file may change.
    text = file.read_text()
    file.write_text(text.replace("[tcp.web]\n", "[tcp.web]\nenabled = false\n"))
    running = RelayProcess("--config", str(file))
    try:
        running.wait_for("relay spare is stopped")
        assert get(running, "/readyz/web") == (503, "stopped\n")
        running.signal()
        assert running.wait() == 0
    finally:
        running.stop()


@pytest.mark.parametrize("taken", ["metrics", "listener"])
def test_a_port_in_use_starts_nothing(taken: str) -> None:
    """One line, and the other one is closed again."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = f"127.0.0.1:{other.getsockname()[1]}"
        metrics, listen = (port, "127.0.0.1:0")[:: 1 if taken == "metrics" else -1]
        running = RelayProcess("--metrics", metrics, "-l", listen, "-d", "9")
        try:
            assert running.wait() == 1
        finally:
            running.stop()
        where = "--metrics: can't" if taken == "metrics" else "can't"
        assert running.lines[-1].partition("] ")[2] == (
            f"relayd: {where} listen on {port}: Address already in use"
        )
        assert not [line for line in running.lines if "Traceback" in line]


def test_readers_can_not_disturb_the_relay(server: Server) -> None:
    """As many connections as they like, and nothing that makes sense on any."""
    with relay(*METRICS, "-l", "127.0.0.1:0", "-d", server.address) as running:
        where, before = address(running), running.descriptors
        hostile = [socket.create_connection(where, PATIENCE) for _ in range(100)]
        for number, each in enumerate(hostile):
            said = (b"GET /met", b"\0" * 1000, ASK * 20, b"GET / HTTP/1.1\r\nx: ")
            try:
                each.sendall(said[number % 4])
            except ConnectionError:
                continue
        assert get(where, "/livez") == (200, "ok\n")
        # Four are answered at a time: others are told to come again.
        eventually(lambda: get(where, "/metrics")[0] == 200)
        assert running.descriptors <= before + 40
        with connect(running.port) as client, server.accept() as upstream:
            client.sendall(b"still here")
            assert read_exactly(upstream, 10) == b"still here"
        for each in hostile:
            each.close()
        eventually(lambda: running.descriptors <= before, "all are closed")
        assert not [line for line in running.lines if "Traceback" in line]


ASK = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

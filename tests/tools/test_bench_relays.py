"""How each relay of the benchmark is started."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from twisted.logger import ILogObserver, LogLevel
from twisted.python.reflect import namedAny

from bench.own_relays import Setup
from bench.relays import RELAYS
from relayd.core.settings import BACKLOG, UDP_RCVBUF


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("quiet", [True, False])
def test_relayds_own_command_line(transport: str, quiet: bool, tmp_path: Path) -> None:
    setup = Setup(tmp_path, 20000, 20001, quiet)
    command = RELAYS[f"relayd-{transport}"].command(setup)
    words = " ".join(command)
    assert f"--transport {transport}" in words
    assert ("--quiet" in command) is quiet
    assert words.endswith("--listen 127.0.0.1:20000 --dest 127.0.0.1:20001")


def test_pools_command_lines(tmp_path: Path) -> None:
    """All servers are one, and each has another name, of which client-hash is made."""
    setup = Setup(tmp_path, 20000, 20001, quiet=True)
    two = " ".join(RELAYS["relayd-pool"].command(setup))
    assert two.endswith(
        "--dest 127.0.0.1:20001,name=two --balance least-sessions --check tcp"
    )
    for name, balance in (("hash", "client-hash"), ("thousand", "least-sessions")):
        command = RELAYS[f"relayd-{name}"].command(setup)
        servers = [word for word in command if word.startswith("127.0.0.1:20001")]
        assert len(set(servers)) == len(servers) == 1000
        assert command[command.index("--balance") + 1] == balance


def test_command_lines_of_routes(tmp_path: Path) -> None:
    """Each route is there; of server names there is one, for which clients ask."""
    setup = Setup(tmp_path, 20000, 20001, quiet=True)
    for name in ("relayd-route", "relayd-peek"):
        *before, option, place = RELAYS[name].command(setup)
        assert before == RELAYS["relayd-plane"].command(setup)
        assert option == "--route"
        assert inspect.iscoroutinefunction(namedAny(place.replace(":", ".")))
    words = " ".join(RELAYS["relayd-sni"].command(setup))
    assert words.endswith(
        "--quiet --listen 127.0.0.1:20000 --sni origin.example=127.0.0.1:20001"
    )
    assert "--dest" not in words


def test_portforward_logs_if_asked_to(tmp_path: Path) -> None:
    command = RELAYS["portforward"].command
    assert "--log" in command(Setup(tmp_path, 1, 2))
    assert "--log" not in command(Setup(tmp_path, 1, 2, quiet=True))


def test_relayds_own_proxys_command_line(tmp_path: Path) -> None:
    setup = Setup(tmp_path, 20000, 20001, quiet=True)
    words = " ".join(RELAYS["relayd-socks4"].command(setup))
    assert " --reactor=epoll socks4 --transport plane --quiet" in words
    assert words.endswith("--listen 127.0.0.1:20000")
    assert "20001" not in words


@pytest.mark.parametrize(
    ("name", "transport"),
    [("relayd-udp", "plane"), ("relayd-udp-twisted", "twisted")],
)
def test_relayds_own_command_line_for_datagrams(
    name: str, transport: str, tmp_path: Path
) -> None:
    """With the line for each flow: it is the default."""
    words = " ".join(RELAYS[name].command(Setup(tmp_path, 20000, 20001)))
    assert f"relayd --transport {transport} --listen" in words
    assert words.endswith("--listen udp:127.0.0.1:20000 --dest udp:127.0.0.1:20001")


@pytest.mark.parametrize(
    ("name", "plain", "scheme"),
    [
        ("relayd-transparent", "relayd-plane", ""),
        ("relayd-udp-transparent", "relayd-udp", "udp:"),
    ],
)
def test_command_lines_where_each_has_a_network_of_its_own(
    name: str, plain: str, scheme: str, tmp_path: Path
) -> None:
    """The transparent one differs by what makes it so, and nothing else."""
    setup = Setup(tmp_path, 20000, 20001, True, "10.0.0.254", "192.168.0.1")
    words = RELAYS[plain].command(setup)
    assert words[-4:] == [
        *("--listen", f"{scheme}10.0.0.254:20000"),
        *("--dest", f"{scheme}192.168.0.1:20001"),
    ]
    transparent = RELAYS[name].command(setup)
    assert transparent == [*words, "--transparent", "--manage-netfilter"]


def test_nginx_relays_streams_or_datagrams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.relays.program", lambda name: name)
    monkeypatch.setattr("bench.relays.STREAM_MODULE", tmp_path)
    for name, listen in (
        ("nginx", f"backlog={BACKLOG.default}"),
        ("nginx-udp", f"udp rcvbuf={UDP_RCVBUF.default}"),
    ):
        for quiet, log in ((True, "off"), (False, "/dev/stdout session")):
            RELAYS[name].command(Setup(tmp_path, 20000, 20001, quiet))
            config = (tmp_path / "nginx.conf").read_text()
            assert f"  listen 127.0.0.1:20000 {listen};\n" in config
            assert f"  access_log {log};\n" in config


def test_haproxy_splices_logs_and_is_smart_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.relays.program", lambda name: name)
    logs = {"log stdout format raw local0", "option tcplog"}
    splice = {"option splice-request", "option splice-response"}
    smart = {"option tcp-smart-accept", "option tcp-smart-connect"}
    for name, options in (
        ("haproxy", set()),
        ("haproxy-splice", splice),
        ("haproxy-smart", splice | smart),
    ):
        for quiet in (True, False):
            RELAYS[name].command(Setup(tmp_path, 20000, 20001, quiet))
            lines = (tmp_path / "haproxy.cfg").read_text().splitlines()
            found = {line.strip() for line in lines if re.match(r" +(log|opt)", line)}
            assert found == options | (set() if quiet else logs)


def test_dante_logs_the_end_of_a_session_unless_it_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.relays.program", lambda name: name)
    for quiet in (True, False):
        RELAYS["dante"].command(Setup(tmp_path, 20223, 1, quiet))
        config = (tmp_path / "danted.conf").read_text()
        assert ("logoutput: stdout\n" in config) is not quiet
        assert (" log: disconnect }" in config) is not quiet


def test_dante_listens_where_it_should_and_never_connects_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.relays.program", lambda name: name)
    said = set()
    for port in (20223, 20224):
        RELAYS["dante"].command(Setup(tmp_path, port, 1))
        config = (tmp_path / "danted.conf").read_text()
        assert f"internal: 127.0.0.1 port = {port}\n" in config
        [external] = re.findall(
            r"^external: 127\.1\.(\d+)\.(\d+)$", config, re.MULTILINE
        )
        assert max(map(int, external)) < 256
        said.add(external)
    assert len(said) == 2


def test_a_quiet_twistd_socks_has_no_log_observer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it names is a log's observer, and one that writes nothing."""
    twistd_socks = RELAYS["twistd-socks"].command
    assert "--logger" not in twistd_socks(Setup(tmp_path, 20000, 20001))
    command = twistd_socks(Setup(tmp_path, 20000, 20001, quiet=True))
    observer = namedAny(command[command.index("--logger") + 1])()
    assert ILogObserver.providedBy(observer)
    observer({"log_format": "a session", "log_level": LogLevel.info, "log_time": 0.0})
    assert capsys.readouterr() == ("", "")

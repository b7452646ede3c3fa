"""How each relay of the benchmark is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from twisted.logger import ILogObserver, LogLevel
from twisted.python.reflect import namedAny

from bench.relays import RELAYS, Setup
from relayd.core.settings import BACKLOG, UDP_RCVBUF


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("logs", [True, False])
def test_relayds_own_command_line(transport: str, logs: bool, tmp_path: Path) -> None:
    command = RELAYS[f"relayd-{transport}"].command(Setup(tmp_path, 20000, 20001, logs))
    words = " ".join(command)
    assert f"--transport {transport}" in words
    assert ("--quiet" in command) is not logs
    assert words.endswith("--listen 127.0.0.1:20000 --dest 127.0.0.1:20001")


def test_portforward_logs_if_asked_to(tmp_path: Path) -> None:
    command = RELAYS["portforward"].command
    assert "--log" in command(Setup(tmp_path, 1, 2, logs=True))
    assert "--log" not in command(Setup(tmp_path, 1, 2, logs=False))


def test_relayds_own_proxys_command_line(tmp_path: Path) -> None:
    command = RELAYS["relayd-socks4"].command(Setup(tmp_path, 20000, 20001, logs=False))
    words = " ".join(command)
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
    words = " ".join(RELAYS[name].command(Setup(tmp_path, 20000, 20001, logs=False)))
    assert f"relayd --transport {transport} --quiet" in words
    assert words.endswith("--listen udp:127.0.0.1:20000 --dest udp:127.0.0.1:20001")


def test_nginx_relays_streams_or_datagrams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.relays.program", lambda name: name)
    monkeypatch.setattr("bench.relays.STREAM_MODULE", tmp_path)
    for name, listen in (
        ("nginx", f"backlog={BACKLOG.default}"),
        ("nginx-udp", f"udp rcvbuf={UDP_RCVBUF.default}"),
    ):
        RELAYS[name].command(Setup(tmp_path, 20000, 20001, logs=False))
        config = (tmp_path / "nginx.conf").read_text()
        assert f"  listen 127.0.0.1:20000 {listen};\n" in config
        assert "  access_log off;\n" in config


def test_dante_listens_where_it_should_and_never_connects_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.relays.program", lambda name: name)
    said = set()
    for port in (20223, 20224):
        RELAYS["dante"].command(Setup(tmp_path, port, 1, logs=False))
        config = (tmp_path / "danted.conf").read_text()
        assert f"internal: 127.0.0.1 port = {port}\n" in config
        [external] = re.findall(
            r"^external: 127\.1\.(\d+)\.(\d+)$", config, re.MULTILINE
        )
        assert max(map(int, external)) < 256
        said.add(external)
    assert len(said) == 2


def test_twistd_socks_has_no_log_observer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it names is a log's observer, and one that writes nothing."""
    command = RELAYS["twistd-socks"].command(Setup(tmp_path, 20000, 20001, logs=False))
    observer = namedAny(command[command.index("--logger") + 1])()
    assert ILogObserver.providedBy(observer)
    observer({"log_format": "a session", "log_level": LogLevel.info, "log_time": 0.0})
    assert capsys.readouterr() == ("", "")

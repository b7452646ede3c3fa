"""`relayctl check`: what it finds, and how it says so."""

from __future__ import annotations

import io
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from twisted.internet import reactor

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.errors import ConfigError
from relayd.ctl.checking import check_file
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.operating.service import make_service

Captured = pytest.CaptureFixture[str]

GOOD = """\
drain_timeout = "5s"
[tcp.web]
listen = ["8080", "[::1]:8081"]
dest = ["10.0.0.5:80", "example.com:80"]
[udp.dns]
listen = "5300-5302"
dest = "9.9.9.9:5300-5302"
[socks4.office]
listen = "1080"
clients = ["allow 10.0.0.0/8"]
"""

#: What only making the endpoints tells: a file, and what is said.
BAD = {
    '[tcp.a]\nlisten = "tcp:8080:nterface=1"\ndest = "1"': (
        "tcp.a.listen: bad endpoint 'tcp:8080:nterface=1': it has no argument"
        " 'nterface'"
    ),
    '[tcp.a]\nlisten = "ssl:443:privateKey=/none.pem"\ndest = "1"': (
        "tcp.a.listen: bad endpoint 'ssl:443:privateKey=/none.pem': can't read"
        " '/none.pem': No such file or directory"
    ),
    '[tcp.a]\nlisten = "2"\ndest = ["3", "tcp:x:0"]': (
        "tcp.a.dest: bad endpoint 'tcp:x:0': a port here is 1 to 65535, not 0"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "127.255.255.255:1"': (
        "tcp.a.dest: bad address '127.255.255.255:1': it is a broadcast address"
    ),
    '[udp.a]\nlisten = "2"\ndest = "127.255.255.255:1"': (
        "udp.a.dest: bad address 'udp:127.255.255.255:1': it is a broadcast address"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "[fe80::1%none0]:1"': (
        "tcp.a.dest: bad address '[fe80::1%none0]:1': "
    ),
    '[udp.a]\nlisten = "2"\ndest = "[fe80::1%none0]:1"': (
        "udp.a: can't use udp:[fe80::1%none0]:1: "
    ),
    '[udp.a]\nlisten = "2"\ndest = "3"\nmax_flows = 9999999': (
        "udp.a: max-flows 9999999 is more than this process can have"
    ),
    '[socks4.a]\nlisten = "127.0.0.1:1"\nbind_address = "192.0.2.1"': (
        "socks4.a: bind-address '192.0.2.1' is no address of this machine"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "3"\nmark = 7\nsource = "192.0.2.1"': (
        "tcp.a: source '192.0.2.1' is no address of this machine"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "3"\ncheck = "python:no_such:f"': (
        "tcp.a.check: can't import the check python:no_such:f: ModuleNotFoundError: No"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "3,check=python:json:nothing"': (
        "tcp.a.dest: can't import the check python:json:nothing: AttributeError: module"
    ),
    '[tcp.a]\nlisten = "2"\nsni = ["x=a:1", "=tcp:x:0"]': (
        "tcp.a.sni: bad endpoint 'tcp:x:0': a port here is 1 to 65535, not 0"
    ),
    '[tcp.a]\nlisten = "2"\nsni = "=127.255.255.255:1"': (
        "tcp.a.sni: bad address '127.255.255.255:1': it is a broadcast address"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "3"\nsni = ["=default", "x=4,check=python:a_b:c"]': (
        "tcp.a.sni: can't import the check python:a_b:c: ModuleNotFoundError: No"
    ),
    '[tcp.a]\nlisten = "2"\ndest = "3"\nroute = "no_such:f"': (
        "tcp.a.route: route no_such:f: there is no module no_such; it is looked for"
    ),
    '[socks4.a]\nopen = true\nbind_address = "127.0.0.1"\nroute = "json:nothing"': (
        "socks4.a.route: route json:nothing: json has no nothing, and no coroutine"
    ),
    '[udp.a]\nlisten = "2"\ndest = "3"\nmax_flows = 9\ninterface = "none0"': (
        "udp.a: interface 'none0': there is none of that name"
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relayd.toml"


def test_a_good_file(path: Path, capsys: Captured) -> None:
    path.write_text(GOOD)
    assert main(["check", str(path)]) == Exit.DONE
    said = capsys.readouterr()
    assert said.out == f"{path}: 3 relays, no problems\n"
    assert said.err == ""
    path.write_text("demo = true")
    assert main(["check", str(path)]) == Exit.DONE
    assert capsys.readouterr().out == f"{path}: 1 relay, no problems\n"


def test_a_folder(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "a.toml").write_text('[tcp.a]\nlisten = "1"\ndest = "2"')
    (tmp_path / "b.toml").write_text('[tcp.b]\nlisten = "3"\ndest = "4"')
    assert main(["check", str(tmp_path)]) == Exit.DONE
    assert capsys.readouterr().out == f"{tmp_path}: 2 relays, no problems\n"


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    said = {"tcp": {"a": {"listen": "1", "dest": "2"}}}
    content = io.BytesIO(json.dumps(said).encode())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=content))
    assert main(["check", "-"]) == Exit.DONE
    assert capsys.readouterr().out == "standard input: 1 relay, no problems\n"


def test_all_problems_are_told(path: Path, capsys: Captured) -> None:
    path.write_text(
        'verbos = true\n[tcp.web]\nlisten = "99999"\ndest = "1"\nidle_timeout = "soon"'
    )
    assert main(["check", str(path)]) == Exit.INVALID
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    for key in ("verbos", "tcp.web.listen", "tcp.web.idle_timeout"):
        assert any(each.startswith(f"{path}: {key}: ") for each in lines), key


def test_no_such_file(path: Path, capsys: Captured) -> None:
    for command in ("check", "show"):
        assert main([command, str(path)]) == Exit.NOT_FOUND
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"{path}: there is no such file or folder\n"
        assert main([command, ""]) == Exit.NOT_FOUND
        assert main([command, __file__ + "/x.toml"]) == Exit.NOT_FOUND
        capsys.readouterr()


def test_one_that_may_not_be_read(
    path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is no mistake in the command line, and root may always."""
    monkeypatch.setattr("os.access", lambda *_: False)
    path.mkdir()
    assert main(["check", str(path)]) == Exit.INVALID
    assert capsys.readouterr().err == f"{path}: no *.toml in this folder\n"


def test_one_that_cannot_be_read(capsys: Captured) -> None:
    """It may be there."""
    assert main(["check", "x" * 300]) == Exit.INVALID
    assert capsys.readouterr().err.endswith(": can't be read: File name too long\n")


def test_for_programs(path: Path, capsys: Captured) -> None:
    path.write_text(GOOD)
    assert main(["check", "--json", str(path)]) == Exit.DONE
    said = json.loads(capsys.readouterr().out)
    assert said == {"file": str(path), "valid": True, "relays": 3, "problems": []}
    path.write_text("verbos = true")
    assert main(["check", "--json", str(path)]) == Exit.INVALID
    output = capsys.readouterr()
    said = json.loads(output.out)
    assert said["valid"] is False
    assert said["problems"][0].startswith(f"{path}: verbos: no such key")
    assert output.err == ""


@pytest.mark.parametrize("text", BAD)
def test_what_the_service_would_refuse(text: str, path: Path, capsys: Captured) -> None:
    """It does refuse each; and what the file says is right."""
    path.write_text(text)
    config = configure(read_layers(str(path)))
    with pytest.raises(ConfigError):
        make_service(config, reactor)
    assert main(["check", str(path)]) == Exit.INVALID
    said = capsys.readouterr()
    assert said.err.startswith(f"{path}: {BAD[text]}")
    assert said.err.count("\n") == 1
    assert main(["check", "--file-only", str(path)]) == Exit.DONE


def test_of_all_relays(path: Path, capsys: Captured) -> None:
    """A line for each of them, and of those alone that it is about."""
    path.write_text(
        GOOD
        + '[tcp.one]\nlisten = "tcp:1:x=y"\ndest = "tcp:x:0"\n'
        + '[tcp.two]\nlisten = "2"\ndest = "127.255.255.255:1"\n'
    )
    assert main(["check", str(path)]) == Exit.INVALID
    keys = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert keys == ["tcp.one.listen", "tcp.one.dest", "tcp.two.dest"]


def test_what_systemd_passes_is_left_to_the_service(
    path: Path, capsys: Captured
) -> None:
    path.write_text(
        '[tcp.a]\nlisten = "systemd:web"\ndest = "1"\n'
        '[tcp.b]\nlisten = "systemd:other"\ndest = "1"\naccept_proxy = "10.0.0.0/8"\n'
        '[tcp.c]\nlisten = "systemd:domain=INET:index=0"\ndest = "1"\n'
        '[udp.d]\nlisten = "systemd:dns"\ndest = "1"\nmax_flows = 5\n'
    )
    assert main(["check", str(path)]) == Exit.DONE
    assert "4 relays, no problems" in capsys.readouterr().out


def test_nothing_is_opened(path: Path, capsys: Captured) -> None:
    """A port that another program has is no problem of the file."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path.write_text(f'[tcp.a]\nlisten = "tcp:{port}"\ndest = "tcp:127.0.0.1:1"')
        assert main(["check", str(path)]) == Exit.DONE
    assert "no problems" in capsys.readouterr().out


def test_rules_take_programs(
    path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of relays that have none, nor where somebody else installs them."""
    relay = '[tcp.a]\nlisten = "2"\ndest = "3"\n'
    begin = f"{path}: manage_netfilter"
    lines = [
        f"{begin}: nft is not installed: it is of the package nftables",
        f"{begin}: ip is not installed: it is of the package iproute2",
    ]
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    for said, expected in (("true", lines), ("false", [])):
        path.write_text(f"manage_netfilter = {said}\n{relay}")
        assert main(["check", str(path)]) == (Exit.INVALID if expected else Exit.DONE)
        assert capsys.readouterr().err.splitlines() == expected
    monkeypatch.undo()
    path.write_text(f"manage_netfilter = true\n{relay}")
    monkeypatch.setattr("shutil.which", lambda name, path: f"/usr/sbin/{name}")
    assert main(["check", str(path)]) == Exit.DONE


def test_what_is_of_the_process(
    path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr("resource.setrlimit", refuse)
    monkeypatch.setattr(
        "relayd.operating.endpoints.obstacle", lambda _: "this is another system"
    )
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    path.write_text(
        'max_descriptors = 1000000000\ntransport = "plane"\n'
        'metrics_open = true\nmetrics = "tcp:9100:nothing=1"\n' + GOOD
    )
    assert main(["check", str(path)]) == Exit.INVALID
    said = capsys.readouterr().err.splitlines()
    for line, begin in zip(
        sorted(said),
        (
            "max_descriptors: max-descriptors 1000000000 can't be had: ",
            "metrics: bad endpoint 'tcp:9100:nothing=1': it has no argument",
            "metrics: it needs a package that is not installed: pip install",
            "transport: transport plane needs Linux",
        ),
        strict=True,
    ):
        assert line.startswith(f"{path}: {begin}")
    monkeypatch.undo()
    path.write_text(GOOD.replace("drain", 'transport = "twisted"\ndrain'))
    assert main(["check", str(path)]) == Exit.DONE


def test_a_check_of_all_relays_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "relayd.toml"
    relays = "".join(f'[tcp.r{i}]\nlisten = "{i}"\ndest = "9"\n' for i in (1, 2))
    file.write_text(f'[defaults]\ncheck = "python:no_such:f"\n{relays}')
    [problem] = check_file(str(file)).problems
    assert problem.startswith(f"{file}: defaults.check: can't import the check")
    assert check_file(str(file), file_only=True).problems == []

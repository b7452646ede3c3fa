"""Which sockets a service manager has passed on, and which of them have a name."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from relayd.net import activation
from relayd.net.activation import (
    passed_sockets,
    sockets_named,
    starting_environment,
)

STREAM, DATAGRAM = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)


def environ(count: str, names: str | None = None, pid: object = None) -> dict[str, str]:
    """What systemd sets."""
    found = {"LISTEN_FDS": count, "LISTEN_PID": str(pid or os.getpid())}
    return found if names is None else {**found, "LISTEN_FDNAMES": names}


def test_sockets_have_names_in_their_order() -> None:
    assert passed_sockets(environ("3", "web:dns:web")) == [
        ("web", 3),
        ("dns", 4),
        ("web", 5),
    ]
    # An older systemd tells no names.
    assert passed_sockets(environ("2")) == [("unknown", 3), ("unknown", 4)]


@pytest.mark.parametrize(
    "given",
    [
        {},
        environ("2", "a:b", pid=1),
        {"LISTEN_FDS": "1"},
        environ(""),
        environ("0", ""),
        environ("-1", "a"),
        environ("one", "a"),
        environ("²", "a"),
        environ("2", "a"),
        environ("1", "a:b"),
    ],
)
def test_without_sockets_of_this_process_there_are_none(given: dict[str, str]) -> None:
    """They are another's, or what is said of them makes no sense."""
    assert passed_sockets(given) == []


def test_absurd_numbers_of_sockets_take_no_memory() -> None:
    assert passed_sockets(environ("9" * 400, "a")) == []
    assert len(passed_sockets(environ("9" * 400))) == 1 << 20


def test_the_variables_are_those_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has happened to them since; without /proc they are those of now."""
    file = tmp_path / "environ"
    file.write_bytes(b"LISTEN_FDS=1\0NAME=a=b\0\xff=\xfe\0")
    found = starting_environment(str(file))
    assert found["LISTEN_FDS"] == "1"
    assert found["NAME"] == "a=b"
    assert starting_environment()["PATH"]
    monkeypatch.setenv("OF_NOW", "yes")
    assert starting_environment(str(tmp_path / "none"))["OF_NOW"] == "yes"


def test_sockets_by_name_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one name, or a line that says what is wrong, and what there is."""
    with ExitStack() as opened:

        def made(family: int, kind: int, where: object = ("127.0.0.1", 0)) -> int:
            sock = opened.enter_context(closing(socket.socket(family, kind)))
            if where:
                sock.bind(where)  # type: ignore[arg-type]
                if kind == STREAM:
                    sock.listen()
            return sock.fileno()

        file = opened.enter_context(open(__file__))
        web = made(socket.AF_INET, STREAM), made(socket.AF_INET6, STREAM, ("::1", 0))
        dns = made(socket.AF_INET, DATAGRAM)
        passed = [
            *(("web", web[0]), ("dns", dns), ("web", web[1]), ("file", file.fileno())),
            ("idle", made(socket.AF_INET, STREAM, None)),
            ("local", made(socket.AF_UNIX, DATAGRAM, None)),
            ("seq", made(socket.AF_UNIX, int(socket.SOCK_SEQPACKET), None)),
        ]
        monkeypatch.setattr(activation, "passed_sockets", lambda: passed)
        assert sockets_named("web", STREAM) == list(web)
        assert sockets_named("dns", DATAGRAM) == [dns]
        for name, kind, says in (
            ("ftp", STREAM, "no socket with this name, but 'web', 'dns', 'file',"),
            ("dns", STREAM, "for datagrams, and should be for streams: write"),
            ("web", DATAGRAM, "for streams, and should be for datagrams: write"),
            ("seq", STREAM, "of another kind, and should be for streams"),
            ("idle", STREAM, "the socket does not listen: set Accept=no"),
            ("local", DATAGRAM, "the socket has no IP address"),
            ("file", STREAM, f"descriptor {file.fileno()}, .* is not a socket"),
        ):
            with pytest.raises(ValueError, match=says):
                sockets_named(name, kind)
    monkeypatch.setattr(activation, "passed_sockets", lambda: [("gone", 5000)])
    with pytest.raises(ValueError, match="Bad file descriptor"):
        sockets_named("gone", STREAM)


def test_nothing_was_passed() -> None:
    """Nor to the process that runs this."""
    with pytest.raises(ValueError, match="has passed no sockets to this process"):
        sockets_named("web", STREAM)

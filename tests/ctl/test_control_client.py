"""Asking a running relayd: what is sent, and what is said when it can't be."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relayd.ctl import control_client, places
from relayd.ctl.control_client import ControlClient, find_socket, route
from relayd.ctl.exits import CommandFailed, Exit
from relayd.ctl.places import candidates
from tests.support.control import fake_relayd, raw_server

HEAD = b"HTTP/1.1 200 OK\r\n"
NOBODY = 65534


def failure(path: Path | str, *, method: str = "GET", within: float = 5) -> str:
    """The line with which a question, or a change, fails: relayd is not reached."""
    client = ControlClient(str(path))
    with pytest.raises(CommandFailed) as caught:
        if method == "GET":
            client.get("/v1/status", within=within)
        else:
            client.change(method, "/v1/confirm", {})
    assert caught.value.exit == Exit.UNREACHABLE
    [line] = caught.value.lines
    assert "\n" not in line
    return line


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user who may do nothing, if the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_question_and_a_change(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with fake_relayd(path) as relayd:
        relayd.answers = {
            "GET /v1/sessions": (200, {"sessions": []}),
            "PATCH /v1/relays/a%2Fb%20c": (200, {"name": "a/b c"}),
        }
        client = ControlClient(f"unix:{path}")
        query = {"relay": "a&b", "client": None, "limit": 5}
        assert client.get("/v1/sessions", query) == {"sessions": []}
        assert relayd.last == ("GET", "/v1/sessions?relay=a%26b&limit=5", None)
        body = {"settings": {"dest": ["é", None]}}
        assert client.change("PATCH", route("relays", "a/b c"), body)
        assert relayd.last == ("PATCH", "/v1/relays/a%2Fb%20c", body)
    for headers in relayd.headers:
        assert headers["Host"] == "localhost"
    assert relayd.headers[1]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((400, Exit.INVALID), (403, Exit.REFUSED), (404, Exit.NOT_FOUND)),
        *((405, Exit.REFUSED), (409, Exit.REFUSED), (412, Exit.REFUSED)),
        *((413, Exit.REFUSED), (422, Exit.INVALID), (500, Exit.FAILED)),
        (503, Exit.REFUSED),
    ],
)
def test_a_refusal_is_said_in_its_own_lines(
    tmp_path: Path, status: int, code: Exit
) -> None:
    problems = ["tcp.web.dest: it is bad", "an \x1b[31mescape\n", 5]
    with fake_relayd(tmp_path / "c") as relayd:
        relayd.answers["GET /v1/status"] = (status, {"problems": problems})
        with pytest.raises(CommandFailed) as caught:
            ControlClient(str(tmp_path / "c")).get("/v1/status")
    assert caught.value.exit == code
    assert caught.value.lines == (problems[0], r"an \x1b[31mescape\n", "5")


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        *((200, []), (200, None), (200, "x"), (302, {"problems": ["x"]})),
        *((500, {}), (404, {"problems": []}), (404, {"problems": "x"})),
    ],
)
def test_json_that_is_not_of_relayd(
    tmp_path: Path, status: int, answer: object
) -> None:
    with fake_relayd(tmp_path / "c") as relayd:
        relayd.answers["GET /v1/status"] = (status, answer)
        said = failure(tmp_path / "c")
    assert said.endswith(
        f"what answers is not relayd (HTTP status {status}, no JSON of relayd)"
    )


@pytest.mark.parametrize(
    "rubbish",
    [
        *(b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 100, b"HTTP/1.1 x y\r\n\r\n"),
        *(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200, b"x" * 100_000),
        HEAD + b"a:" + b"b" * 100_000,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        # Half an answer.
        *(HEAD, HEAD + b'Content-Length: 20\r\n\r\n{"a":'),
        HEAD + b'Content-Length: 20\r\n\r\n{"relays": []}',
        HEAD + b'Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n8\r\n{"a"',
        HEAD + b'Content-Length: 5\r\n\r\n{"a":',
        HEAD + b'Transfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n0\r\n\r\n',
        *(HEAD + b"\r\n" + b"[" * 100_000, HEAD + b"\r\n\xff\xfe", HEAD + b"\r\n"),
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nx",
    ],
)
def test_rubbish_and_halves(tmp_path: Path, rubbish: bytes) -> None:
    with raw_server(tmp_path / "c", rubbish):
        said = failure(tmp_path / "c")
    assert said.startswith(f"relayd can't be reached at {tmp_path / 'c'}: ")
    assert len(said) < 400


def test_it_closes_without_an_answer(tmp_path: Path) -> None:
    with raw_server(tmp_path / "c"):
        said = failure(tmp_path / "c")
    assert said.endswith("it closed the connection without an answer; ask again")


@pytest.mark.parametrize(
    "pieces",
    [(), (b"HTTP",), (HEAD, b"a: b\r\n"), (HEAD + b"\r\n", b" ")],
    ids=["never", "in its status", "in its headers", "in its content"],
)
def test_no_answer_in_time(tmp_path: Path, pieces: tuple[bytes, ...]) -> None:
    """Also if something arrives all the time: the whole must have arrived."""
    with raw_server(tmp_path / "c", *pieces, hold=True):
        said = failure(tmp_path / "c", within=0.05)
    assert said.endswith(": no answer within 0.05 s")


def test_of_a_change_nobody_knows_whether_it_was_made(tmp_path: Path) -> None:
    with raw_server(tmp_path / "c"):
        said = failure(tmp_path / "c", method="POST")
    assert said.endswith("`relayctl diff` say whether the change was made")


def test_an_answer_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "LONGEST", 5 << 20)
    with raw_server(tmp_path / "c", HEAD + b"\r\n", b" " * (1 << 20), hold=True):
        assert "an answer of more than 5 MiB" in failure(tmp_path / "c")


def test_there_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert failure(path) == (
        f"relayd can't be reached at {path}: there is no such socket; start relayd with"
        " --control unix:PATH, or say where it is with --control or RELAYD_CONTROL"
    )
    assert "there is no such socket" in failure(path / "below")


def test_a_socket_that_was_left(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "c"))
    assert "nobody listens" in failure(tmp_path / "c")


def test_too_many_wait(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX) as other,
    ):
        listening.bind(str(tmp_path / "c"))
        listening.listen(0)
        other.connect(str(tmp_path / "c"))
        assert "too many clients wait already" in failure(tmp_path / "c")


def test_it_is_no_socket(tmp_path: Path) -> None:
    assert "it is not a socket; say where" in failure(tmp_path)
    assert "too long" in failure("/" + "x" * 5000)
    assert "null" in failure("a\0b")
    # Too long for a socket, and yet there.
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(folder)
        try:
            listening.bind("c")
        finally:
            os.chdir(here)
        assert "too long" in failure(folder / "c")


def test_not_permitted() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path = os.path.join(name, "c")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            os.chmod(path, 0o600 if os.geteuid() == 0 else 0)
            with as_nobody():
                said = failure(path)
        assert "not permitted; it belongs to " in said
        assert f"(uid {os.getuid()}), mode 0" in said
        assert said.endswith(": run relayctl as that user, or as root")


def test_a_folder_that_hides_it() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = os.path.join(name, "relayd")
        os.mkdir(folder, 0o700 if os.geteuid() == 0 else 0)
        os.chmod(name, 0o755)
        with as_nobody():
            said = failure(f"{folder}/c")
        assert f"not permitted; the folder {folder} belongs to " in said
        os.chmod(folder, 0o700)


def test_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = tmp_path / "run"
    monkeypatch.setattr(places, "OF_THE_MACHINE", str(machine))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert candidates(None) == [str(machine)]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    own = tmp_path / "relayd" / "control.sock"
    with pytest.raises(CommandFailed) as caught:
        find_socket(None)
    assert f"{machine} or {own}: there is no such socket" in str(caught.value)
    own.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as other:
        one.bind(str(own))
        assert find_socket(None) == str(own)
        other.bind(str(machine))
        assert find_socket(None) == str(machine)
    assert candidates("unix:/a") == candidates("/a") == ["/a"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_who_is_refused_before_it_has_asked_is_told_why(
    tmp_path: Path, method: str
) -> None:
    """relayd answers one client too many, reads nothing, and closes."""
    answer = b'{"problems": ["there are too many clients: try again later"]}'
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "c"))
        listening.listen()
        client = ControlClient(str(tmp_path / "c"))
        connect = control_client._Connection.connect

        def connected(self: control_client._Connection) -> None:
            connect(self)
            with listening.accept()[0] as connection:
                head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % len(answer) + answer)

        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(CommandFailed) as caught,
        ):
            patch.setattr(control_client._Connection, "connect", connected)
            if method == "GET":
                client.get("/v1/status")
            else:
                client.change(method, "/v1/confirm", {})
    assert caught.value.exit == Exit.REFUSED
    assert caught.value.lines == ("there are too many clients: try again later",)

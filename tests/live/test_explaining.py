"""What a relay that runs explains of itself, and how much its log says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.live.test_control_socket import ask
from tests.support.process import Server, connect, relay


def explained(path: Path, **asked: Any) -> tuple[bool, str | None, dict[str, str]]:
    """Whether a client is admitted, to where, and the last result of each step."""
    given = {"relay": "web", "client": "127.0.0.1", **asked}
    status, found = ask(path, "POST", "/v1/explain", given)
    assert status == 200, found
    steps = {each["step"]: each["result"] for each in found["steps"]}
    return found["admitted"], found["server"], steps


def test_a_relay_explains_as_it_stands(server: Server, tmp_path: Path) -> None:
    """It knows who is there, and nobody is counted by asking."""
    path = tmp_path / "c"
    args = ("--control", f"unix:{path}", "--name", "web", "--max-sessions", "1")
    listen = ("-l", "127.0.0.1:0", "-d", server.address)
    with relay(*args, *listen, "--deny-client", "192.0.2.0/24") as running:
        for _ in range(3):
            admitted, to, steps = explained(path)
            assert (admitted, to, steps["limits"]) == (True, server.address, "ok")
        with connect(running.port) as client, server.accept() as far:
            client.sendall(b"x")
            assert far.recv(1) == b"x"
            admitted, to, steps = explained(path)
            assert (admitted, to, steps["limits"]) == (False, None, "refused")
        assert explained(path, client="192.0.2.7")[2]["rules"] == "refused"
        status, said = ask(path, "POST", "/v1/explain", {"relay": "web", "client": "x"})
        assert status == 422
        assert said["problems"][0].startswith("bad client 'x': expected an address")
        assert ask(path, "POST", "/v1/relays/web/pause", {})[0] == 200
        assert explained(path)[2]["state"] == "waits"
        assert ask(path, "POST", "/v1/relays/web/stop", {})[0] == 200
        assert explained(path)[2] == {"state": "refused"}


def test_the_level_of_a_namespace_is_set(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "c"
    args = ("--control", f"unix:{path}", "--name", "web")
    checks = ("--check", "tcp", "--check-every", "0.1")
    listen = ("-l", "127.0.0.1:0", "-d", server.address)
    with relay(*args, *listen, *checks) as running:
        target = "/v1/log-levels/relayd.checks"
        answer = ask(path, "PUT", target, {"level": "debug"})
        assert answer == (
            200,
            {"levels": {"default": "info", "relayd.checks": "debug"}},
        )
        assert ask(path, "GET", "/v1/log-levels") == answer
        running.wait_for(r"\[relayd.checks#debug\] check of .* up: ")

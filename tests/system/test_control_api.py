"""The control socket as schemathesis and others find it: real clients, real users.

schemathesis makes requests of the description, right ones and wrong ones, and compares
what comes with what the description says.  It speaks TCP, so a relay leads it to the
socket.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.threads import deferToThread

from relayd.control.reading import OPENAPI
from relayd.net.listening import TCPListenerEndpoint
from relayd.operating.control_service import ControlService
from relayd.tcp import RelayFactory
from tests.control.fake_steering import FakeSteering
from tests.support.contracts import until
from tests.support.process import RelayProcess
from tests.system.programs import LIMIT, module, program

pytestmark = pytest.mark.system

CONFIG = Path(__file__).parent / "schemathesis.toml"

#: Users that need not exist: of the three rights.
OPERATOR, READER, STRANGER = 64001, 64002, 64003

#: Asks a socket for what it is told, as a user, with Python alone.
CLIENT = """
import encodings.idna, http.client, json, os, socket, sys

where, user, *words = sys.argv[1:]
os.setgroups([])
os.setresgid(*[int(user)] * 3)
os.setresuid(*[int(user)] * 3)

class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(where)

found = []
for method, path in zip(words[::2], words[1::2]):
    connection = Connection("localhost")
    connection.request(method, path)
    answer = connection.getresponse()
    found.append([answer.status, json.load(answer)])
print(json.dumps(found))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users may enter."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@asynccontextmanager
async def running(service: ControlService) -> AsyncIterator[None]:
    service.startService()
    try:
        yield
    finally:
        await maybeDeferred(service.stopService)
        await until(lambda: not service.site.channels)


@asynccontextmanager
async def relay_to(path: Path) -> AsyncIterator[int]:
    """A relay from a port of loopback to a socket."""
    factory = RelayFactory(UNIXClientEndpoint(reactor, str(path)))
    listening = TCPListenerEndpoint(reactor, "127.0.0.1", 0, 64)
    port: Any = await listening.listen(factory)
    try:
        yield port.getHost().port
    finally:
        await maybeDeferred(port.stopListening)
        await until(lambda: not len(factory.registry))


async def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a program while the reactor turns."""
    done: subprocess.CompletedProcess[str] = await deferToThread(
        subprocess.run,
        words,
        capture_output=True,
        text=True,
        timeout=10 * LIMIT,
        check=False,
        **more,
    )
    return done


async def schemathesis(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What it says of the socket at a path.

    :param folder: for what it keeps.
    """
    module("schemathesis")
    # With pytest's own, which its first line names.
    seed = random.randrange(2**32)
    async with relay_to(path) as port:
        return await run(
            str(Path(sys.executable).with_name("schemathesis")),
            f"--config-file={CONFIG}",
            "--no-color",
            "run",
            f"http://localhost:{port}{OPENAPI}",
            "--checks=all",
            "--continue-on-failure",
            "--max-examples=30",
            f"--seed={seed}",
            cwd=folder,
        )


@pytest_twisted.ensureDeferred
async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """In the site: what it asks of is a stand-in that refuses what a relayd refuses."""
    path = tmp_path / "c"
    service = ControlService(reactor, str(path), FakeSteering())
    async with running(service):
        found = await schemathesis(path, tmp_path)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr
    assert not service.site.timeouts


FILE = """
control = "unix:%s"
[tcp.web]
listen = "127.0.0.1:0"
dest = [{address = "127.0.0.1:9", name = "a"}, {address = "127.0.0.1:10", name = "b"}]
[udp.dns]
listen = "127.0.0.1:0"
dest = "127.0.0.1:9"
[socks4.office]
listen = "127.0.0.1:0"
"""


@pytest_twisted.ensureDeferred
async def test_schemathesis_finds_nothing_in_a_running_relayd(tmp_path: Path) -> None:
    """And nothing that it asks for is a defect."""
    path, file = tmp_path / "c", tmp_path / "f.toml"
    file.write_text(FILE % path)
    running = RelayProcess("--config", str(file), fresh=True)
    try:
        running.listening(3)
        found = await schemathesis(path, tmp_path)
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr
        assert not [line for line in running.lines if "Traceback" in line]
    finally:
        await deferToThread(running.stop)


async def asked(path: Path, user: int, *words: str) -> list[Any]:
    """What a process of a user is answered: status and body of each."""
    done = await run(sys.executable, "-c", CLIENT, str(path), str(user), *words)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest_twisted.ensureDeferred
async def test_users_have_the_rights_that_were_given(folder: Path) -> None:
    """The kernel says who they are, not they."""
    path = folder / "c"
    steering = FakeSteering()
    service = ControlService(reactor, str(path), steering, [OPERATOR], [READER])
    both = ("GET", "/v1/status", "POST", "/v1/relays/web/stop")
    async with running(service):
        for user, statuses in (
            (READER, [200, 403]),
            (STRANGER, [403, 403]),
            (OPERATOR, [200, 200]),
            (0, [200, 200]),
        ):
            steering.calls.clear()
            found = await asked(path, user, *both)
            assert [status for status, _ in found] == statuses
            asker = [each[-1].uid for each in steering.calls]
            assert asker == ([user] if statuses[-1] == 200 else [])


@pytest_twisted.ensureDeferred
async def test_nobody_else_can_connect_unless_they_are_let_in(folder: Path) -> None:
    path = folder / "c"
    service = ControlService(reactor, str(path), FakeSteering())
    async with running(service):
        done = await run(
            *(sys.executable, "-c", CLIENT, str(path), str(STRANGER)),
            *("GET", "/v1/status"),
        )
        assert "PermissionError" in done.stderr
        assert (await asked(path, 0, "GET", "/v1/status"))[0][0] == 200


@pytest_twisted.ensureDeferred
async def test_curl(folder: Path) -> None:
    """With what a script would use: a change by its ETag, and a list."""
    path = folder / "c"
    steering = FakeSteering(sessions=5000)
    service = ControlService(reactor, str(path), steering)
    curl = (program("curl"), "-sS", "--fail-with-body", "--unix-socket", str(path))
    async with running(service):
        listed = await run(*curl, "http://localhost/v1/sessions?limit=5000")
        assert len(json.loads(listed.stdout)["sessions"]) == 5000
        changed = await run(
            *(*curl, "-X", "PATCH", "http://relayd/v1/relays/web"),
            *("-H", "Content-Type: application/json", "-H", 'If-Match: "1"'),
            *("-d", '{"settings": {"idle_timeout": "5m"}}'),
        )
        assert json.loads(changed.stdout)["name"] == "web"
        stale = await run(
            *(*curl, "-X", "POST", "-H", 'If-Match: "1"'),
            "http://localhost/v1/relays/web/stop",
        )
        assert "it has changed" in json.loads(stale.stdout)["problems"][0]
        chunked = await run(
            *(*curl, "-T", "-", "-X", "POST", "http://localhost/v1/kill"),
            input="{}",
        )
        assert "Content-Length" in json.loads(chunked.stdout)["problems"][0]

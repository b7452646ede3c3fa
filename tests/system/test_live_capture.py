"""`relayctl capture` of a session that goes on, as tshark reads it from a pipe."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from relayd.operating import EmbeddedRelays
from relayd.operating.control_service import ControlService
from tests.support.contracts import until
from tests.system.programs import program
from tests.system.test_control_api import run, running

pytestmark = pytest.mark.system

#: Any 256 bytes in a row say where they are from.
SAID = b"".join(number.to_bytes(4, "big") for number in range(1 << 16))

#: Bytes of each direction.
MOST = 400_000

CTL = "from relayd.ctl.main import main; raise SystemExit(main())"


class Bulk:
    """A client and a server that say much to each other, without an end.

    :param port: of the relay.
    :param listening: the server's.
    """

    def __init__(self, port: int, listening: socket.socket) -> None:
        self._client = socket.create_connection(("127.0.0.1", port))
        self._listening = listening
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._hear, args=[self._client]),
            threading.Thread(target=self._say, args=[self._client]),
            threading.Thread(target=self._serve),
        ]
        for each in self._threads:
            each.start()

    def _serve(self) -> None:
        server, _ = self._listening.accept()
        with server:
            hears = threading.Thread(target=self._hear, args=[server])
            hears.start()
            self._say(server)
            hears.join()

    def _say(self, sock: socket.socket) -> None:
        while not self._over.wait(0.0005):
            sock.sendall(SAID)
        sock.shutdown(socket.SHUT_WR)

    def _hear(self, sock: socket.socket) -> None:
        while sock.recv(1 << 20):
            pass

    def end(self) -> None:
        self._over.set()
        for each in self._threads:
            each.join()
        self._client.close()


@pytest_twisted.ensureDeferred
async def test_tshark_reads_a_session_that_splices_again(tmp_path: Path) -> None:
    """Every packet is right, and what it says is what the client says."""
    tshark, path = program("tshark"), tmp_path / "c"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        dest = f"127.0.0.1:{listening.getsockname()[1]}"
        relays = EmbeddedRelays.from_settings(
            reactor, {"tcp": {"web": {"listen": "127.0.0.1:0", "dest": dest}}}
        )
        relays.startService()
        service = ControlService(reactor, str(path), relays.steering)
        async with running(service):
            port = relays.steering.relay("web")["listen"][0].rpartition(":")[2]
            bulk = Bulk(int(port), listening)
            try:
                factory = relays.steering._shown_of("web").factories[0]
                await until(lambda: factory.registry.living(), "a session")
                [session] = [each.session for each in factory.registry.living()]
                await until(lambda: session.up.spliced > 1 << 20, "it splices")
                ctl = f"{sys.executable} -c '{CTL}' --control {path}"
                capture = f"{ctl} capture {session.id} --bytes {MOST}"
                fields = "-T fields -e tcp.checksum.status -e tcp.srcport"
                fields += " -e tcp.payload"
                check = "-o tcp.check_checksum:TRUE -d tcp.port==0-65535,data"
                read = f"{tshark} -n -i - {check} {fields}"
                done = await run("sh", "-c", f"{capture} | {read}")
                assert done.returncode == 0, done.stderr
                before = session.up.spliced
                await until(
                    lambda: session.up.spliced > before + (1 << 24), "it splices again"
                )
            finally:
                await deferToThread(bulk.end)
                await until(lambda: not len(factory.registry), "its end")
                await relays.stopService()
    assert "the session goes on; no packet dropped\n" in done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert {status for status, *_ in lines} == {"1"}
    ports = {source for _, source, _ in lines}
    assert len(ports) == 2
    for one in ports:
        said = bytes.fromhex("".join(each[2] for each in lines if each[1] == one))
        assert len(said) == MOST
        assert said in SAID * 4

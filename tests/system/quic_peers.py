"""Two QUIC programs, run as `python -m tests.system.quic_peers server|client …`.

The client sends half of the data on one stream, and the server answers with the
other half.  In the middle of either half the client's machine gets another port, as
it does behind a NAT that forgets: it goes on from a new socket, and the server must
find the connection by its id.

Both are processes of their own as each needs a processor, and an asyncio loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from aioquic.asyncio import QuicConnectionProtocol, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamDataReceived

ALPN = "relayd-test"

#: How much is handed to QUIC at once; what it can't send yet it keeps.
PIECE = 1 << 20

#: What flow control lets a peer send ahead, in bytes.
WINDOW = 8 << 20

#: Of a UDP payload; a loopback interface and all Ethernets let it pass.
DATAGRAM = 1400


def payload(name: str, size: int) -> bytes:
    """Random bytes, the same ones for a name."""
    return random.Random(name).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def configuration(*, client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=client,
        alpn_protocols=[ALPN],
        max_datagram_size=DATAGRAM,
        max_data=WINDOW,
        max_stream_data=WINDOW,
        idle_timeout=10.0,
    )


class Answering(QuicConnectionProtocol):
    """The server: says what it has received and from where, and sends its half."""

    def __init__(self, *args: Any, half: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._half = half
        self._received = bytearray()
        #: The client's ports, as the server sees them: those of the relay.
        self._ports: list[int] = []

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        if addr[1] not in self._ports:
            self._ports.append(addr[1])
        super().datagram_received(data, addr)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self._received += event.data
            if event.end_stream:
                answer = payload("down", self._half)
                self._quic.send_stream_data(event.stream_id, answer, end_stream=True)
        elif isinstance(event, ConnectionTerminated):
            told = {
                "error": event.error_code,
                "size": len(self._received),
                "sha256": sha256(self._received),
                "ports": self._ports,
            }
            print("over", json.dumps(told), flush=True)


async def server(certificate: Path, key: Path, half: int) -> None:
    settings = configuration(client=False)
    settings.load_cert_chain(certificate, key)
    serving = await serve(
        "127.0.0.1",
        0,
        configuration=settings,
        create_protocol=lambda *args, **options: Answering(*args, half=half, **options),
    )
    port = cast(Any, serving)._transport.get_extra_info("sockname")[1]
    print(f"serving on {port}", flush=True)
    await asyncio.Event().wait()


class Moving(QuicConnectionProtocol):
    """The client, which has one socket after the other."""

    def __init__(self, connection: QuicConnection) -> None:
        super().__init__(connection)
        self.received = bytearray()
        self.done = asyncio.Event()
        #: Called after each datagram.
        self.look: Callable[[], None] = lambda: None

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        super().datagram_received(data, addr)
        self.look()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self.received += event.data
            if event.end_stream:
                self.done.set()
        elif isinstance(event, ConnectionTerminated):
            # What was received until then is looked at, and found wanting.
            self.done.set()

    async def move(self) -> int:
        """Go on from a new socket; what was on its way to the old one is lost.

        :return: the new port.
        """
        loop, before = asyncio.get_running_loop(), self._transport
        # Taking the protocol makes the new socket the one that it sends with.
        transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", 0)
        )
        if before is not None:
            before.close()
            # Whoever moves takes another connection id, so as not to be recognised.
            self.change_connection_id()
        port: int = transport.get_extra_info("sockname")[1]
        return port

    def acknowledged(self, stream: int) -> int:
        """How many of our bytes have arrived, in one piece from the first."""
        sender = self._quic._streams[stream].sender
        return cast(int, cast(Any, sender)._buffer_start)


async def client(port: int, certificate: Path, half: int) -> None:
    settings = configuration(client=True)
    settings.server_name = "localhost"
    settings.load_verify_locations(str(certificate))
    settings.verify_mode = ssl.CERT_REQUIRED
    connection = QuicConnection(configuration=settings)
    protocol = Moving(connection)
    ports = [await protocol.move()]
    protocol.connect(("127.0.0.1", port))
    await protocol.wait_connected()
    stream = connection.get_next_available_stream_id()

    async def once(condition: Callable[[], bool]) -> None:
        reached = asyncio.Event()

        def look() -> None:
            if condition() or protocol.done.is_set():
                reached.set()

        protocol.look = look
        look()
        await reached.wait()

    sent = payload("up", half)
    for start in range(0, half, PIECE):
        end = start + PIECE
        connection.send_stream_data(stream, sent[start:end], end_stream=end >= half)
    protocol.transmit()
    await once(lambda: protocol.acknowledged(stream) >= half // 2)
    ports.append(await protocol.move())
    await once(lambda: len(protocol.received) >= half // 2)
    ports.append(await protocol.move())
    await protocol.done.wait()
    told = {
        "sent": sha256(sent),
        "size": len(protocol.received),
        "sha256": sha256(protocol.received),
        "expected": sha256(payload("down", half)),
        "ports": ports,
    }
    protocol.close()
    await protocol.wait_closed()
    if protocol._transport is not None:
        protocol._transport.close()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server", certificate, key, half]:
            asyncio.run(server(Path(certificate), Path(key), int(half)))
        case ["client", port, certificate, half]:
            asyncio.run(client(int(port), Path(certificate), int(half)))
        case _:
            sys.exit("server CERTIFICATE KEY HALF, or client PORT CERTIFICATE HALF")

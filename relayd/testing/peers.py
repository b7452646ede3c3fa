"""The far end of a transport under test."""

from __future__ import annotations

import socket
import struct

from relayd.testing.suite import pause, until


class Peer:
    """The far end, which never blocks; a subclass implements the calls.

    :ivar data: what was read.
    :ivar ended: the end of data was read.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False

    def send_some(self, data: bytes) -> int:
        """Send what can be sent without blocking; return the number of bytes."""
        raise NotImplementedError

    def receive_some(self, count: int) -> bytes | None:
        """Read at most this many bytes.

        :return: b"" at the end of data; None if nothing has arrived.
        :raises ConnectionError: the transport has reset the connection.
        """
        raise NotImplementedError

    def end(self) -> None:
        """End this side's data, and go on reading.

        :raises OSError: the connection is gone.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection.  May be called again."""
        raise NotImplementedError

    def reset(self) -> None:
        """Reset the connection; called only where the contract's `resets` is true."""
        raise NotImplementedError

    # -- made of the calls above

    def take(self) -> bool:
        """Read all that has arrived; True once the end of data was read."""
        while not self.ended:
            part = self.receive_some(1 << 20)
            if part is None:
                break
            self.data += part
            self.ended = not part
        return self.ended

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            sent = self.send_some(bytes(view[: 1 << 18]))
            view = view[sent:]
            if not sent:
                await pause(0.001)

    def flood(self) -> int:
        """Send until the socket is full; return the number of bytes."""
        total = 0
        while sent := self.send_some(bytes(1 << 18)):
            total += sent
        return total

    async def read(self, count: int) -> bytes:
        """Wait until this many bytes, or the end of data, were read; return all."""
        await until(lambda: self.take() or len(self.data) >= count, f"{count} bytes")
        return bytes(self.data)

    async def read_all(self) -> bytes:
        """Wait for the end of data; return all that was read."""
        await until(self.take, "the end of data")
        return bytes(self.data)


class SocketPeer(Peer):
    """The far end as a connected socket of this process.

    :ivar socket: that socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.setblocking(False)
        self.socket = sock

    def send_some(self, data: bytes) -> int:
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0

    def receive_some(self, count: int) -> bytes | None:
        try:
            return self.socket.recv(count)
        except BlockingIOError:
            return None

    def end(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

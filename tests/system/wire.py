"""What is on a link: packets as an AF_PACKET socket gets them, and tshark reads them.

The socket sees what comes in before any rule of the kernel has changed it, and what
goes out after all of them: what is on the cable.  It captures from when it is made,
and keeps what it gets in its own buffer until it is read.
"""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from tests.system.namespaces import Machine
from tests.system.programs import program, run

#: Everything that the link carries, both ways (linux/if_ether.h).
_ETH_P_ALL = 3

#: What may wait in a socket, in bytes.
_UNREAD = 128 << 20

_SO_RCVBUFFORCE = 33  # socket(7)

#: The end of a packet that is too large for one read.
_LARGEST = 1 << 17

_FIELDS = (
    *("ip.src", "ipv6.src", "ip.dst", "ipv6.dst", "ip.proto", "ipv6.nxt"),
    *("tcp.srcport", "udp.srcport", "tcp.dstport", "udp.dstport", "tcp.flags"),
    *("tcp.payload", "udp.payload"),
)

_KINDS = {"1": "icmp", "6": "tcp", "17": "udp", "58": "icmp"}

_FIN, _SYN, _RST = 1, 2, 4


@attrs.frozen
class Packet:
    """One packet.

    :ivar kind: tcp, udp or icmp.
    :ivar source: host:port; the host alone, of ICMP.
    :ivar flags: of TCP.
    """

    kind: str
    source: str
    destination: str
    flags: int
    data: bytes

    @property
    def way(self) -> str:
        """Where from and where to."""
        return f"{self.source} > {self.destination}"

    @property
    def opens(self) -> bool:
        """Whether it is a SYN, of either side."""
        return bool(self.flags & _SYN)

    @property
    def ends(self) -> bool:
        """Whether it is a FIN."""
        return bool(self.flags & _FIN)

    @property
    def resets(self) -> bool:
        return bool(self.flags & _RST)


class Wire:
    """One link, captured.

    :param folder: where what it has captured is written.
    """

    def __init__(self, machine: Machine, link: str, folder: Path) -> None:
        self._folder = folder
        with machine.inside():
            # Of no protocol, it gets nothing before it is bound to its link.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _UNREAD)
            self._socket.bind((link, _ETH_P_ALL))
        self._socket.setblocking(False)
        self._frames: list[bytes] = []

    def close(self) -> None:
        self._socket.close()

    def forget(self) -> None:
        """Drop what it has captured."""
        self._read()
        self._frames.clear()

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while True:
                self._frames.append(self._socket.recv(_LARGEST))

    def packets(self, kind: str = "") -> list[Packet]:
        """Those so far, in their order: of one kind, or of TCP, UDP and ICMP.

        ICMP's are errors alone: the rest of it is how machines find each other.
        """
        self._read()
        shown = "tcp || udp || icmp.type == 3 || icmpv6.type <= 4"
        options = [f"-e{each}" for each in _FIELDS]
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".pcap") as file:
            # Of Ethernet, in this machine's order of bytes (pcap-savefile(5)).
            file.write(struct.pack("IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LARGEST, 1))
            for each in self._frames:
                file.write(struct.pack("IIII", 0, 0, len(each), len(each)) + each)
            file.flush()
            text = run(
                *(program("tshark"), "-n", "-r", file.name, "-Y", shown),
                # What is in a packet that an error quotes is not the packet's.
                *("-T", "fields", "-E", "occurrence=f", *options),
                # Whatever the port is of, its bytes are bytes.
                *("-d", "tcp.port==0-65535,data", "-d", "udp.port==0-65535,data"),
            )
        found = [_packet(line.split("\t")) for line in text.splitlines()]
        return [each for each in found if kind in ("", each.kind)]


def _packet(fields: list[str]) -> Packet:
    *ends, flags, of_tcp, of_udp = fields
    # Of each pair, only one is there.
    source, destination, number, own, other = map(
        "".join, zip(ends[::2], ends[1::2], strict=True)
    )
    kind = _KINDS[number]
    if kind != "icmp":
        source, destination = at(source, own), at(destination, other)
    bits = int(flags, 16) if kind == "tcp" else 0
    return Packet(kind, source, destination, bits, bytes.fromhex(of_tcp + of_udp))


def at(host: str, port: int | str) -> str:
    """An address and its port, as relayd, URLs and `ss` write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def captured(machine: Machine, link: str, folder: Path) -> Iterator[Wire]:
    """Capture a link of a machine for the length of a block."""
    wire = Wire(machine, link, folder)
    try:
        yield wire
    finally:
        wire.close()

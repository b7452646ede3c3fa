"""What is on a link: packets as an AF_PACKET socket gets them, and tshark reads them.

The socket sees what comes in before any rule of the kernel has changed it, and what
goes out after all of them: what is on the cable.  It captures from when it is made,
and keeps what it gets in its own buffer until it is read.
"""

from __future__ import annotations

import socket
import struct
import tempfile
from contextlib import suppress
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
    """One link of a machine, captured."""

    def __init__(self, machine: Machine, link: str) -> None:
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
        self.frames().clear()

    def frames(self) -> list[bytes]:
        """Those so far, in their order, from the Ethernet header on."""
        with suppress(BlockingIOError):
            while True:
                self._frames.append(self._socket.recv(_LARGEST))
        return self._frames


def packets(folder: Path, *wires: Wire) -> list[list[Packet]]:
    """What each of these has captured so far: TCP, UDP and ICMP, in its order.

    ICMP's are errors alone: the rest of it is how machines find each other.

    :param folder: where what tshark reads is written.
    """
    shown = "tcp || udp || icmp.type == 3 || icmpv6.type <= 4"
    options = [f"-e{each}" for each in _FIELDS]
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".pcap") as file:
        # Of Ethernet, in this machine's order of bytes (pcap-savefile(5)).
        file.write(struct.pack("IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _LARGEST, 1))
        for number, wire in enumerate(wires):
            for each in wire.frames():
                # As their time, from which of the wires they are.
                header = struct.pack("IIII", number, 0, len(each), len(each))
                file.write(header + each)
        file.flush()
        text = run(
            *(program("tshark"), "-n", "-r", file.name, "-Y", shown),
            # What is in a packet that an error quotes is not the packet's.
            *("-T", "fields", "-E", "occurrence=f", "-e", "frame.time_epoch"),
            # Whatever the port is of, its bytes are bytes.
            *("-d", "tcp.port==0-65535,data", "-d", "udp.port==0-65535,data"),
            *options,
        )
    found: list[list[Packet]] = [[] for _ in wires]
    for line in text.splitlines():
        number, *fields = line.split("\t")
        found[int(float(number))].append(_packet(fields))
    return found


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

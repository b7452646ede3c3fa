"""ClientHellos: those that clients have sent, taken apart, and put together anew.

What is here shares nothing with :mod:`relayd.preludes.client_hello`, and is strict:
what a reader might forgive is an error.
"""

from __future__ import annotations

import struct
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs

_FILE = Path(__file__).parent.parent / "preludes" / "hellos.toml"

SERVER_NAME, GROUPS, ALPN, VERSIONS, KEY_SHARE = 0, 10, 16, 43, 51
ECH = 0xFE0D
#: A post-quantum group, X25519MLKEM768, and how long a client's key of it is.
MLKEM, MLKEM_SIZE = 0x11EC, 1216


@attrs.frozen
class Captured:
    """What a client has sent.

    :ivar data: the bytes on the wire: one record.
    """

    client: str
    data: bytes
    server_name: str | None
    alpn: tuple[bytes, ...]
    ech: bool


def _captured() -> dict[str, Captured]:
    with _FILE.open("rb") as file:
        table = tomllib.load(file)
    return {
        name: Captured(
            row["client"],
            bytes.fromhex(row["data"]),
            row.get("server_name"),
            tuple(each.encode() for each in row.get("alpn", ())),
            row.get("ech", False),
        )
        for name, row in table.items()
    }


#: By name.
CAPTURED = _captured()


def is_grease(value: int) -> bool:
    """Whether this is one of the values that mean nothing (RFC 8701)."""
    return value & 0x0F0F == 0x0A0A and value >> 8 == value & 0xFF


class _Bytes:
    """Takes vectors from bytes; what is not there is an error."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        assert count <= len(self.data)
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        """Bytes with their count before them, in so many bytes."""
        return self.take(self.number(size))

    def end(self) -> None:
        assert not self.data


def vector(data: bytes, size: int) -> bytes:
    """Bytes with their count before them, in so many bytes."""
    return len(data).to_bytes(size) + data


def numbers(data: bytes) -> list[int]:
    """Numbers of two bytes."""
    return [number for (number,) in struct.iter_unpack(">H", data)]


@attrs.frozen
class Hello:
    """A ClientHello in its parts.

    :ivar extensions: by type, in their order; None: there is not even their length.
    """

    version: int = 0x0303
    random: bytes = bytes(range(32))
    session_id: bytes = b""
    suites: tuple[int, ...] = (0x1301, 0xC02F)
    compression: bytes = b"\0"
    extensions: tuple[tuple[int, bytes], ...] | None = None

    def extension(self, kind: int) -> bytes:
        """The data of the extension of this type, of which there is one."""
        [found] = [data for has, data in self.extensions or () if has == kind]
        return found

    @property
    def groups(self) -> list[int]:
        return numbers(_Bytes(self.extension(GROUPS)).vector(2))

    @property
    def versions(self) -> list[int]:
        return numbers(_Bytes(self.extension(VERSIONS)).vector(1))

    @property
    def key_shares(self) -> list[tuple[int, int]]:
        """The group and the size of each key."""
        shares = _Bytes(_Bytes(self.extension(KEY_SHARE)).vector(2))
        found = []
        while shares.data:
            group = shares.number(2)
            found.append((group, len(shares.vector(2))))
        return found

    def body(self) -> bytes:
        """What it is without the header of its message."""
        suites = b"".join(suite.to_bytes(2) for suite in self.suites)
        block = b""
        if self.extensions is not None:
            block = vector(
                b"".join(
                    kind.to_bytes(2) + vector(data, 2) for kind, data in self.extensions
                ),
                2,
            )
        return b"".join(
            (
                self.version.to_bytes(2),
                self.random,
                vector(self.session_id, 1),
                vector(suites, 2),
                vector(self.compression, 1),
                block,
            )
        )

    def message(self) -> bytes:
        return b"\1" + vector(self.body(), 3)

    def data(self) -> bytes:
        """Its bytes on the wire, in one record."""
        return records(self.message(), ())


def dissected(data: bytes) -> Hello:
    """A ClientHello that is in one record."""
    wire = _Bytes(data)
    assert wire.take(2) == b"\x16\3"
    wire.take(1)
    message = _Bytes(wire.vector(2))
    wire.end()
    assert message.take(1) == b"\1"
    body = _Bytes(message.vector(3))
    message.end()
    version, random = body.number(2), body.take(32)
    session_id, suites, compression = body.vector(1), body.vector(2), body.vector(1)
    block = _Bytes(body.vector(2))
    body.end()
    extensions = []
    while block.data:
        kind = block.number(2)
        extensions.append((kind, block.vector(2)))
    return Hello(
        version,
        random,
        session_id,
        tuple(numbers(suites)),
        compression,
        tuple(extensions),
    )


def server_name(name: bytes, kind: int = 0) -> tuple[int, bytes]:
    """The extension that asks for this server name."""
    return SERVER_NAME, vector(bytes((kind,)) + vector(name, 2), 2)


def record(fragment: bytes, kind: int = 22, version: int = 0x0301) -> bytes:
    return bytes((kind,)) + version.to_bytes(2) + vector(fragment, 2)


def records(message: bytes, sizes: Iterable[int]) -> bytes:
    """A message in records of these sizes, and what is left in one more."""
    found = []
    for size in sizes:
        if not message:
            break
        found.append(record(message[:size]))
        message = message[size:]
    return b"".join(found) + (record(message) if message else b"")


def in_records_of(data: bytes, size: int) -> bytes:
    """A hello that is in one record, in records of this size."""
    message = data[5:]
    return records(message, [size] * (len(message) // size))


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """All that has arrived after each piece, cut at these places."""
    return [data[:cut] for cut in sorted({*cuts, len(data)}) if cut <= len(data)]

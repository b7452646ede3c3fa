"""The ClientHello of TLS: which server a client asks for.  No I/O, no cryptography.

A client that begins TLS says in the clear for which server name it comes (SNI).  That
is read here, and nothing else is done: the bytes stay as they are, and go to the server
that is chosen by them.  On the wire there are records, whose fragments make a message::

    record      16 03 xx length:2 fragment                 length: 1 to 16384
    message     01 length:3 body
    body        version:2 random:32 session_id<0..32> cipher_suites<2..2^16-2>
                compression_methods<1..2^8-1> [extensions<0..2^16-1>]
    extension   type:2 data<0..2^16-1>

A vector `<..>` has its length before it, in one byte or two.  Versions are not looked
at, nor what is unknown (GREASE): whether the two can agree is the server's business.
What a server could read in another way than this module is refused: a second
server_name, bytes behind the last extension, or behind the message in its record.

Sources: RFC 8446 (TLS 1.3) 4.1.2, 4.2 and 5.1; RFC 5246 (TLS 1.2) 7.4.1.2, where the
extensions may be left out; RFC 6066 3 (server_name); RFC 7301 3.1 (ALPN); RFC 8701
(GREASE); RFC 9849 5 (ECH, whose outer ClientHello is the one that is read).

:class:`HelloReader` is given all that has arrived so far.  It reads at most
:data:`LONGEST` bytes, each of them once, however they come.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from relayd.core.prelude import BadRequest, Prelude
from relayd.preludes.spoken import protocol_of

#: The most bytes on the wire up to the end of a ClientHello, headers of records
#: included.  Those with post-quantum keys have 1,800.
LONGEST = 16 * 1024

#: What a client is told whose name nobody has: a fatal alert (RFC 8446 6.2).
UNRECOGNIZED_NAME = b"\x15\x03\x03\0\x02\x02\x70"

_HANDSHAKE, _CLIENT_HELLO, _HOST_NAME = 22, 1, 0
_SERVER_NAME, _ALPN, _ECH = 0, 16, 0xFE0D
_KNOWN = frozenset((_SERVER_NAME, _ALPN, _ECH))

_RECORD = struct.Struct(">BBxH")
_RECORD_HEADER = _RECORD.size
_MESSAGE_HEADER = 4
#: Where the session id begins: behind the version and the random bytes.
_SESSION_ID = _MESSAGE_HEADER + 2 + 32
_EXTENSION = struct.Struct(">HH")
_NAME_LIST = struct.Struct(">HBH")

# Labels have up to 63 bytes; a longer one is no name of any server, and does no harm.
_NAME = re.compile(rb"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?")
_LONGEST_NAME = 255


class ClientHello(NamedTuple):
    """What a client asks for.

    :ivar server_name: in lower case, without a dot at its end; None: for no name.
    :ivar alpn: the protocols that it speaks, as it prefers them: `b"h2"`.
    :ivar ech: it has an encrypted ClientHello, or pretends so; `server_name` is then
        that of the outer one.
    """

    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    ech: bool = False


class HelloReader:
    """Reads the ClientHello of one client."""

    def __init__(self) -> None:
        #: Where the next record begins.
        self._at = 0
        #: The fragments before it.
        self._fragments = bytearray()

    def __call__(self, data: bytes) -> tuple[ClientHello, int] | None:
        """Read on.

        :param data: all that the client has sent.
        :return: what it asks for, and 0: all of `data` is for the server; None: more
            is needed.
        :raises BadRequest: it is no ClientHello, and can't become one.
        """
        at, arrived = self._at, len(data)
        while arrived >= at + _RECORD_HEADER:
            kind, major, length = _RECORD.unpack_from(data, at)
            start = at + _RECORD_HEADER
            end = start + length
            if kind != _HANDSHAKE or major != 3 or not length or end > LONGEST:
                _refuse_record(data, at)
            if not self._fragments and arrived > start and data[start] != _CLIENT_HELLO:
                raise BadRequest(f"a TLS handshake of type {data[start]} first")
            if arrived < end:
                self._at = at
                return None
            message: bytes | bytearray = data[start:end]
            if self._fragments:
                self._fragments += message
                message = self._fragments
            have = len(message)
            # A header of four bytes is there before these can be too many.
            if have >= _MESSAGE_HEADER:
                length = message[1] << 16 | message[2] << 8 | message[3]
                rest = _MESSAGE_HEADER + length - have
                if not rest:
                    return _read_message(message), 0
                if rest < 0:
                    raise BadRequest(f"{-rest} bytes behind the ClientHello")
                if end + _RECORD_HEADER + rest > LONGEST:
                    raise BadRequest(f"a ClientHello of {length} bytes")
            if not self._fragments:
                self._fragments = bytearray(message)
            at = end
        self._at = at
        if arrived > at and data[at : at + 2] not in (b"\x16", b"\x16\x03"):
            _refuse_record(data, at)
        return None


#: What a relay reads that chooses servers by their names.
HELLO = Prelude("ClientHello", start=HelloReader)


def _refuse_record(data: bytes, at: int) -> NoReturn:
    """Say why no record of a ClientHello begins here: it is wrong already."""
    if data[at] != _HANDSHAKE:
        if at:
            raise BadRequest(f"a TLS record of type {data[at]} in a ClientHello")
        if name := protocol_of(data):
            raise BadRequest(f"{name}, not TLS")
        # Two bytes of length, the highest bit set, and the type.
        if data[0] & 0x80 and data[2:3] == b"\1":
            raise BadRequest("an SSLv2 ClientHello")
        if 20 <= data[0] <= 24:
            raise BadRequest(f"a TLS record of type {data[0]}, not a handshake")
        raise BadRequest(f"not TLS: the first byte is 0x{data[0]:02x}")
    if data[at + 1] != 3:
        raise BadRequest(f"a TLS record of version {data[at + 1]}, not 3")
    if not (data[at + 3] or data[at + 4]):
        raise BadRequest("an empty TLS record")
    raise BadRequest(f"a ClientHello of more than {LONGEST} bytes")


def _read_message(message: bytes | bytearray) -> ClientHello:
    """Read a whole ClientHello.

    :raises BadRequest: it is none.
    """
    try:
        return _read_body(message, len(message))
    except (IndexError, struct.error):
        raise BadRequest("a ClientHello that is cut off") from None


def _read_body(message: bytes | bytearray, end: int) -> ClientHello:
    """The same; IndexError and struct.error: a length is wrong."""
    length = message[_SESSION_ID]
    if length > 32:
        raise BadRequest(f"a session id of {length} bytes in a ClientHello")
    at = _SESSION_ID + 1 + length
    length = message[at] << 8 | message[at + 1]
    if not length or length & 1:
        raise BadRequest(f"cipher suites of {length} bytes in a ClientHello")
    at += 2 + length
    length = message[at]
    if not length:
        raise BadRequest("no compression method in a ClientHello")
    at += 1 + length
    if at == end:
        return ClientHello()
    length = message[at] << 8 | message[at + 1]
    at += 2
    if at + length != end:
        raise BadRequest(
            f"extensions of {length} bytes, of {end - at}, in a ClientHello"
        )
    unpack = _EXTENSION.unpack_from
    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    ech = False
    while at < end:
        kind, length = unpack(message, at)
        at += length + 4
        if kind not in _KNOWN:
            continue
        begin = at - length
        if kind == _SERVER_NAME:
            if server_name is not None:
                raise BadRequest("two extensions server_name in a ClientHello")
            server_name = _read_name(message, begin, at)
        elif kind == _ALPN:
            if alpn:
                raise BadRequest("two extensions ALPN in a ClientHello")
            alpn = _read_alpn(message, begin, at)
        else:
            if ech:
                raise BadRequest("two extensions encrypted_client_hello")
            ech = True
    if at != end:
        raise BadRequest(f"the last extension has {at - end} bytes too many")
    return ClientHello(server_name, alpn, ech)


def _read_name(message: bytes | bytearray, at: int, end: int) -> str:
    """The host name of an extension server_name, which has one."""
    size, header = end - at, _NAME_LIST.size
    found = _NAME_LIST.unpack_from(message, at) if size >= header else None
    if found != (size - 2, _HOST_NAME, size - header):
        raise BadRequest("an extension server_name without one host name")
    return read_server_name(bytes(message[at + header : end]))


def read_server_name(name: bytes) -> str:
    """A server name as it is compared: in lower case, without a dot at its end.

    :raises BadRequest: it can't be one.
    """
    if len(name) > _LONGEST_NAME:
        raise BadRequest(f"a server name of {len(name)} bytes")
    if not _NAME.fullmatch(name):
        raise BadRequest(f"a server name that is none: {ascii(name)[1:]:.80}")
    return name.decode("ascii").lower().removesuffix(".")


def _read_alpn(message: bytes | bytearray, at: int, end: int) -> tuple[bytes, ...]:
    """The protocols of an extension ALPN, which has one at least."""
    listed = message[at] << 8 | message[at + 1]
    at += 2
    if listed != end - at or not listed:
        raise BadRequest("an extension ALPN of a wrong length")
    found = []
    while at < end:
        length = message[at]
        at += 1
        if not 0 < length <= end - at:
            raise BadRequest("an extension ALPN with a protocol of a wrong length")
        found.append(bytes(message[at : at + length]))
        at += length
    return tuple(found)


# -- writing

#: What a client of TLS 1.3 and 1.2 says beside: curves, signatures, versions, and no
#: key yet, which a server of 1.3 then asks for.
_USUAL: tuple[tuple[int, bytes], ...] = (
    (10, b"\0\4\0\x1d\0\x17"),
    (13, b"\0\x08\4\3\x08\4\4\1\x08\5"),
    (43, b"\4\3\4\3\3"),
    (51, b"\0\0"),
)
_USUAL_SUITES = b"\x13\1\x13\2\xc0\x2b\xc0\x2f"


def hello_of(
    server_name: str | None,
    *,
    alpn: Sequence[bytes] = (),
    ech: bool = False,
    extensions: Iterable[tuple[int, bytes]] = _USUAL,
    random: bytes = bytes(32),
    record: int = LONGEST,
) -> bytes:
    """Make a ClientHello, for tests and to ask what becomes of a client.

    :param server_name: what it asks for, as text that is sent as it is; None: nothing.
    :param alpn: the protocols that it speaks.
    :param ech: whether it has an encrypted ClientHello, which is nonsense.
    :param extensions: others, by type.
    :param random: 32 bytes.
    :param record: the most bytes of it in one record.
    :return: its bytes on the wire, in records.
    """
    written = []
    if server_name is not None:
        name = server_name.encode("ascii")
        named = _NAME_LIST.pack(len(name) + 3, _HOST_NAME, len(name))
        written.append((_SERVER_NAME, named + name))
    if alpn:
        listed = b"".join(bytes((len(each),)) + each for each in alpn)
        written.append((_ALPN, len(listed).to_bytes(2) + listed))
    written += extensions
    if ech:
        # An outer one: HKDF-SHA256, AES-128-GCM, a configuration, key and payload.
        sealed = b"\0\0\1\0\1\x2a\0\x20" + bytes(32) + b"\0\x90" + bytes(144)
        written.append((_ECH, sealed))
    block = b"".join(_EXTENSION.pack(kind, len(of)) + of for kind, of in written)
    body = b"".join(
        (
            b"\3\3",
            random,
            b"\0",
            len(_USUAL_SUITES).to_bytes(2) + _USUAL_SUITES,
            b"\1\0",
            len(block).to_bytes(2) + block if block else b"",
        )
    )
    message = bytes((_CLIENT_HELLO,)) + len(body).to_bytes(3) + body
    return in_records(message, record)


def in_records(message: bytes, most: int = LONGEST) -> bytes:
    """A handshake message in records, of at most so many bytes each."""
    return b"".join(
        b"\x16\3\1" + len(fragment).to_bytes(2) + fragment
        for at in range(0, len(message), most)
        if (fragment := message[at : at + most])
    )

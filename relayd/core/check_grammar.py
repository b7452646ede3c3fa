r"""How a server is checked: the values, and how they are written.

    tcp                                     it accepts a connection, and does TLS
    tcp port=8008                           at another port
    tcp send="PING\r\n" expect="+PONG"      and answers this
    http://:8008/primary                    it answers with a status of 200 to 399
    http:///health expect="up"              at its own port, and with this in the body
    udp send="\x00" expect="ok"             it answers a datagram
    python:module:function                  a function of the operator's own says so

What is sent and expected is text (UTF-8), in double quotes where it has a space, with
the escapes \r, \n, \t, \0, \\, \" and \xHH.  An expected text may stand anywhere in
what the server says.

The host of a URL is only what the request names (`Host:`): it is always the server
itself that is asked.  How they are done: :mod:`relayd.upstreams.check_kinds`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import attrs

from relayd.core.escapes import read_escapes

#: The most bytes that a check sends or expects: one datagram holds them.
MAX_TEXT = 1024

#: The longest URL.
MAX_URL = 2048

EXPECTED_CHECK = (
    "tcp, http://:PORT/PATH or python:MODULE:FUNCTION; tcp may have port=, send= and"
    " expect=, http expect=, udp send= and expect="
)

_WORD = re.compile(r'\s*(?:([a-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s"]+))(?=\s|$))')
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@attrs.frozen(kw_only=True)
class Check:
    """One way of checking.

    :ivar text: as it was written.
    """

    text: str = attrs.field(eq=False)

    def __str__(self) -> str:
        return self.text


@attrs.frozen(kw_only=True)
class TcpCheck(Check):
    """The server accepts a connection, and may have to answer.

    :ivar port: None: the server's own.
    :ivar send: empty: nothing.
    :ivar expect: what it is to say; empty: it need not.
    """

    port: int | None = None
    send: bytes = b""
    expect: bytes = b""


@attrs.frozen(kw_only=True)
class UdpCheck(Check):
    """The server answers a datagram.

    :ivar expect: what is in the answer; empty: any will do.
    """

    port: int | None = None
    send: bytes
    expect: bytes = b""


@attrs.frozen(kw_only=True)
class HttpCheck(Check):
    """The server answers a GET with a status of 200 to 399.

    :ivar host: what the request names; empty: the server's own host.
    :ivar port: None: the server's own.
    :ivar path: with its query.
    :ivar expect: what is in the body; empty: anything.
    """

    host: str = ""
    port: int | None = None
    path: str = "/"
    expect: bytes = b""


@attrs.frozen(kw_only=True)
class PythonCheck(Check):
    """`async def function(server)` returns True, False or a weight.

    :ivar module: which has it, dotted.
    """

    module: str
    function: str


def parse_check(text: str) -> Check:
    """The check that is written so.

    :raises ValueError: there is none; the message says what is expected.
    """
    head, _, rest = text.strip().partition(" ")
    scheme = head.partition(":")[0]
    if head == "tcp":
        return _tcp(text, _words(rest, "port", "send", "expect"))
    if head == "udp":
        return _udp(text, _words(rest, "port", "send", "expect"))
    if scheme == "http":
        return _http(text, head, _words(rest, "expect"))
    if scheme == "https":
        raise ValueError(
            "https is not checked: a server that is dialled by TLS is checked within it"
            " by http:///PATH; for another port, write a python: check"
        )
    if scheme == "python" and not rest:
        return _python(text, head)
    raise ValueError(f"expected {EXPECTED_CHECK}")


def _tcp(text: str, words: Mapping[str, str]) -> TcpCheck:
    made = TcpCheck(
        text=text,
        port=_port(words.get("port")),
        send=_bytes(words, "send"),
        expect=_bytes(words, "expect"),
    )
    if made.send and not made.expect:
        raise ValueError("send= says nothing without an expect=")
    return made


def _udp(text: str, words: Mapping[str, str]) -> UdpCheck:
    if "send" not in words:
        raise ValueError("a udp check needs a send=: only an answer shows it is there")
    return UdpCheck(
        text=text,
        port=_port(words.get("port")),
        send=_bytes(words, "send"),
        expect=_bytes(words, "expect"),
    )


def _http(text: str, url: str, words: Mapping[str, str]) -> HttpCheck:
    such = "a URL such as http://:8008/primary"
    printable = url.isascii() and url.isprintable() and len(url) <= MAX_URL
    if not printable or not url.startswith("http://"):
        raise ValueError(f"expected {such}, in ASCII, up to {MAX_URL} characters")
    try:
        found = urlsplit(url)
        host, port = found.hostname or "", found.port
    except ValueError as problem:
        raise ValueError(f"{problem}; expected {such}") from None
    if found.username is not None or found.fragment or port == 0:
        raise ValueError(f"expected {such}, without a user and without a fragment")
    path = found.path or "/"
    return HttpCheck(
        text=text,
        host=f"[{host}]" if ":" in host else host,
        port=port,
        path=f"{path}?{found.query}" if found.query else path,
        expect=_bytes(words, "expect"),
    )


def _python(text: str, head: str) -> PythonCheck:
    module, colon, function = head.removeprefix("python:").partition(":")
    if not (colon and _NAME.fullmatch(module) and _NAME.fullmatch(function)):
        raise ValueError("expected python:MODULE:FUNCTION, such as python:checks:is_up")
    return PythonCheck(text=text, module=module, function=function)


def _words(text: str, *known: str) -> dict[str, str]:
    """The values of `key=value`, with their escapes.

    :raises ValueError: it is something else, a key is not known, or comes twice.
    """
    found: dict[str, str] = {}
    text = text.strip()
    at = 0
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None or match[1] not in known:
            such = ", ".join(f'{key}="…"' for key in known if key != "port")
            such = f"port=, {such}" if "port" in known else such
            raise ValueError(f"{_short(text[at:].strip())} is none of {such}")
        if match[1] in found:
            raise ValueError(f"{match[1]}= is given twice")
        found[match[1]] = match[3] if match[2] is None else match[2]
        at = match.end()
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _port(text: str | None) -> int | None:
    if text is None:
        return None
    plain = text.isascii() and text.isdigit() and len(text) <= 5
    if not plain or not 1 <= int(text) <= 65535:
        raise ValueError(f"port={text} is no port: expected 1 to 65535")
    return int(text)


def _bytes(words: Mapping[str, str], key: str) -> bytes:
    """A text with escapes, as bytes."""
    text = words.get(key)
    if text is None:
        return b""
    made = read_escapes(text, also='"')
    if not 1 <= len(made) <= MAX_TEXT:
        raise ValueError(f"{key}= is 1 to {MAX_TEXT} bytes, not {len(made)}")
    return made

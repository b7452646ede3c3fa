"""How protocols begin, to say what a client spoke instead of what was expected."""

from __future__ import annotations

_BEGINNINGS = (
    (b"\x04\x01", "a SOCKS4 request"),
    (b"\x05", "a SOCKS5 greeting"),
    (b"\x16\x03", "a TLS handshake"),
    (b"GET ", "an HTTP request"),
    (b"POST ", "an HTTP request"),
    (b"HEAD ", "an HTTP request"),
    (b"PUT ", "an HTTP request"),
    (b"OPTIONS ", "an HTTP request"),
    (b"CONNECT ", "an HTTP request"),
    (b"PRI * HTTP/2", "an HTTP request"),
    (b"SSH-", "an SSH greeting"),
    (b"PROXY ", "a PROXY header"),
    (b"\r\n\r\n\0\r\nQUIT\n", "a PROXY header"),
)


def protocol_of(data: bytes) -> str:
    """What a client speaks, by its first bytes, with an article; empty if unknown."""
    return next((name for start, name in _BEGINNINGS if data.startswith(start)), "")

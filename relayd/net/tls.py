"""TLS handshakes: when they are done, and the name of a server's certificate.

Twisted connects a protocol as soon as TCP is connected, and then does the handshake.  A
relay waits for the handshake: before it is done, nothing is dialled for a client, and
nothing is sent to a server.  A protocol that provides `IHandshakeListener` is notified
(:func:`notifies_handshake`).

When the handshake is done, and before a byte goes to the server, its certificate is
checked once more for the expected name, with the functions of service_identity.
Twisted checks it in a callback of OpenSSL, which loses exceptions: Twisted 26 accepts a
server whose certificate has no name, and logs a traceback.

OpenSSL and service_identity are optional; they are imported only for a TLS connection.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.interfaces import IHandshakeListener, INegotiated
from twisted.python.failure import Failure

from relayd.core.errors import HandshakeFailed
from relayd.core.hooks import implementers
from relayd.core.names import is_address

#: How many of a certificate's names are shown, and how many characters of each.
NAMES_SHOWN, NAME_LENGTH = 3, 64

#: Errors of a certificate chain: x509_vfy.h, and verify(1) of OpenSSL.
_CHAIN_PROBLEMS = {
    2: "its issuer is unknown",
    7: "its signature is wrong",
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is signed by itself, and not trusted",
    19: "its root is not trusted",
    20: "its issuer is unknown",
    21: "its issuer is unknown",
    23: "it has been revoked",
    24: "it is signed by one that may not sign",
    26: "it is not for a server",
    66: "its key is too weak",
    67: "a key in its chain is too weak",
    68: "a signature in its chain is too weak",
}

#: Whether a class of transports is TLS.
_is_tls = implementers(INegotiated)


def notifies_handshake(transport: Any) -> bool:
    """Whether an `IHandshakeListener` will be notified when the handshake is done.

    It is notified if its transport is the TLS layer itself, or Twisted's own wrapper,
    which passes that on.  With another wrapper in between (PROXY, throttling) it is
    not.
    """
    return _is_tls[type(transport)] and IHandshakeListener.providedBy(
        getattr(transport, "wrappedProtocol", None)
    )


def stage(transport: Any) -> Any:
    """The state of a handshake, to be compared with a later one.

    It changes with each whole message, not with each byte.

    :param transport: of which :func:`notifies_handshake` is true.
    """
    return transport.getHandle().get_state_string()


def has_begun(transport: Any) -> bool:
    """Whether the first message of a client's handshake has arrived, on a server.

    :param transport: of which :func:`notifies_handshake` is true.
    """
    return transport.getHandle().client_random() is not None


def is_openssl_error(problem: BaseException) -> bool:
    """Whether OpenSSL raised it, by its module's name: OpenSSL is optional."""
    return type(problem).__module__.partition(".")[0] == "OpenSSL"


def error_line(problem: BaseException) -> str:
    """An error's message in one line; OpenSSL's has a queue of reasons."""
    said = str(problem)
    if is_openssl_error(problem):
        try:
            # Each is (library, function, reason).
            said = "; ".join(str(each[-1]) for each in problem.args[0])
        except (IndexError, TypeError):
            said = ""
    return " ".join(said.split()) or repr(problem)


def why_failed(reason: Failure, who: str) -> str:
    """Why a handshake failed, in one line.

    :param who: the peer, as the line is to call it.
    """
    problem: Any = reason.value
    if type(problem).__module__.startswith("twisted.internet."):
        return f"{who} closed its connection"
    return error_line(problem)


@attrs.frozen
class ServerIdentity:
    """The name that a server's certificate must have.

    :ivar name: a host name or an IP address, as text.
    :ivar alone: no other connection uses its TLS options, and they are Twisted's own,
        as those of an endpoint string are.  Then Twisted's check of the name, which may
        log a traceback, is replaced.
    """

    name: str
    alone: bool = False


class ServerHandshake:
    """The handshake with a server.

    :param transport: of which :func:`notifies_handshake` is true.
    :param identity: None: the name that the connection asks for (SNI), if it checks
        certificates.
    """

    def __init__(self, transport: Any, identity: ServerIdentity | None) -> None:
        self._transport = transport
        self._identity = identity
        self._problem = ""
        if identity is not None and identity.alone:
            connection = transport.getHandle()
            # Replaces Twisted's callback, which checks the name from release 26 on.
            # Before, Twisted checks the name once the handshake is done, which it is
            # not if this callback finds it wrong.
            connection.set_verify(connection.get_verify_mode(), self._checked)

    def _checked(
        self, connection: Any, certificate: Any, problem: int, depth: int, ok: int
    ) -> bool:
        """Called by OpenSSL for each certificate of the chain, the server's own last.

        :return: whether the handshake goes on.
        """
        if not ok:
            said = _CHAIN_PROBLEMS.get(problem, f"error {problem} of OpenSSL's verify")
            self._problem = f"the server's certificate is not good: {said}"
        elif depth == 0 and self._identity is not None:
            try:
                _verify(_Unverified(certificate), self._identity.name)
            except HandshakeFailed as why:
                self._problem = str(why)
        return not self._problem

    def why_failed(self, reason: Failure) -> str:
        """Why it failed, in one line."""
        if self._problem:
            return self._problem
        return f"TLS handshake: {why_failed(reason, 'the server')}"

    def verify(self) -> None:
        """Check the name of the certificate.

        :raises HandshakeFailed: it is not the expected one, or can't be checked.
        """
        connection = self._transport.getHandle()
        identity = self._identity
        name = identity.name if identity is not None else _requested_name(connection)
        if name:
            _verify(connection, name)


@attrs.frozen
class _Unverified:
    """A connection for service_identity, with a certificate not yet accepted."""

    certificate: Any

    def get_peer_certificate(self) -> Any:
        return self.certificate


def _verify(connection: Any, name: str) -> None:
    try:
        from service_identity.pyopenssl import verify_hostname, verify_ip_address

        if connection.get_peer_certificate() is None:
            raise HandshakeFailed("the server has shown no certificate")
        if _is_address(name):
            verify_ip_address(connection, name.partition("%")[0])
        else:
            verify_hostname(connection, ascii_name(name))
    except HandshakeFailed:
        raise
    except Exception as problem:
        # Any exception means that the server is not verified.
        raise HandshakeFailed(_mismatch(name, connection, problem)) from problem


def ascii_name(host: str) -> str:
    """A host name in ASCII (IDNA), as Twisted encodes it.

    :raises UnicodeError: it can't be encoded.
    """
    if host.isascii():
        return host
    try:
        import idna
    except ImportError:
        return host.encode("idna").decode()
    return str(idna.encode(host).decode())


def _is_address(name: str) -> bool:
    return is_address(name.partition("%")[0])


def asked_name(transport: Any) -> str | None:
    """The name that a client has asked for (SNI), as its listener ends its TLS.

    :param transport: of TLS, or a wrapper of it.
    :return: empty: for none; None: its ClientHello has not come yet.
    """
    connection = transport.getHandle()
    asked = getattr(connection, "get_servername", lambda: None)()
    if asked:
        return str(asked.decode("ascii", "backslashreplace").lower())
    has_come = getattr(connection, "get_cipher_name", lambda: "")() is not None
    return "" if has_come else None


def _requested_name(connection: Any) -> str:
    """The name that a connection asks for (SNI), if it checks certificates."""
    from OpenSSL.SSL import VERIFY_PEER

    asked = connection.get_servername()
    if not asked or not connection.get_verify_mode() & VERIFY_PEER:
        return ""
    return str(asked.decode("ascii", "backslashreplace"))


def _mismatch(name: str, connection: Any, problem: Exception) -> str:
    """The error line for a certificate that is not for `name`."""
    if not type(problem).__module__.startswith("service_identity"):
        why = " ".join(str(problem).split()) or type(problem).__name__
        return f"the server's certificate can't be checked: {ascii(why)[1:-1]}"
    names = _names(connection)
    if not names:
        return (
            f"the server's certificate names nobody, not {name!r}: it has no"
            " subjectAltName with a host name or an address"
        )
    shown = ", ".join(ascii(each[:NAME_LENGTH]) for each in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"the server's certificate is for {shown}{more}, not for {name!r}"


def _names(connection: Any) -> list[str]:
    """The host names and addresses of a server's certificate."""
    from cryptography import x509

    try:
        certificate = connection.get_peer_certificate().to_cryptography()
        found = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except Exception:
        # The extension is missing or can't be parsed.
        return []
    return [
        str(each.value)
        for each in found.value
        if isinstance(each, x509.DNSName | x509.IPAddress)
    ]

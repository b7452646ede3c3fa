"""TLS by Twisted, and what a relay adds: when a handshake is done, and with whom.

Twisted connects a protocol as soon as TCP is connected, and does the handshake below
it.  For a relay a connection counts when its handshake is done: before that nothing is
dialled for a client, and nothing is sent to a server.  A protocol that provides
`IHandshakeListener` is notified (:func:`tells`).

A server's certificate is checked here once more for the expected name, with the
functions of service_identity, when the handshake is done and before a byte goes to the
server.  Twisted checks it within a callback of OpenSSL's, and an exception is lost
there: Twisted 26 accepts a server whose certificate has no name, and logs a traceback.

OpenSSL and service_identity are optional; they are imported where a connection has
brought them.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.interfaces import IHandshakeListener, INegotiated
from twisted.python.failure import Failure

from relayd.core.errors import HandshakeFailed
from relayd.core.hooks import implementers
from relayd.core.names import is_address

#: At most so many of a certificate's names, and of the characters of each, are shown.
NAMES_SHOWN, NAME_LENGTH = 3, 64

#: What is wrong with a chain of certificates; x509_vfy.h, and verify(1) of OpenSSL.
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


def tells(transport: Any) -> bool:
    """Whether an `IHandshakeListener` will be notified when the handshake is done.

    It is if its transport is the TLS layer itself, which notifies the protocol that it
    wraps, or Twisted's own wrapper, which passes it on.  With another wrapper in
    between (PROXY, throttling) there is no notification.
    """
    return _is_tls[type(transport)] and IHandshakeListener.providedBy(
        getattr(transport, "wrappedProtocol", None)
    )


def stage(transport: Any) -> Any:
    """How far a handshake has come, to be compared.

    It changes with each whole message, so few times; not with each byte.

    :param transport: of which :func:`tells` is true.
    """
    return transport.getHandle().get_state_string()


def is_openssls(problem: BaseException) -> bool:
    """Whether OpenSSL raised it.  Asked by name: it is an optional dependency."""
    return type(problem).__module__.partition(".")[0] == "OpenSSL"


def in_words(problem: BaseException) -> str:
    """What an error says, in one line; OpenSSL's has a queue of reasons."""
    said = str(problem)
    if is_openssls(problem):
        try:
            # Each is (library, function, reason).
            said = "; ".join(str(each[-1]) for each in problem.args[0])
        except (IndexError, TypeError):
            said = ""
    return " ".join(said.split()) or repr(problem)


def why_failed(reason: Failure, who: str) -> str:
    """What was wrong with a handshake, in one line.

    :param who: the peer, in the words of the line.
    """
    problem: Any = reason.value
    if type(problem).__module__.startswith("twisted.internet."):
        return f"{who} closed its connection"
    return in_words(problem)


@attrs.frozen
class ServerIdentity:
    """Whose certificate a server must show.

    :ivar name: a host name or an IP address, as text.
    :ivar alone: the TLS options of the connection are nobody else's, and Twisted's own,
        as those of an endpoint string are.  Its check of the name, which may log a
        traceback, is taken out then.
    """

    name: str
    alone: bool = False


class ServerHandshake:
    """The handshake with a server, from its beginning.

    :param transport: of which :func:`tells` is true.
    :param identity: None is the name that the connection asks for (SNI), if it checks
        certificates at all.
    """

    def __init__(self, transport: Any, identity: ServerIdentity | None) -> None:
        self._transport = transport
        self._identity = identity
        self._problem = ""
        if identity is not None and identity.alone:
            connection = transport.getHandle()
            # In the place of Twisted's, from its release 26 on.  Before, Twisted checks
            # the name once the handshake is done, which it is not if it is wrong.
            connection.set_verify(connection.get_verify_mode(), self._checked)

    def _checked(
        self, connection: Any, certificate: Any, problem: int, depth: int, ok: int
    ) -> bool:
        """OpenSSL has looked at a certificate of the chain, the server's own at last.

        :return: whether the handshake goes on.
        """
        if not ok:
            said = _CHAIN_PROBLEMS.get(problem, f"error {problem} of OpenSSL's verify")
            self._problem = f"the server's certificate is not good: {said}"
        elif depth == 0 and self._identity is not None:
            try:
                _verify(_Shown(certificate), self._identity.name)
            except HandshakeFailed as why:
                self._problem = str(why)
        return not self._problem

    def why_failed(self, reason: Failure) -> str:
        """What was wrong with it, in one line."""
        if self._problem:
            return self._problem
        return f"TLS handshake: {why_failed(reason, 'the server')}"

    def verify(self) -> None:
        """Check the name of the certificate.

        :raises HandshakeFailed: it is another's, or nobody's, or can't be checked.
        """
        connection = self._transport.getHandle()
        identity = self._identity
        name = identity.name if identity is not None else _asked_for(connection)
        if name:
            _verify(connection, name)


@attrs.frozen
class _Shown:
    """What service_identity asks of a connection, before that has a certificate."""

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
        # Whatever was raised: the server has not been verified.
        raise HandshakeFailed(_not_for(name, connection, problem)) from problem


def ascii_name(host: str) -> str:
    """A host name as certificates have it, as Twisted makes it.

    :raises UnicodeError: it can't be one.
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


def _asked_for(connection: Any) -> str:
    """The name that a connection asks for, if it checks certificates."""
    from OpenSSL.SSL import VERIFY_PEER

    asked = connection.get_servername()
    if not asked or not connection.get_verify_mode() & VERIFY_PEER:
        return ""
    return str(asked.decode("ascii", "backslashreplace"))


def _not_for(name: str, connection: Any, problem: Exception) -> str:
    """What a certificate that is not for `name` is for instead."""
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
        # There is none, or none that can be read.
        return []
    return [
        str(each.value)
        for each in found.value
        if isinstance(each, x509.DNSName | x509.IPAddress)
    ]

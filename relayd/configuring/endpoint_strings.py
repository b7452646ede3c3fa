"""Twisted's endpoint strings: what a relay must know of them, and their errors.

A string such as `tls:example.com:443:trustRoots=/etc/ca` is parsed by Twisted, which
has the grammar and the types of plugins.  But a relay needs to know two things: the
name that a server's certificate must have, and whether a listener hides its clients'
addresses.  And Twisted's parsers raise exceptions of any kind, which become one clear
line here.

The grammar ("Endpoints", in Twisted's manual): `:` separates arguments, the first `=`
in one makes it a named argument, and a backslash escapes the next character.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

#: Twisted's types with TLS, and its listeners that have no other one in them.
_TLS = ("ssl", "tls")
_WRAPS_NONE = ("tcp", "tcp6", "unix", "systemd", "stdio", "fd")

_PASSED = re.compile(r"(?i:systemd):([^:=\\]+)")
_LACKS = re.compile(r"missing \d+ required positional arguments?: (.*)")
_UNKNOWN = re.compile(r"unexpected keyword argument ('[^']*')")
_NO_NUMBER = re.compile(r"invalid literal for int\(\) with base \d+: b?('.*')")


def parts(text: str) -> tuple[list[str], dict[str, str]]:
    """The arguments of an endpoint string, of which the first is its type.

    :return: the positional ones, and the named ones.
    :raises ValueError: the string ends within an escape.
    """
    plain: list[str] = []
    named: dict[str, str] = {}
    for name, equals, value in _split(text):
        if equals:
            named[name] = value
        else:
            plain.append(name)
    return plain, named


def _split(text: str) -> list[tuple[str, bool, str]]:
    """Each argument: the text before `=`, whether it has one, the text after it."""
    found: list[tuple[str, bool, str]] = []
    name, equals, current = "", False, ""

    def end() -> None:
        found.append((name, True, current) if equals else (current, False, ""))

    characters = iter(text)
    for character in characters:
        if character == "\\":
            escaped = next(characters, None)
            if escaped is None:
                raise ValueError("it ends with a backslash")
            current += escaped
        elif character == ":":
            end()
            name, equals, current = "", False, ""
        elif character == "=" and not equals:
            name, equals, current = current, True, ""
        else:
            current += character
    end()
    return found


def server_name(text: str) -> str:
    """The name that the server's certificate must have, for a client's string.

    :param text: a string that Twisted has parsed.
    :return: a host name or an address; empty if no name is checked: another type, or
        `ssl:` without `hostname=`.
    """
    plain, named = parts(text)
    kind = plain[0].lower()
    if kind == "tls":
        # The certificate is for the host, even if `endpoint=` dials another.
        return plain[1] if len(plain) > 1 else named.get("host", "")
    return named.get("hostname", "") if kind == "ssl" else ""


def host_in(text: str, *, listens: bool) -> str:
    """The host that a string of Twisted's own TCP types dials, or listens on.

    :param text: a string that Twisted has parsed.
    :return: as it is written; empty if it has none, or is of another type.
    """
    plain, named = parts(text)
    kind = plain[0].lower()
    if kind not in ("tcp", "ssl", "tls"):
        return ""
    if listens:
        second = plain[2] if kind == "tcp" and len(plain) > 2 else ""
        return named.get("interface", second)
    if kind == "tls" and "endpoint" in named:
        return host_in(named["endpoint"], listens=False)
    return plain[1] if len(plain) > 1 else named.get("host", "")


def passed_name(text: str) -> str:
    """The name in relayd's own form `systemd:NAME`; empty for any other string.

    Twisted's forms have a `=` or one more colon: `systemd:domain=INET:name=web`.
    """
    found = _PASSED.fullmatch(text)
    return found[1] if found else ""


def has_proxy_header(text: str) -> bool:
    """Whether a listener's string has `haproxy:` anywhere in it.

    Twisted connects the protocol of such a client before it has read the header.
    """
    try:
        plain, named = parts(text)
    except ValueError:
        return False
    # Either an argument of its own, as `haproxy:` does not quote what it wraps; or
    # within one, as other types quote what they wrap.
    return "haproxy" in (each.lower() for each in plain) or any(
        ":" in each and has_proxy_header(each) for each in (*plain, *named.values())
    )


def has_tls(text: str) -> bool:
    """Whether a string is of one of Twisted's types with TLS."""
    return text.partition(":")[0].lower() in _TLS


def ends_tls(text: str) -> bool:
    """Whether a listener's string ends TLS: itself, or with what it wraps.

    Of the types of plugins, those are known that wrap one of Twisted's, quoted or not;
    and `txsni:`, which ends TLS itself.
    """
    kind = text.partition(":")[0].lower()
    if kind in (*_TLS, "txsni"):
        return True
    if kind in _WRAPS_NONE:
        return False
    try:
        plain, named = parts(text)
    except ValueError:
        return False
    return any(each.lower() in _TLS for each in plain) or any(
        ":" in each and ends_tls(each) for each in (*plain, *named.values())
    )


def missing_files(text: str) -> str:
    """Files that a listener needs, and whose absence Twisted would only find later.

    :return: the error; empty if nothing is missing.
    """
    plain, named = parts(text)
    if plain[0].lower() != "tls":
        return ""
    folder = plain[1] if len(plain) > 1 else named.get("path", "")
    if not any(Path(folder).rglob("*.pem")):
        return (
            f"there is no .pem file in the folder {folder!r}, which should have"
            " certificates and their keys"
        )
    return ""


def what_is_wrong(
    text: str, problem: Exception, from_systemd: Callable[[], int]
) -> str:
    """Why Twisted can't use an endpoint string, in one line for the operator.

    :param problem: the exception of Twisted's parser.
    :param from_systemd: returns how many sockets systemd has passed to this process.
    """
    # Imports much of Twisted, which raised this.
    from twisted.internet.endpoints import quoteStringArgument

    from relayd.net.tls import error_line, is_openssl_error

    said = " ".join(str(problem).split())
    if isinstance(problem, LookupError) and "systemd:" in text.lower():
        count = from_systemd()
        sockets = "1 socket" if count == 1 else f"{count} sockets"
        return (
            f"systemd has passed {sockets} to this process (LISTEN_FDS,"
            " LISTEN_FDNAMES), and this is none of them: let its .socket unit start it"
        )
    if isinstance(problem, OSError) and problem.filename:
        name = os.fsdecode(problem.filename)
        return f"can't read {name!r}: {problem.strerror}"
    if type(problem).__name__ == "UnlistableError":
        # Twisted's, for an OSError that it does not pass on.
        return _unlistable(text)
    if isinstance(problem, ImportError | NameError) and not _has_tls():
        return "TLS needs packages that are not installed: pip install 'relayd[tls]'"
    if is_openssl_error(problem):
        return (
            f"its PEM files are not a certificate with its key ({error_line(problem)})"
        )
    if found := _LACKS.search(said):
        return f"it lacks {found[1]}"
    if found := _UNKNOWN.search(said):
        return f"it has no argument {found[1]}"
    if found := _NO_NUMBER.search(said):
        return f"{found[1]} is not a number"
    try:
        host, port = server_name(text), parts(text)[0][2:]
    except ValueError as ours:
        return str(ours)
    if ":" in host and "U+003A" in said:
        # Twisted passed the host to the resolver, as if it were a name.
        there = f"tcp:{quoteStringArgument(host)}:{port[0] if port else 443}"
        return (
            "Twisted dials no IPv6 address of its own accord: add"
            f" :endpoint={quoteStringArgument(there)}"
        )
    said = said or type(problem).__name__
    return (
        f"Twisted can't use it ({type(problem).__name__}: {said});"
        " see its manual on endpoint strings"
    )


def _has_tls() -> bool:
    """Whether the packages for TLS are installed."""
    return all(map(find_spec, ("OpenSSL", "service_identity")))


def _unlistable(text: str) -> str:
    _, named = parts(text)
    folder = named.get("trustRoots", named.get("caCertsDir", ""))
    return f"{folder!r} is not a folder that can be read; it should have .pem files"

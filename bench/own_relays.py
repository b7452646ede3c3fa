"""relayd's command lines, as they are measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from bench.children import beside_python, free_port
from bench.origins import NAME
from bench.places import HERE

#: Servers of the largest pools.
THOUSAND = 1_000


@frozen
class Setup:
    """The settings of a relay."""

    #: For its configuration.
    folder: Path
    #: Where it listens.
    port: int
    #: The server's port.  A proxy's clients choose it.
    destination: int
    #: Whether it logs no sessions.
    quiet: bool = False
    #: Where it listens, and where the server does: not for relays that are measured on
    #: this machine only.
    host: str = HERE.relay.host
    server: str = HERE.server.host


def own_twistd() -> str:
    return beside_python("twistd")


def twistd_command(*words: str, twistd: Callable[[], str] = own_twistd) -> list[str]:
    return [twistd(), "-n", "--pidfile=", "--reactor=epoll", *words]


def relayd(
    transport: str, scheme: str = "", twistd: Callable[[], str] = own_twistd
) -> Callable[[Setup], list[str]]:
    def command(setup: Setup) -> list[str]:
        return twistd_command(
            "relayd",
            *("--transport", transport),
            *(("--quiet",) if setup.quiet else ()),
            *("--listen", f"{scheme}{setup.host}:{setup.port}"),
            *("--dest", f"{scheme}{setup.server}:{setup.destination}"),
            twistd=twistd,
        )

    return command


def relayd_watched(setup: Setup) -> list[str]:
    return [
        *relayd("plane")(setup),
        *("--log-format", "json", "--metrics", f"127.0.0.1:{free_port()}"),
    ]


def relayd_pool(setup: Setup) -> list[str]:
    """Two servers, which are one, judged by their dials and by checks."""
    return [
        *relayd("plane")(setup),
        *("--dest", f"127.0.0.1:{setup.destination},name=two"),
        *("--balance", "least-sessions", "--check", "tcp"),
    ]


def relayd_copying(setup: Setup) -> list[str]:
    """Every byte goes through the process: nothing is spliced."""
    return _with("copying", relayd("plane")(setup))


def relayd_passing(setup: Setup) -> list[str]:
    """Every byte goes through a filter, which passes it on."""
    return _with("passing", [*relayd("plane")(setup), "--filter", "pass"])


def relayd_first(setup: Setup) -> list[str]:
    """With a filter that has seen enough at the first chunk."""
    return [*relayd("plane")(setup), "--filter", "first:64"]


def relayd_route(function: str) -> Callable[[Setup], list[str]]:
    """With a route of :mod:`bench.routes`."""

    def command(setup: Setup) -> list[str]:
        return [*relayd("plane")(setup), "--route", f"bench.routes:{function}"]

    return command


def relayd_sni(setup: Setup) -> list[str]:
    """Its server is that of a server name."""
    *words, _, server = relayd("plane")(setup)
    return [*words, "--sni", f"{NAME}={server}"]


def _with(what: str, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "bench.twistd_with", what, *words[1:]]


def relayd_thousand(balance: str) -> Callable[[Setup], list[str]]:
    """A thousand servers, which are one."""

    def command(setup: Setup) -> list[str]:
        words = [*relayd("plane")(setup), "--balance", balance]
        for number in range(1, THOUSAND):
            words += ["--dest", f"127.0.0.1:{setup.destination},name=s{number}"]
        return words

    return command


def relayd_transparent(scheme: str = "") -> Callable[[Setup], list[str]]:
    """It dials from its clients' addresses, and sees to the rules that this takes."""

    def command(setup: Setup) -> list[str]:
        words = relayd("plane", scheme)(setup)
        return [*words, "--transparent", "--manage-netfilter"]

    return command


def relayd_socks4(setup: Setup) -> list[str]:
    return twistd_command(
        "socks4",
        *("--transport", "plane"),
        *(("--quiet",) if setup.quiet else ()),
        *("--listen", f"127.0.0.1:{setup.port}"),
    )

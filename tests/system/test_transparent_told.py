"""What is told of a client that rules of the kernel bring: what it has asked for.

Servers are told by the PROXY header, and operators by the log and by `relayctl`; none
of them hears of the gateway port, by NAT no more than by TPROXY.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from relayd.preludes.proxy_protocol import write_version_1, write_version_2
from tests.support.process import read_exactly
from tests.system.gateway import (
    GATEWAY_PORT,
    PORT,
    Addresses,
    Gateway,
    Way,
    accepted,
    asking,
    each_family,
    end,
    gateway,
    listening,
)
from tests.system.wire import at

pytestmark = pytest.mark.system

HEADERS = {"v1": write_version_1, "v2": write_version_2}

SERVED = "--name web -l {asked}:{port} -d {server}:80 --intercept {asked}:80"


@pytest.fixture(scope="module")
def network() -> Iterator[Gateway]:
    with gateway() as made:
        yield made


def told(network: Gateway, family: Addresses, version: str, control: Path) -> str:
    """The listener of a client's session, while it lasts; its server is told the same.

    :param version: of the PROXY header.
    """
    with (
        listening(network, family.server) as server,
        asking(network, family.asked) as client,
    ):
        upstream, _ = accepted(server)
        with upstream:
            expected = HEADERS[version](end(client), at(family.asked, PORT))
            assert read_exactly(upstream, len(expected)) == expected
            words = ("--control", f"unix:{control}", "sessions", "--json")
            [session] = json.loads(network.relayctl(*words))["sessions"]
            assert session["client"] == end(client)
            listener: str = session["listener"]
            return listener


@each_family
@pytest.mark.parametrize("version", HEADERS)
@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize(
    "more", ["", ",by=tproxy", " --transparent", ",by=tproxy --transparent"]
)
def test_what_was_asked_for(
    network: Gateway,
    family: Addresses,
    tmp_path: Path,
    transport: str,
    version: str,
    more: str,
) -> None:
    control = tmp_path / "control"
    options = f"{SERVED}{more} --send-proxy {version} --transport {transport}"
    args = Way(options, "asked", True).args(family)
    with network.relaying(*args, "--control", f"unix:{control}") as running:
        asked = at(family.asked, PORT)
        assert told(network, family, version, control) == asked
        [line] = running.ended("done")
        assert line["listener"] == asked
        # It listens where it did.
        assert running.port == GATEWAY_PORT


@each_family
def test_from_a_change_on(network: Gateway, family: Addresses, tmp_path: Path) -> None:
    """Of a relay that listens on the port itself, and then has it brought."""
    control = tmp_path / "control"
    options = "--name web -l {asked}:80 -d {server}:80 --send-proxy v1"
    args = Way(options, "asked", False).args(family)
    with network.relaying(*args, "--control", f"unix:{control}") as running:
        asked = at(family.asked, PORT)
        assert told(network, family, "v1", control) == asked
        words = ("--control", f"unix:{control}", "set", "web")
        own = at(family.asked, GATEWAY_PORT)
        network.relayctl(*words, f"listen={own}", f"intercept={asked}")
        assert told(network, family, "v1", control) == asked
        assert [each["listener"] for each in running.ended("done", 2)] == [asked] * 2

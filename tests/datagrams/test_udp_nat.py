"""The face of the UDP relay: its settings."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.datagrams.sockets import (
    MOST_BY_DEFAULT,
    default_max_flows,
    possible_flows,
)
from relayd.net.dial_options import DialOptions
from relayd.udp_nat import FlowServer, Server, UdpNat
from relayd.upstreams.pool import Pool
from tests.datagrams.support import (
    SERVER,
)


def test_impossible_settings() -> None:
    """Are refused as the relay is made."""
    for servers, settings in (
        ([], {}),
        ([Server(*SERVER)], {"reply_cap": -1}),
        ([Server(*SERVER)], {"reply_cap": float("nan")}),
        ([Server(*SERVER)], {"timeout": 0}),
        ([Server(*SERVER)], {"max_flows": 0}),
        ([Server(*SERVER)], {"max_flows_per_client": 0}),
    ):
        with pytest.raises(ValueError, match="must|needs"):
            UdpNat(Clock(), servers, **settings)  # type: ignore[arg-type]


def test_one_client_may_have_half_of_the_flows() -> None:
    """Unless it is told otherwise."""
    for most, each in ((10, 5), (1, 1)):
        table = UdpNat(Clock(), [Server(*SERVER)], max_flows=most).table
        assert (table.max_flows, table.max_flows_per_client) == (most, each)


def test_the_default_of_flows_depends_on_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the ports; some are left to everything else."""
    ports = tmp_path / "ports"
    monkeypatch.setattr("relayd.core.ports.PORT_RANGE", ports)
    for limit, between, flows in (
        (65536, "1024\t65023\n", 56000),
        (65536, "32768 60999", 24703),
        (1024, "32768 60999", 768),
        (1, "32768 60999", 1),
        (-1, "32768 60999", 24703),
        (65536, "32768 32768", 1),
        (65536, "", 14336),
    ):
        ports.write_text(between)
        monkeypatch.setattr(
            "relayd.datagrams.sockets.resource.getrlimit",
            lambda _, is_=limit: (is_, is_),
        )
        assert default_max_flows() == flows
    ports.unlink()
    assert default_max_flows() == 14336

    def refuse(_: int) -> tuple[int, int]:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("relayd.datagrams.sockets.resource.getrlimit", refuse)
    assert default_max_flows() == 768


def test_flows_with_their_clients_ports_are_bounded_by_descriptors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By default, by a constant, too; all of them need to have those."""
    ports = tmp_path / "ports"
    ports.write_text("32768 33767")
    monkeypatch.setattr("relayd.core.ports.PORT_RANGE", ports)

    def limit(descriptors: int) -> None:
        monkeypatch.setattr(
            "relayd.datagrams.sockets.resource.getrlimit", lambda _: (descriptors,) * 2
        )

    limit(20000)
    assert possible_flows(2, ephemeral=False) == 9488
    own, source = DialOptions(transparent=True), DialOptions(source4="127.0.0.2")
    plain, other = Server(*SERVER), Server(*SERVER, dialing=source)
    one = Server(*SERVER, dialing=own)
    for servers, dialing, most in (
        ([plain], own, 18976),
        ([plain], None, 875),
        ([plain, other], own, 875),
        ([one], None, 875),
        (iter([plain, one]), own, 18976),
        (Pool([FlowServer.at(Server(*SERVER))]), own, 18976),
        (Pool([FlowServer.at(Server(*SERVER, dialing=source))]), own, 875),
        (Pool([]), None, 875),
    ):
        made: Any = servers
        nat = UdpNat(Clock(), made, dialing=dialing)
        assert nat.table.max_flows == most
    nat = UdpNat(Clock(), [plain], dialing=own, redirected=True)
    assert nat.table.max_flows == 9488
    both = [plain, Server("2001:db8::1", 53)]
    nat = UdpNat(Clock(), both, udp_balance="datagram")
    assert nat.table.max_flows == 437
    limit(-1)
    assert default_max_flows(ephemeral=False) == MOST_BY_DEFAULT
    assert possible_flows(ephemeral=False) > MOST_BY_DEFAULT


def test_a_relay_that_brings_nobody_elsewhere_loads_nothing_for_it() -> None:
    """What transparent flows and redirected clients take."""
    code = """
import sys
from twisted.internet.task import Clock
from relayd.udp_nat import Server, UdpNat
made = [UdpNat(Clock(), [Server("192.0.2.1", 53)], max_flows=1)]
names = "original", "original_listener", "transparent"
print(*(name for name in names if f"relayd.datagrams.{name}" in sys.modules))
made.append(UdpNat(Clock(), made[0].servers, max_flows=1, redirected=True))
print(*(name for name in names if f"relayd.datagrams.{name}" in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\noriginal original_listener transparent\n"

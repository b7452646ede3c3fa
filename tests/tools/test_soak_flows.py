"""The soak's UDP flows: what is drawn, and its floods."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

from soak.echoes import flow_bound, flow_options
from soak.flow_scripts import FLOW_SCRIPTS, draw_flow
from soak.flows import FLOOD_HOSTS, FLOOD_PORTS, SHARED_PORTS
from soak.stops import Stops


def test_every_flow_script_is_drawn_and_again_by_a_seed() -> None:
    async def names() -> list[str]:
        return [draw_flow(7, n, Stops()).script.name for n in range(1, 300)]

    first = asyncio.run(names())
    assert first == asyncio.run(names())
    assert set(first) == {script.name for script in FLOW_SCRIPTS}


def test_floods_come_from_loopback_and_take_nobodys_port() -> None:
    assert all(ip_address(host).is_loopback for host in FLOOD_HOSTS)
    assert not set(FLOOD_PORTS) & set(SHARED_PORTS)


def test_each_listener_for_datagrams_has_its_servers() -> None:
    options = flow_options({"127.0.0.1": ["127.0.0.1:1"], "127.0.0.2": ["x:2"]}, 50)
    assert options[-8:] == [
        *("--listen", "udp:127.0.0.1:0", "--dest", "udp:127.0.0.1:1"),
        *("--listen", "udp:127.0.0.2:0", "--dest", "udp:x:2"),
    ]
    assert options[options.index("--max-flows") + 1] == f"{flow_bound(50)}" == "200"

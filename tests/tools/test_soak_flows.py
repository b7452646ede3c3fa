"""The soak's UDP flows: what is drawn, and its floods."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

import pytest

from soak.datagrams import LOUD, unowed
from soak.echoes import Echoes, flow_bound, flow_options
from soak.flow_scripts import FLOW_SCRIPTS, draw_flow
from soak.flows import (
    ANSWERS,
    FLOOD_HOSTS,
    FLOOD_PORTS,
    SHARED_PORTS,
    Flows,
    client_socket,
)
from soak.stops import Stops
from soak.violations import Violations
from tests.support.process import PATIENCE


def test_every_flow_script_is_drawn_and_again_by_a_seed() -> None:
    async def names() -> list[str]:
        return [draw_flow(7, n, Stops()).script.name for n in range(1, 300)]

    first = asyncio.run(names())
    assert first == asyncio.run(names())
    assert set(first) == {script.name for script in FLOW_SCRIPTS}


def test_floods_come_from_loopback_and_from_free_ports() -> None:
    assert all(ip_address(host).is_loopback for host in FLOOD_HOSTS)
    assert not set(FLOOD_PORTS) & set(SHARED_PORTS)


def test_each_listener_for_datagrams_has_its_servers() -> None:
    options = flow_options({"127.0.0.1": ["127.0.0.1:1"], "127.0.0.2": ["x:2"]}, 50)
    assert options[-8:] == [
        *("--listen", "udp:127.0.0.1:0", "--dest", "udp:127.0.0.1:1"),
        *("--listen", "udp:127.0.0.2:0", "--dest", "udp:x:2"),
    ]
    assert options[options.index("--max-flows") + 1] == f"{flow_bound(50)}" == "200"


def test_a_client_has_no_servers_port() -> None:
    """The relay would drop what comes from there: it might be that server's answer."""

    class Avoided:
        """The first three ports that anybody asks for."""

        def __init__(self) -> None:
            self.ports: list[int] = []

        def __contains__(self, port: object) -> bool:
            assert isinstance(port, int)
            self.ports.append(port)
            return len(self.ports) <= 3

    for number in (7, 8):
        avoided = Avoided()
        with client_socket(number, avoided) as sock:
            host, port = sock.getsockname()
            assert len(avoided.ports) == 4
            assert port == avoided.ports[-1]
            assert host == f"127.2.0.{number}"


def test_a_client_shares_an_address_unless_somebody_has_its_port() -> None:
    with client_socket(16, ()) as sock, client_socket(16, ()) as another:
        host, port = sock.getsockname()
        assert host in FLOOD_HOSTS
        assert port in SHARED_PORTS
        assert another.getsockname()[0] == "127.2.0.16"


@pytest.mark.parametrize("foreign", [True, False])
def test_an_answer_to_an_earlier_flow_of_the_port_is_recognized(foreign: bool) -> None:
    """It went to the port before that was this flow's, and many others since."""

    async def run() -> str:
        echoes = Echoes()
        violations = Violations(lambda _: None)
        flows = Flows(1, echoes, [("127.0.0.1", 1)], violations, Stops())
        with socket.socket(type=socket.SOCK_DGRAM) as relay:
            relay.setblocking(False)
            relay.connect(echoes.sockets[0].getsockname())

            async def ask(data: bytes) -> bytes:
                relay.send(data)
                async with asyncio.timeout(PATIENCE):
                    return await asyncio.get_running_loop().sock_recv(relay, 100)

            if foreign:
                assert await ask(LOUD) == LOUD
            client = draw_flow(1, 2, Stops())
            assert client.script.answered
            flows.expect(client)
            for _ in range(3 * ANSWERS):
                data = client.flow.ask(50, 1.0, answered=True)
                assert client.flow.receive(await ask(data), 1.0) == ""
        await flows.close()
        echoes.close()
        assert violations.count == 0
        assert client.flow.receive(LOUD, 2.0) == ""
        return client.flow.judge_strays()

    assert asyncio.run(run()) == ("" if foreign else unowed(LOUD))

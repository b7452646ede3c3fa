"""How many flows UDP relays can have: by descriptors, ports and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.config import UdpRelay
from relayd.core.errors import ConfigError
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.datagrams.sockets import MOST_BY_DEFAULT
from relayd.operating import units
from relayd.operating.explaining import explain
from relayd.operating.udp_relays import most_flows
from tests.support import rights
from tests.support.files import config_of
from tests.support.steered import at, running

#: A transparent relay.
DNS = """
[udp.{}]
listen = "{}"
dest = "10.0.0.1:{}"
transparent = true
"""


def have(
    monkeypatch: pytest.MonkeyPatch, path: Path, descriptors: int, ports: int
) -> None:
    """This process can have so many descriptors, and the kernel so many ports."""
    path.write_text(f"32768 {32768 + ports - 1}")
    monkeypatch.setattr("relayd.core.ports.PORT_RANGE", path)
    monkeypatch.setattr(
        "relayd.datagrams.sockets.resource.getrlimit", lambda _: (descriptors,) * 2
    )


def test_flows_with_their_clients_ports_are_not_bounded_by_those_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors bound them; those of other relays are bounded by both."""
    have(monkeypatch, tmp_path / "ports", descriptors=20000, ports=1000)
    own = DNS.format("a", 53, 53)

    def most(*texts: str) -> list[int]:
        config = config_of(tmp_path / "f.toml", "".join(texts))
        limit = units.FlowLimit.of(config)
        udp = [each for each in config.relays if isinstance(each, UdpRelay)]
        return [most_flows(each, limit) for each in udp]

    assert most(own) == [18976]
    assert most(own, "max_flows = 18976\n") == [18976]
    with pytest.raises(ConfigError) as caught:
        most(own, "max_flows = 18977\n")
    assert str(caught.value) == (
        "max-flows 18977 is more than this process can have, which is 18976:"
        " raise the limit of open files (ulimit -n)"
    )
    other = '[udp.b]\nlisten = "54"\ndest = "10.0.0.1:54"\n'
    assert most(own, other) == [9488, 875]
    # Nobody else takes the kernel's ports.
    assert most(own, other, "max_flows = 875\n") == [9488, 875]
    with pytest.raises(ConfigError) as caught:
        most(own, other, "max_flows = 876\n")
    assert str(caught.value) == (
        "max-flows 876 is more than this process can have, which is 875:"
        " raise the kernel's range of ports (net.ipv4.ip_local_port_range)"
    )
    third = '[udp.c]\nlisten = "55"\ndest = "10.0.0.1:55"\nmax_flows = 438\n'
    with pytest.raises(ConfigError, match="which is 437 for each of 2 listeners: rai"):
        most(own, other, third)
    # What goes to a server with a source is not transparent.
    mixed = own.replace(":53", ":53,source=127.0.0.1")
    assert most(mixed) == [875]


def test_many_descriptors_are_no_reason_to_take_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than so many flows has an operator to ask for."""
    have(monkeypatch, tmp_path / "ports", descriptors=524288, ports=64512)
    text = DNS.format("a", 53, 53) + DNS.format("b", 54, 54)
    config = config_of(tmp_path / "f.toml", text)
    limit = units.FlowLimit.of(config)
    relay: Any = config.relays[0]
    assert most_flows(relay, limit) == MOST_BY_DEFAULT // 2
    assert limit.each == 261632
    config = config_of(tmp_path / "f.toml", f"{text}max_flows = 261632\n")
    relay = config.relays[1]
    assert most_flows(relay, limit) == 261632


def test_datagrams_in_turn_to_servers_of_several_kinds_take_several_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each family, and each way of dialling."""
    have(monkeypatch, tmp_path / "ports", descriptors=20000, ports=8000)

    def most(*servers: str, balance: str = "datagram", more: str = "") -> int:
        text = f"""
[udp.a]
listen = "20053"
dest = {list(servers)}
udp_balance = "{balance}"
{more}
"""
        config = config_of(tmp_path / "f.toml", text)
        [relay] = config.relays
        assert isinstance(relay, UdpRelay)
        return most_flows(relay, units.FlowLimit.of(config))

    one, other = "10.0.0.1:53", "10.0.0.2:53"
    assert most(one, other) == most(one, "[::1]:53", balance="flow") == 7000
    assert most(one, other, "[::1]:53") == most(one, "ns.example:53") == 3500
    assert most("dns:ns.example:53") == 3500
    assert most(one, f"{other},mark=7") == 3500
    assert most(one, f"{other},mark=7", "[::1]:53") == 2333
    assert most(f"{one},mark=7", f"{other},mark=7") == 7000
    with pytest.raises(ConfigError, match="which is 3500: raise the kernel's range"):
        most(one, "[::1]:53", more="max_flows = 3501")
    have(monkeypatch, tmp_path / "ports", descriptors=5000, ports=8000)
    assert most(one, "[::1]:53") == 1988
    with pytest.raises(ConfigError, match="which is 1988: raise the limit of open"):
        most(one, "[::1]:53", more="max_flows = 1989")


@rights.transparent
def test_fewer_ports_do_not_evict_flows_that_take_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the file is read again after somebody has changed the kernel's setting."""
    have(monkeypatch, tmp_path / "ports", descriptors=1000, ports=1000)
    relay = {"listen": at(20001), "dest": "10.0.0.1:53", "transparent": True}
    with running(tmp_path, {"udp": {"a": relay}}) as relayd:
        assert relayd.served("a").table.max_flows == 750
        have(monkeypatch, tmp_path / "ports", descriptors=1000, ports=1)
        relayd.reload()
        assert relayd.served("a").table.max_flows == 750
        relayd.set("a", udp_timeout=7)
        assert relayd.served("a").table.max_flows == 750


def test_a_file_is_checked_for_what_its_flows_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    have(monkeypatch, tmp_path / "ports", descriptors=20000, ports=1000)
    path = tmp_path / "f.toml"
    text = DNS.format("dns", 53, 53) + "max_flows = {}\n"
    path.write_text(text.format(5000))
    assert (main(["check", str(path)]), capsys.readouterr().err) == (0, "")
    path.write_text(text.format(20000))
    assert main(["check", str(path)]) == Exit.INVALID
    assert capsys.readouterr().err == (
        f"{path}: udp.dns: max-flows 20000 is more than this process can have, which"
        " is 18976: raise the limit of open files (ulimit -n)\n"
    )
    path.write_text(text.format(5000).replace("transparent = true", ""))
    assert main(["check", str(path)]) == Exit.INVALID
    assert "which is 875: raise the kernel's range" in capsys.readouterr().err


def test_what_is_explained_of_their_limit(tmp_path: Path) -> None:
    for text, bounds in (
        (DNS, "descriptors"),
        (DNS.replace("transparent = true", ""), "descriptors and ports"),
    ):
        config = config_of(tmp_path / "f.toml", text.format("a", 53, 53))
        why = explain(config.relays[0], "10.0.0.9").said("limits").why
        assert why.startswith(f"--max-flows as many as {bounds} allow: ")

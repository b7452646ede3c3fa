"""Which servers each pool of a relay has, and which pool is for a server name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.address_grammar import HostPort
from relayd.configuring.config import Relay, each_port
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import pools_of, sni_table
from relayd.configuring.route_settings import parse_sni
from relayd.configuring.server_grammar import options_of, parse_server
from tests.support.files import config_of


def pools(relay: Relay) -> list[dict[str, list[str]]]:
    """The pools of each port."""
    return [
        {
            name: [f"{each} {options_of(each).weight}" for each in servers]
            for name, servers in pools_of(destinations, relay.sni).items()
        }
        for _, destinations in each_port(relay)
    ]


def relay(*servers: str, listen: str = "1", sni: tuple[str, ...] = ()) -> Relay:
    listener, *destinations = map(parse_server, (listen, *servers))
    made: Any = Relay
    return made([listener], destinations, sni=map(parse_sni, sni))  # type: ignore[no-any-return]


def test_each_pool_has_those_that_name_it_in_order() -> None:
    found = relay("a:1,pool=b,weight=2", "a:2", "a:3,pool=c", "a:4,pool=b", "a:5")
    assert pools(found) == [
        {"default": ["a:2 1", "a:5 1"], "b": ["a:1 2", "a:4 1"], "c": ["a:3 1"]}
    ]
    assert pools(relay("a:1,pool=default", "a:2")) == [{"default": ["a:1 1", "a:2 1"]}]


def test_of_ranges_each_port_has_its_own() -> None:
    found = relay("a:1-2", "b:7-8,pool=b", "c:9,pool=b", listen="5-6", sni=("=d:4",))
    assert pools(found) == [
        {"default": ["a:1 1"], "b": ["b:7 1", "c:9 1"], "*": ["d:4 1"]},
        {"default": ["a:2 1"], "b": ["b:8 1", "c:9 1"], "*": ["d:4 1"]},
    ]


def test_what_stands_in_a_pool_does_not_name_it() -> None:
    """So that the only server of a pool, of which no more is said, is a plain one."""
    assert pools_of([parse_server("a:1,pool=b")])["b"] == [HostPort("a", 1)]


def test_server_names_have_pools_of_their_own() -> None:
    found = relay(
        "a:1,pool=web",
        sni=("WWW.a.=a:2,weight=3", "*.a=a:4", "www.a=a:3", "=web", "b=default"),
    )
    assert pools(found) == [
        {"default": [], "web": ["a:1 1"], "www.a": ["a:2 3", "a:3 1"], "*.a": ["a:4 1"]}
    ]
    names = {"www.a": "www.a", "*.a": "*.a", "": "web", "b": "default"}
    assert sni_table(found) == names
    assert sni_table(relay(sni=("=a:1",))) == {"": "*"}


@pytest.mark.parametrize("key", ["dest", "sni"])
def test_what_many_servers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Each change reads all of them: what a relay says is looked for once."""
    looked = Counter[int]()
    plain = RelaySection.all

    def count(section: RelaySection, wanted: str) -> list[Given]:
        looked[many] += 1
        return plain(section, wanted)

    monkeypatch.setattr(RelaySection, "all", count)
    for many in (10, 100):
        before = "" if key == "dest" else "a{0}.example="
        servers = [f"{before}10.0.0.1:{{0}}".format(1 + n) for n in range(many)]
        config_of(tmp_path / "a.toml", f"[tcp.a]\nlisten = '8080'\n{key} = {servers}\n")
    assert looked[10] == looked[100]

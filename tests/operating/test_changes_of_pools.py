"""Changes of a relay with several pools: a pool of which nothing else is said stays.

On a reactor that stands still: see :mod:`tests.support.steered`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from relayd.control.steering import Invalid
from relayd.preludes.client_hello import hello_of
from relayd.upstreams.pool import Pool
from tests.support.steered import HOST, ME, Relayd, at, running, whole

#: Servers that nobody is.
WEB = ["127.0.0.1:9", "127.0.0.1:10"]
SSH = ["127.0.0.1:11,pool=ssh,name=blue", "127.0.0.1:9,pool=ssh"]
SNI = ["=default", "ssh.example=ssh", "*.b.example=127.0.0.1:12", "b.example=web"]


def pooled(
    dest: Sequence[Any] = (*WEB, *SSH, "127.0.0.1:13,pool=web"),
    sni: Sequence[str] = SNI,
    **settings: Any,
) -> dict[str, Any]:
    """A relay `a` with four pools: `default`, `ssh`, `web` and `*.b.example`."""
    relay = {"listen": at(20001), "dest": [*dest], "sni": [*sni], "check": "tcp"}
    return {"transport": "twisted", "tcp": {"a": {**relay, **settings}}}


def pools(relayd: Relayd) -> dict[str, Pool]:
    found: dict[str, Pool] = dict(relayd.unit("a").parts[0].pools)
    served = relayd.served("a")
    assert list(served.pools) == list(found)
    assert served.all_pools == list(found.values())
    return found


def names(pool: Pool) -> list[str]:
    return [each.name for each in pool.upstreams]


def test_each_pool_has_its_servers_its_checks_and_its_tasks(tmp_path: Path) -> None:
    with running(tmp_path, pooled(max_fails=3)) as relayd:
        found = pools(relayd)
        assert {name: names(pool) for name, pool in found.items()} == {
            "default": WEB,
            "ssh": ["ssh/blue/127.0.0.1:11", "ssh/127.0.0.1:9"],
            "web": ["web/127.0.0.1:13"],
            "*.b.example": ["*.b.example/127.0.0.1:12"],
        }
        servers = [each for pool in found.values() for each in pool.servers]
        assert all(each.has_checks for each in servers)
        assert len(relayd.relays.checks.checker) == len(servers) == 6
        assert len(relayd.relays.tasks) == 4
        rows = whole(relayd.steered.servers("a"))["servers"]
        assert [(each["pool"], each["address"]) for each in rows] == [
            *(("default", each) for each in WEB),
            *(("ssh", "127.0.0.1:11"), ("ssh", "127.0.0.1:9")),
            *(("web", "127.0.0.1:13"), ("*.b.example", "127.0.0.1:12")),
        ]
        row = relayd.steered.relay("a")
        assert (row["sni"], row["route"]) == (SNI, None)
        assert row["dest"] == [
            *WEB,
            *(f"127.0.0.1:{each},pool=ssh" for each in (11, 9)),
            "127.0.0.1:13,pool=web",
        ]


@pytest.mark.parametrize(
    ("changed", "other"),
    [
        ({"dest": [*WEB, *SSH[:1], "127.0.0.1:13,pool=web"]}, ["ssh"]),
        ({"dest": [*WEB, *SSH, "127.0.0.1:13,pool=web,weight=2"]}, ["web"]),
        ({"dest": [WEB[1], *SSH, WEB[0], "127.0.0.1:13,pool=web"]}, ["default"]),
        # Whatever stands between them.
        ({"dest": ["127.0.0.1:13,pool=web", *SSH, *WEB]}, []),
        ({"sni": [*SNI, "*.b.example=127.0.0.1:14"]}, ["*.b.example"]),
        ({"sni": [*SNI, "other.example=ssh"]}, []),
        ({"idle_timeout": 7, "retries": 2}, ["default", "ssh", "web", "*.b.example"]),
        ({"idle_timeout": 7}, []),
    ],
)
def test_a_change_of_one_pool_leaves_the_others_as_they_are(
    tmp_path: Path, changed: dict[str, Any], other: list[str]
) -> None:
    with running(tmp_path, pooled(max_fails=3)) as relayd:
        before = pools(relayd)
        checked = {name: pool.servers[0] for name, pool in before.items()}
        for each in checked.values():
            each.noted(0.0, False, "no")
            each.checked(False, "no")
            each.began()
        relayd.write(pooled(**{"max_fails": 3, **changed}))
        assert relayd.reload()["changed"] == ["a"]
        now = pools(relayd)
        assert [name for name in now if now[name] is not before[name]] == other
        for name, pool in now.items():
            [same] = [each for each in pool.servers if each.name == checked[name].name]
            # It is still known, and it has its session.
            assert (same.checked_up, same.sessions) == (False, 1)
            assert same.has_checks
        servers = [each for pool in now.values() for each in pool.servers]
        assert len(relayd.relays.checks.checker) == len(servers)
        assert len(relayd.relays.tasks) == 4
        for each in checked.values():
            each.closed()
        assert not any(each.sessions for each in servers)


def test_pools_that_come_and_go(tmp_path: Path) -> None:
    with running(tmp_path, pooled(max_fails=3)) as relayd:
        before = pools(relayd)
        relayd.write(pooled([*WEB, "127.0.0.1:13,pool=web"], ["=default", "b=web"]))
        relayd.reload()
        relayd.write(pooled(max_fails=3))
        relayd.reload()
        now = pools(relayd)
        assert list(now) == list(before)
        assert now["ssh"] is not before["ssh"]
        assert not any(each.has_checks for each in before["ssh"].servers)
        relayd.write(pooled([*WEB, "127.0.0.1:13,pool=web"], ["=default", "b=web"]))
        relayd.reload()
        assert list(pools(relayd)) == ["default", "web"]
        assert len(relayd.relays.checks.checker) == 3
        relayd.write(pooled(WEB, []))
        relayd.reload()
        assert list(pools(relayd)) == ["default"]


def test_what_cannot_be_built_leaves_every_pool_as_it_was(tmp_path: Path) -> None:
    with running(tmp_path, pooled()) as relayd:
        before = pools(relayd)
        heard = [list(each.listeners) for each in before.values()]
        for dest in ([*WEB, "tls:a:99999,pool=ssh"], [*WEB, "nobody:x,pool=ssh"]):
            relayd.write(pooled([*dest, "127.0.0.1:13,pool=web"]))
            with pytest.raises(Invalid):
                relayd.reload()
        sni = [*SNI[:2], "*.b.example=tls:a:99999", SNI[3]]
        relayd.write(pooled(sni=sni))
        with pytest.raises(Invalid, match="1 to 65535"):
            relayd.reload()
        with socket.create_server((HOST, 20003)), pytest.raises(Invalid, match="in us"):
            relayd.set("a", listen=at(20003))
        assert pools(relayd) == before
        assert [list(each.listeners) for each in before.values()] == heard
        assert len(relayd.relays.checks.checker) == 6


def test_a_stopped_relay_has_no_checks_and_no_tasks(tmp_path: Path) -> None:
    with running(tmp_path, pooled(max_fails=3)) as relayd:
        relayd.do("stop", "a")
        assert len(relayd.relays.checks.checker) == 0
        assert len(relayd.relays.tasks) == 0
        relayd.do("start", "a")
        assert len(relayd.relays.checks.checker) == 6
        assert len(relayd.relays.tasks) == 4


def test_a_hundred_changes_of_pools_leave_nothing_behind(tmp_path: Path) -> None:
    settings = {"on_down": "cut", "when_none": "wait=5", "max_fails": 3}
    with running(tmp_path, pooled(**settings)) as relayd:

        def round_of(number: int) -> tuple[Any, ...]:
            relayd.set("a", idle_timeout=number)
            relayd.set("a", sni=[*SNI, f"c{number}.example=127.0.0.1:12"])
            relayd.set("a", dest=[*WEB, *SSH[:1], "127.0.0.1:13,pool=web"])
            relayd.set("a", dest=None, sni=None)
            found = pools(relayd).values()
            relays = relayd.relays
            return (
                len(os.listdir("/proc/self/fd")),
                len(relayd.reactor.getDelayedCalls()),
                [len(each.listeners) for each in found],
                len(relays.tasks),
                (len(relays._former), len(relays.service._former)),
                len(relays.checks.checker) + len(relays.checks.added),
            )

        first = round_of(1)
        for number in range(2, 20):
            assert round_of(number) == first


# -- who steers


def test_a_word_about_a_server_of_one_pool_stands_over_changes(tmp_path: Path) -> None:
    """It stays with that pool, whichever of them changes."""
    with running(tmp_path, pooled()) as relayd:
        steered = relayd.steered
        told = steered.set_server("a", "ssh/blue", "drain", None, None, ME)
        assert (told["pool"], told["operator"]) == ("ssh", "drain")
        steered.set_server("a", "127.0.0.1:9", None, 7, None, ME)
        steered.set_server("a", "*.b.example/127.0.0.1:12", "down", None, None, ME)

        def said() -> list[tuple[str, Any, int]]:
            rows = whole(steered.servers("a"))["servers"]
            return [
                (each["name"], each["operator"], each["weight"])
                for each in rows
                if each["operator"] or each["weight"] != 1
            ]

        first = [
            ("127.0.0.1:9", None, 7),
            ("ssh/blue/127.0.0.1:11", "drain", 1),
            ("*.b.example/127.0.0.1:12", "down", 1),
        ]
        assert said() == first
        for changed in (
            {"dest": ["127.0.0.1:9", *SSH, "127.0.0.1:13,pool=web"]},
            {"dest": [*WEB, *SSH[:1], "127.0.0.1:13,pool=web"]},
            {"sni": [*SNI, "*.b.example=127.0.0.1:14"]},
            {"retries": 3},
        ):
            relayd.write(pooled(**changed))
            relayd.reload()
            assert said() == first


def test_what_is_said_is_written_where_the_file_names_the_server(
    tmp_path: Path,
) -> None:
    name = "*.b.example/127.0.0.1:12"
    with running(tmp_path, pooled(check="tcp")) as relayd:
        for server, state, weight in (
            ("ssh/blue", "drain", None),
            (name, "down", 3),
            ("ssh/127.0.0.1:9", None, 5),
        ):
            relayd.steered.set_server("a", server, state, weight, None, ME)
        told = relayd.steered.diff()["changes"]
        assert [(each["server"], each["key"], each["now"]) for each in told] == [
            ("ssh/blue", "state", "drain"),
            *((name, "state", "down"), (name, "weight", 3)),
            ("ssh/127.0.0.1:9", "weight", 5),
        ]
        relayd.steered.set_server("a", "127.0.0.1:9", None, 2, None, ME)
        merged = relayd.steered.merged()["toml"]
        for line in (
            '"127.0.0.1:9,weight=2",',
            '"127.0.0.1:11,pool=ssh,name=blue,disabled"',
            '"127.0.0.1:9,pool=ssh,weight=5"',
            '"*.b.example=127.0.0.1:12,disabled,weight=3"',
            '"127.0.0.1:13,pool=web"',
        ):
            assert line in merged, merged
        relayd.path.write_text(merged)
        relayd.reload(discard=True)
        rows = whole(relayd.steered.servers("a"))["servers"]
        assert [each["weight"] for each in rows] == [2, 1, 1, 5, 1, 3]
        assert rows[-1]["state"] == "disabled"


def test_the_only_server_of_a_pool_can_be_taken_out(tmp_path: Path) -> None:
    """Of it nothing was said, so it had no state; its sessions are its own."""
    tables = pooled(WEB[:1], ["=default", f"b.example={at(20009)}"])
    del tables["tcp"]["a"]["check"]
    with (
        running(tmp_path, tables) as relayd,
        socket.create_server((HOST, 20009)) as server,
        socket.create_connection((HOST, 20001)) as client,
    ):
        client.sendall(hello_of("b.example"))
        registry = relayd.served("a").registry
        relayd.reactor.until(lambda: any(each.bridge for each in registry.living()))
        relayd.reactor.turn()
        server.settimeout(5)
        with server.accept()[0] as far:
            far.settimeout(5)
            assert far.recv(1024) == hello_of("b.example")
            told = relayd.steered.set_server(
                "a", f"b.example/{at(20009)}", "drain", None, None, ME
            )
            assert (told["sessions"], told["state"]) == (1, "drain")
            rows = whole(relayd.steered.servers("a"))["servers"]
            assert [each["sessions"] for each in rows] == [0, 1]
            relayd.served("a").abort_all()
            relayd.reactor.turn()


def test_each_port_of_a_range_has_its_own_pools(tmp_path: Path) -> None:
    """Undecided clients of all of them are limited together."""
    dest = ["127.0.0.1:11-12", "127.0.0.1:13-14,pool=b", "127.0.0.1:15,pool=b"]
    sni = ["=default", "b=b", "c=127.0.0.1:16"]
    tables = pooled(dest, sni, listen=f"{HOST}:20001-20002", max_deciding=9)
    with running(tmp_path, tables) as relayd:

        def found() -> list[dict[str, Pool]]:
            return [dict(each.pools) for each in relayd.unit("a").parts]

        before = found()
        own = [[names(pool) for pool in each.values()] for each in before]
        assert own == [
            [
                ["127.0.0.1:11"],
                ["b/127.0.0.1:13", "b/127.0.0.1:15"],
                ["c/127.0.0.1:16"],
            ],
            [
                ["127.0.0.1:12"],
                ["b/127.0.0.1:14", "b/127.0.0.1:15"],
                ["c/127.0.0.1:16"],
            ],
        ]
        first, second = (each.served for each in relayd.unit("a").parts)
        assert first.handshakes is second.handshakes
        assert first.handshakes.limit == 9
        relayd.set("a", dest=[dest[0], "127.0.0.1:13-14,pool=b"])
        for old, new in zip(before, found(), strict=True):
            same = [name for name in old if new[name] is old[name]]
            assert same == ["default", "c"]
        relayd.set("a", listen=at(20001), dest=["127.0.0.1:11", "127.0.0.1:13,pool=b"])
        [only] = found()
        assert list(only) == ["default", "b", "c"]


def test_a_hundred_pools_are_not_all_named_in_the_log(tmp_path: Path) -> None:
    sni = [f"n{n}.example=127.0.0.1:9" for n in range(100)]
    with running(tmp_path, pooled([], sni)) as relayd:
        [listening] = relayd.unit("a").listenings
        assert listening.purpose.endswith("n9.example/127.0.0.1:9 and 90 other pools")


def test_what_is_said_of_a_server_that_is_gone_is_a_comment(tmp_path: Path) -> None:
    with running(tmp_path, pooled()) as relayd:
        relayd.steered.set_server("a", "ssh/blue", "drain", None, None, ME)
        relayd.set("a", dest=["127.0.0.1:9", "127.0.0.1:10"], sni="=default")
        merged = relayd.steered.merged()["toml"]
        assert merged.splitlines()[0] == (
            "# a: ssh/blue: drain; the settings have no such server: it is gone, or a"
            " name has brought it"
        )

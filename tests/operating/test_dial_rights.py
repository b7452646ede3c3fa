"""Options of dials are tried again by a process that has become another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from twisted.internet import reactor

from relayd.core.errors import CannotStart, ConfigError
from relayd.net.dial_options import DialOptions
from relayd.operating.dial_rights import DialRights
from relayd.operating.service import make_service
from tests.support.files import config_of

#: It can't be set, as if a right was missing.
LACKING = DialOptions(source4="192.0.2.77")


def test_the_same_user_has_the_same_rights() -> None:
    """Nothing is tried twice."""
    rights = DialRights([("", LACKING)], "relayd")
    rights.startService()
    rights.stopService()


def test_another_one_may_lack_some(monkeypatch: pytest.MonkeyPatch) -> None:
    relays = [("relay a: ", LACKING), ("relay b: ", DialOptions(source4="127.0.0.2"))]
    rights = DialRights([*relays, ("relay c: ", LACKING)], "relayd")
    monkeypatch.setattr(os, "geteuid", lambda: 65534 + 1)
    with pytest.raises(CannotStart) as caught:
        rights.startService()
    why = (
        "source '192.0.2.77' is no address of this machine (as the user that it has"
        " become)"
    )
    assert str(caught.value.code).splitlines() == [
        f"relayd: relay a: {why}",
        f"relayd: relay c: {why}",
    ]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ('dest = "127.0.0.1:9"', 0),
        ('dest = "127.0.0.1:9"\ninterface = "lo"', 1),
        ('dest = ["127.0.0.1:9", "127.0.0.1:8,source=127.0.0.2"]', 1),
    ],
)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_service_has_them_if_a_relay_or_a_server_has_options(
    options: str, count: int, kind: str, tmp_path: Path
) -> None:
    text = f'[{kind}.a]\nlisten = "127.0.0.1:0"\n{options}\n'
    service = make_service(config_of(tmp_path / "f.toml", text), reactor)
    assert sum(isinstance(each, DialRights) for each in service) == count


def test_a_server_of_a_server_name_may_have_them(tmp_path: Path) -> None:
    text = '[tcp.a]\nlisten = "127.0.0.1:0"\nsni = "=127.0.0.1:9,source=127.0.0.2"\n'
    service = make_service(config_of(tmp_path / "f.toml", text), reactor)
    assert sum(isinstance(each, DialRights) for each in service) == 1


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("server", ["127.0.0.1:9", "dns:db.example.com:9"])
def test_a_servers_own_way_is_tried_before_anything_listens(
    kind: str, server: str, tmp_path: Path
) -> None:
    """Of a name as well, whose servers nobody knows yet."""
    written = f"{server},source=192.0.2.77"
    text = f'[{kind}.a]\nlisten = "127.0.0.1:0"\ndest = "{written}"\n'
    with pytest.raises(ConfigError) as raised:
        make_service(config_of(tmp_path / "f.toml", text), reactor)
    shown = server if kind == "tcp" else f"udp:{server}"
    assert str(raised.value) == (
        f"relay a: {shown}: source '192.0.2.77' is no address of this machine"
    )

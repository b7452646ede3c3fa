"""The filters of relays: made as their settings say, kept, changed, shown."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.configuring.config import Config, Relay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.control.steering import Invalid
from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.observing.line_log import LineLog
from relayd.operating.demo import demo_unit
from relayd.operating.explaining import explain_file
from relayd.operating.filtering import made_filters
from relayd.operating.relays import unit_of
from relayd.operating.units import Workshop
from tests.support.filter_packages import Packages, installed
from tests.support.steered import at, running, toml

CODE = """
import attrs
from relayd.filters import Filter, FilterFactory

@attrs.frozen
class Same(FilterFactory):
    "Equal options are equal."
    by: int = 1
    def build_filter(self, way):
        return Filter()
    def build_datagram_filter(self, way):
        return None

class Other(FilterFactory):
    "Equal to itself only."
    def __init__(self, by: int = 1):
        self.by = by
    def build_filter(self, way):
        return Filter()

class Greets(FilterFactory):
    "The server does so first."
    server_speaks_first = True
    def build_filter(self, way):
        return Filter()

class Datagrams(FilterFactory):
    def build_datagram_filter(self, way):
        return None
"""


@pytest.fixture(autouse=True)
def packages(tmp_path: Path) -> Iterator[Packages]:
    with installed(tmp_path / "packages") as made:
        names = {"same": "Same", "other": "Other", "datagrams": "Datagrams"}
        names["greets"] = "Greets"
        made.install("fake", CODE, **{k: f"fake:{v}" for k, v in names.items()})
        yield made


#: A relay of each kind; nothing listens on their ports until it is started.
TABLES: dict[str, Any] = {
    "transport": "twisted",
    "tcp": {
        "web": {
            "listen": [at(20001), at(20002)],
            "dest": at(9),
            "filter": ["same:3", "other"],
        },
        "plain": {"listen": at(20003), "dest": at(9)},
    },
    "udp": {"dns": {"listen": at(20004), "dest": at(9), "filter": "datagrams"}},
    "socks4": {"office": {"listen": at(20005), "filter": "same:5"}},
}


def filters(relayd: Any, name: str) -> list[Any]:
    """Those of a relay's first factory, which all of it have."""
    unit = relayd.unit(name)
    for part in unit.parts:
        has = part.served.made_of if unit.kind == "udp" else part.served
        assert list(has.filters) == list(unit.filters)
    return list(unit.filters)


def kinds(found: list[Any]) -> list[tuple[str, int]]:
    return [(type(each).__name__, each.by) for each in found]


def test_a_relay_of_each_kind_has_its_own(tmp_path: Path) -> None:
    with running(tmp_path, TABLES) as relayd:
        assert kinds(filters(relayd, "web")) == [("Same", 3), ("Other", 1)]
        assert filters(relayd, "plain") == []
        assert kinds(filters(relayd, "office")) == [("Same", 5)]
        [found] = filters(relayd, "dns")
        assert type(found).__name__ == "Datagrams"


def test_the_demo_has_them() -> None:
    relay = Relay([], [], "demo", filters=[FilterSpec("same", {"": "7"})])
    shop: Any = Workshop(Config([relay]), Clock(), LineLog())
    _, unit = demo_unit(relay, shop)
    assert kinds(list(unit.filters)) == [("Same", 7)]
    assert unit.parts[0].served.filters == unit.filters


# -- changed


def test_a_reload_keeps_those_that_are_as_they_were(tmp_path: Path) -> None:
    """Whether they are written in the same way, or mean the same."""
    with running(tmp_path, TABLES) as relayd:
        before, unit = filters(relayd, "web"), relayd.unit("web")
        relayd.reload()
        assert relayd.unit("web") is unit
        relayd.set("web", idle_timeout=77)
        assert relayd.unit("web") is not unit
        assert list(map(id, filters(relayd, "web"))) == list(map(id, before))
        relayd.set("web", filter=["other", {"name": "same", "by": 3}, "other"])
        found = filters(relayd, "web")
        assert kinds(found) == [("Other", 1), ("Same", 3), ("Other", 1)]
        assert found[0] is before[1]
        assert found[1] is before[0]
        assert found[2] is not before[1], "one of before is one of now"
        relayd.set("web", filter="same:4")
        assert kinds(filters(relayd, "web")) == [("Same", 4)]
        relayd.set("web", filter=[])
        assert filters(relayd, "web") == []
        relayd.set("web", filter=None)
        assert kinds(filters(relayd, "web")) == [("Same", 3), ("Other", 1)]
        [before_of_dns] = filters(relayd, "dns")
        relayd.set("dns", filter=["same:9", "datagrams"])
        found = filters(relayd, "dns")
        assert (found[0].by, found[1]) == (9, before_of_dns)


def test_what_can_not_be_made_changes_nothing(tmp_path: Path) -> None:
    """A line for each, with the name of its relay."""
    with running(tmp_path, TABLES) as relayd:
        unit = relayd.unit("web")
        with pytest.raises(Invalid) as told:
            relayd.set("web", filter=["same:x", "othr", "same:2", "datagrams"])
        assert list(told.value.problems) == [
            "relay web: filter 'same:x': bad by 'x': expected a whole number",
            "relay web: filter 'othr': there is no such filter; did you mean other?",
            (
                "relay web: filter 'datagrams': it is for datagrams, not for a relay of"
                " tcp"
            ),
        ]
        with pytest.raises(Invalid) as told:
            relayd.set("web", filter="same:x,by")
        assert list(told.value.problems) == [
            (
                "run time: tcp.web.filter: found 'same:x,by', expected key=value, not"
                r" 'by'; a comma in a value is written \,"
            ),
        ]
        assert relayd.unit("web") is unit
        assert len(relayd.steered.overlay) == 0


def test_what_was_set_is_in_diff_and_in_what_is_saved(tmp_path: Path) -> None:
    with running(tmp_path, TABLES) as relayd:
        table = {"name": "same", "by": 4}
        shown = relayd.set("web", filter=["same:3", table])
        assert shown["settings"]["filter"]["value"] == ["same:3", table]
        assert relayd.steered.diff()["changes"] == [
            {
                "relay": "web",
                "server": None,
                "key": "filter",
                "file": ["same:3", "other"],
                "now": ["same:3", table],
            }
        ]
        merged = relayd.steered.merged()["toml"]
        assert tomllib.loads(merged)["tcp"]["web"]["filter"] == ["same:3", table]
        path = tmp_path / "merged.toml"
        path.write_text(merged)
        found: Any = configure(read_layers(str(path))).relays[0]
        assert [str(each) for each in found.filters] == ["same:3", "same:by=4"]


# -- shown, without a relayd


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "relayd.toml"
    path.write_text(
        """
[tcp.web]
listen = "127.0.0.1:8080"
dest = "127.0.0.1:80"
filter = ["same:3", 'other:by=1']
[udp.dns]
listen = "127.0.0.1:5353"
dest = "127.0.0.1:53"
filter = "same"
[tcp.plain]
listen = "127.0.0.1:8081"
dest = "127.0.0.1:80"
"""
    )
    return str(path)


def test_an_explanation_names_them(path: str) -> None:
    def said(relay: str) -> list[dict[str, str]]:
        steps = explain_file(path, relay, "127.0.0.1")["steps"]
        return [each for each in steps if each["step"] == "filters"]

    assert said("web") == [
        {
            "step": "filters",
            "result": "see its bytes",
            "why": "--filter 'same:3', then --filter 'other:by=1'",
        }
    ]
    [step] = said("dns")
    assert step["result"] == "see its datagrams"
    assert said("plain") == []


def test_a_check_makes_them(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """But not if only the file is asked about."""
    assert main(["check", path]) == Exit.DONE
    bad = Path(path).read_text().replace("same:3", "same:x").replace("other", "othr")
    Path(path).write_text(bad.replace('"same"', '"other"'))
    capsys.readouterr()
    assert main(["check", path]) == Exit.INVALID
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"{path}: tcp.web.filter: 'same:x': bad by 'x': expected a whole number",
        (
            f"{path}: tcp.web.filter: 'othr:by=1': there is no such filter; did"
            " you mean other?"
        ),
        (
            f"{path}: udp.dns.filter: 'other': it is for connections, not for a"
            " relay of udp"
        ),
    ]
    assert main(["check", "--file-only", path]) == Exit.DONE


def test_a_relay_without_any_makes_none() -> None:
    relay = Relay([], [], "web")
    assert made_filters(relay) == ()
    shop: Any = Workshop(Config([relay]), Clock(), LineLog())
    bad = Relay([], [], "web", filters=[FilterSpec("none")])
    with pytest.raises(ConfigError, match="filter 'none': there is no such filter"):
        unit_of(bad, shop)


def test_filters_that_can_t_stand_beside_each_other(tmp_path: Path) -> None:
    file = str(tmp_path / "web.pcapng")
    twice = [FilterSpec("capture", {"file": file}), FilterSpec("capture", {"": file})]
    with pytest.raises(ConfigError, match="have .*web.pcapng: give each its own"):
        made_filters(Relay([], [], "web", filters=twice))
    much = FilterSpec("replace", {"old": "x", "new": "y" * 1000})
    assert made_filters(Relay([], [], "web", filters=[much]))
    with pytest.raises(ConfigError, match="may make 1,000,000 bytes of one"):
        made_filters(Relay([], [], "web", filters=[much, much]))


def test_one_whose_server_speaks_first_is_not_for_server_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the settings are read, checked and changed; a route may know what to do."""
    why = (
        "filter greets: it says that servers speak first, and sni is for TLS, where"
        " clients do: leave one of them out"
    )
    names = {"listen": at(20001), "sni": f"={at(9)}"}
    path = tmp_path / "names.toml"
    path.write_text(toml({"tcp": {"a": {**names, "filter": ["same:1", "greets"]}}}))
    with pytest.raises(ConfigError) as problem:
        made_filters(configure(read_layers(str(path))).relays[0])
    assert str(problem.value) == why
    assert main(["check", str(path)]) == Exit.INVALID
    assert capsys.readouterr().err == f"{path}: tcp.a.filter: {why}\n"
    tables = {"transport": "twisted", "tcp": {"a": names}}
    with running(tmp_path, tables) as relayd:
        with pytest.raises(Invalid, match="relay a: filter greets: it says that"):
            relayd.set("a", filter="greets")
        relayd.set("a", sni=[], dest=at(9), filter="greets")


def test_a_check_says_what_can_t_stand_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of filters that can be made, each for itself."""
    path = tmp_path / "twice.toml"
    twice = [f"capture:{tmp_path}/web.pcapng"] * 2
    relay = {"listen": at(20001), "dest": at(9), "filter": twice}
    path.write_text(toml({"tcp": {"a": relay}}))
    assert main(["check", str(path)]) == Exit.INVALID
    said = capsys.readouterr().err
    assert "tcp.a.filter: two filters of a relay have" in said
    assert said.count("\n") == 1
    relay["filter"] = ["nope", "other"]
    path.write_text(toml({"tcp": {"a": relay}}))
    assert main(["check", str(path)]) == Exit.INVALID
    assert capsys.readouterr().err.count("\n") == 1, "which is told once"

"""How filters are written, on a command line and in a file."""

from __future__ import annotations

import json
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.configure import configure
from relayd.configuring.effective import effective
from relayd.configuring.file import read_layers
from relayd.configuring.filter_settings import FILTER, MOST, load_filter, parse_filter
from relayd.configuring.written import as_toml
from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.setting_types import Kind
from relayd.tap.relayd import Options


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("latency", "latency", {}),
        ("first:100", "first", {"": "100"}),
        ("replace:old=a,new=b", "replace", {"old": "a", "new": "b"}),
        ("replace:old=a,new=", "replace", {"old": "a", "new": ""}),
        ("replace,old=a,new=b", "replace", {"old": "a", "new": "b"}),
        (r"replace:old=a\,b,new=c", "replace", {"old": "a,b", "new": "c"}),
        (r"deny:a\\", "deny", {"": "a\\"}),
        (r"deny:a\\,direction=up", "deny", {"": "a\\", "direction": "up"}),
        (r"deny:re:\d+\n\\\,", "deny", {"": "re:\\d+\\n\\,"}),
        ("deny:re:a=b", "deny", {"": "re:a=b"}),
        ("deny:=x", "deny", {"": "=x"}),
        ("deny:user=root", "deny", {"user": "root"}),
        ("deny:pattern=a=b", "deny", {"pattern": "a=b"}),
        ("capture:/a:b.pcapng,keep=5", "capture", {"": "/a:b.pcapng", "keep": "5"}),
        ("slicer:average-size=9", "slicer", {"average_size": "9"}),
        ("a.b-c_d:x", "a.b-c_d", {"": "x"}),
        ("deny:a\nb", "deny", {"": "a\nb"}),
    ],
)
def test_a_text(text: str, name: str, options: dict[str, str]) -> None:
    found = parse_filter(text)
    assert found == FilterSpec(name, options)
    assert parse_filter(str(found)) == found
    assert FILTER.type.load(text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a filter, as NAME, NAME:VALUE or NAME:key=value,key=value"),
        (":x", "expected a filter, as NAME"),
        ("a b:x", "expected a filter, as NAME"),
        ("replace=x", "expected a filter, as NAME"),
        ("first:", "expected a value, or key=value, after 'first:'"),
        ("first,", "expected a value, or key=value, after 'first,'"),
        ("replace:old=a,b,new=c", r"expected key=value, not 'b'; a comma in a value"),
        ("replace:old=a,", "expected key=value, not ''; a comma in a value"),
        ("replace:old=a,new=b,old=c", "old is given twice"),
        ("slicer:a-b=1,a_b=1", "a_b is given twice"),
    ],
)
def test_a_text_that_is_none(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as told:
        FILTER.parse(text)
    assert str(told.value).startswith(f"bad --filter {text!r}: {says}")
    assert "\n" not in str(told.value)


TEXTS = st.text(st.sampled_from("a,\\=:é\n0 ")) | st.text()
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@given(
    st.from_regex(r"[a-z0-9_.-]{1,9}", fullmatch=True),
    st.none() | TEXTS.filter(lambda text: bool(text) and "=" not in text),
    st.dictionaries(KEYS, TEXTS, max_size=4),
)
def test_every_filter_is_read_as_it_is_shown(
    name: str, value: str | None, options: dict[str, str]
) -> None:
    spec = FilterSpec(name, options if value is None else {"": value, **options})
    assert parse_filter(str(spec)) == spec
    assert list(parse_filter(str(spec)).options) == list(spec.options)


@given(st.text())
def test_any_text_is_a_filter_or_a_line(text: str) -> None:
    try:
        assert isinstance(parse_filter(text), FilterSpec)
    except ValueError as problem:
        assert len(str(problem).splitlines()) == 1


def test_a_table_is_not_escaped() -> None:
    found = load_filter(
        {"name": "slicer", "average_size": 9, "toxicity": 0.5, "x": r"\,", "y": True}
    )
    assert found.name == "slicer"
    assert found.options == {"average_size": 9, "toxicity": 0.5, "x": r"\,", "y": True}
    assert str(found) == r"slicer:average_size=9,toxicity=0.5,x=\\\,,y=on"


# -- files


def problems_of(toml: str) -> list[str]:
    content = json.dumps(tomllib.loads(toml)).encode()
    with pytest.raises(ConfigError) as told:
        configure(read_layers("-", BytesIO(content)))
    return str(told.value).splitlines()


WEB = '[tcp.web]\nlisten = "127.0.0.1:8080"\ndest = "127.0.0.1:80"\n'


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("5", "found 5, expected a filter, as NAME"),
        ('""', "found '', expected a filter, as NAME"),
        ("{}", 'found a table, expected name = "replace", or the like, in it'),
        ('{name = "a b"}', 'found a table, expected name = "replace"'),
        ('{name = "a:b"}', 'found a table, expected name = "replace"'),
        ("{name = 5}", 'found a table, expected name = "replace"'),
        ('{name = "a", "b-c" = 1}', "a table: there is no 'b-c' in a filter"),
        ('{name = "a", b = [1]}', "a table: b: expected a string, a number, true or"),
        ('{name = "a", b = {c = 1}}', "a table: b: expected a string, a number, true"),
    ],
)
def test_what_a_file_can_not_have(value: str, says: str) -> None:
    [line] = problems_of(f"{WEB}filter = {value}")
    assert line.startswith(f"standard input: tcp.web.filter: {says}")
    [line] = problems_of(f'{WEB}filter = ["latency", {value}]')
    assert line.startswith(f"standard input: tcp.web.filter[1]: {says}")


FILE = r"""
[defaults]
filter = "latency:100"
[tcp.web]
listen = "127.0.0.1:8080"
dest = "127.0.0.1:80"
filter = ["replace:old=a\\,b,new=c", {name = "deny", pattern = 're:a,\d'}]
[tcp.plain]
listen = "127.0.0.1:8081"
dest = "127.0.0.1:80"
filter = []
[udp.dns]
listen = "127.0.0.1:5353"
dest = "127.0.0.1:53"
[socks4.office]
listen = "127.0.0.1:1080"
filter = {name = "first", n = 9}
"""

SPECS: dict[str, list[FilterSpec]] = {
    "web": [
        FilterSpec("replace", {"old": "a,b", "new": "c"}),
        FilterSpec("deny", {"pattern": r"re:a,\d"}),
    ],
    "plain": [],
    "dns": [FilterSpec("latency", {"": "100"})],
    "office": [FilterSpec("first", {"n": 9})],
}


def test_each_kind_of_relay_has_them_and_is_written_so(tmp_path: Path) -> None:
    """In order; a relay's own have the say, and an empty list, too."""
    path = tmp_path / "f.toml"
    path.write_text(FILE)
    layers = read_layers(str(path))
    found = configure(layers)
    assert {each.name: list(each.filters) for each in found.relays} == SPECS
    path.write_text(as_toml(layers))
    assert r"re:a,\\d" in path.read_text(), "a table stays one"
    again = read_layers(str(path))
    assert configure(again) == found
    shown = {
        table.name: next(each for each in table.settings if each.key == "filter")
        for table in effective(again)
        if table.kind
    }
    assert shown["dns"].value == "latency:100"
    assert shown["web"].value == [
        r"replace:old=a\,b,new=c",
        {"name": "deny", "pattern": r"re:a,\d"},
    ]


def test_a_command_line_has_the_say_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(FILE)
    options = Options()
    options.parseOptions(
        ["--config", str(path), "--filter=first:1", "--filter", "deny:x"]
    )
    said = (FilterSpec("first", {"": "1"}), FilterSpec("deny", {"": "x"}))
    assert [each.filters for each in options.config.relays] == [said] * 4


@pytest.mark.parametrize("kind", ["tcp", "udp", "socks4"])
def test_there_may_be_so_many(kind: Kind) -> None:
    dest = "" if kind == "socks4" else 'dest = "127.0.0.1:80"\n'
    begin = f'[{kind}.a]\nlisten = "127.0.0.1:81"\n{dest}filter = '
    content = json.dumps(tomllib.loads(begin + str(["latency"] * MOST))).encode()
    found: Any = configure(read_layers("-", BytesIO(content))).relays[0]
    assert len(found.filters) == MOST == 16
    assert problems_of(begin + str(["latency"] * (MOST + 1))) == [
        f"standard input: {kind}.a.filter: 17 filters: a relay has at most 16"
    ]


def test_a_variable_may_stand_in_a_table_of_a_list() -> None:
    """Of filters, as of servers: `tcp.web.filter[1].pattern`."""
    toml = """
env = true
[tcp.web]
listen = "127.0.0.1:8080"
dest = ["127.0.0.1:80", {address = "${HOST}:80"}]
filter = ["deny:${WORD}", {name = "deny", pattern = "${WORD}"}]
"""
    content = json.dumps(tomllib.loads(toml)).encode()
    environ = {"HOST": "10.0.0.5", "WORD": "secret"}
    found: Any = configure(read_layers("-", BytesIO(content), environ)).relays[0]
    assert str(found.destinations[1]) == "10.0.0.5:80"
    assert [[*each.options.values()] for each in found.filters] == [["secret"]] * 2
    with pytest.raises(ConfigError) as told:
        configure(read_layers("-", BytesIO(content), {"HOST": "10.0.0.5"}))
    why = "there is no variable 'WORD' in the environment"
    assert str(told.value).splitlines() == [
        f"standard input: tcp.web.filter[{number}]: {why}" for number in (0, 1)
    ]


def test_an_error_speaks_of_a_table_as_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(FILE)
    given = [
        str(each)
        for section in read_layers(str(path)).sections
        for each in section.all("filter")
    ]
    assert r"filter = 'deny:pattern=re:a\\,\\d'" in given
    assert "filter = 'first:n=9'" in given

"""What `relayctl set` and `relayctl server` are told."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_settings import ALL
from relayd.ctl.assignments import Misspelt, server_name, settings, value

KEYS = sorted({row.key for row in ALL if row.key})
names = st.text(string.ascii_letters + string.digits + "._-", min_size=1)
anything = st.text(st.characters(codec="utf-8"))
plain = st.recursive(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]))
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1),
    lambda inner: st.lists(inner) | st.dictionaries(names, inner),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        *(("max_sessions=100", 100), ("max_sessions=1_000", 1000)),
        *(("idle_timeout=5m", "5m"), ("idle_timeout=300", 300), ("x=1.5", 1.5)),
        *(("half_close=false", False), ("half_close=off", False), ("open=on", True)),
        *(("max-sessions=100", 100), (" max_sessions = 100 ", 100)),
        # A port is easily taken for a number.
        *(("listen=8080", "8080"), ('listen="8080"', "8080"), ("userid=5", "5")),
        *(("listen=99999999", "99999999"), ("userid=true", "true")),
        ("dest=10.0.0.5:80", "10.0.0.5:80"),
        ("dest=[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("dest=unix:/run/a=b.sock", "unix:/run/a=b.sock"),
        ('dest=["a:1", "b:2"]', ["a:1", "b:2"]),
        ('dest={address = "a:1", weight = 2}', {"address": "a:1", "weight": 2}),
        ("dest=[]", []),
        ("dest=a:1,weight=2", "a:1,weight=2"),
        ("clients=allow 10.0.0.0/8", "allow 10.0.0.0/8"),
        ("hours=Mon-Fri 08:00-18:00", "Mon-Fri 08:00-18:00"),
        # A filter has commas, colons and equals signs of its own.
        ("filter=latency:latency=100,jitter=5", "latency:latency=100,jitter=5"),
        ("filter=replace:old=a\\,b,new=[c]", "replace:old=a\\,b,new=[c]"),
        ('filter=[{name = "first"}, "x"]', [{"name": "first"}, "x"]),
        *(("filter=5", "5"), ("filter=[]", []), ("filter=", None)),
        # What relayd is to refuse, it is to see.
        *(("max_sessions=0", 0), ("max_sessions=ten", "ten"), ("nosuch=5", 5)),
        # No values of JSON.
        *(("x=2026-12-24", "2026-12-24"), ("x=03:00:00", "03:00:00")),
        *(("x=inf", "inf"), ("x=nan", "nan"), ("x=[nan]", "[nan]")),
        # Not one value of TOML.
        *(("x=1, 2", "1, 2"), ("x=1,", "1,"), ("x=1 # one", "1 # one")),
        *(("x=1\ny = 2", "1\ny = 2"), ("x=1]\ny = [2", "1]\ny = [2")),
        *(("idle_timeout=", None), ("x= ", None), ('x=""', "")),
        ("x=" + "[" * 5000, "[" * 5000),
    ],
)
def test_values(word: str, found: Any) -> None:
    [(_, read)] = settings([word]).items()
    assert read == found
    assert type(read) is type(found)


def test_several_filters() -> None:
    words = ["filter=first:64", "filter=deny:a\\,b", 'filter={name = "latency"}']
    assert settings(words) == {
        "filter": ["first:64", "deny:a\\,b", {"name": "latency"}]
    }


def test_several() -> None:
    assert settings(["dest=a:1", "x=1", "dest=b:2", 'dest=["c:3", "d:4"]']) == {
        "dest": ["a:1", "b:2", "c:3", "d:4"],
        "x": 1,
    }


@pytest.mark.parametrize("word", ["", "dest", "=5", " =5"])
def test_what_is_no_assignment(word: str) -> None:
    with pytest.raises(Misspelt, match="expected key=value, such as"):
        settings([word])


def test_the_file_s_and_another() -> None:
    with pytest.raises(Misspelt, match="give no other dest with it"):
        settings(["dest=", "dest=a:1"])


@given(st.sampled_from([*KEYS, "nosuch"]), anything)
def test_any_text_is_some_value_of_json(key: str, text: str) -> None:
    found = value(key, text)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@given(plain)
def test_what_toml_can_say_is_read_as_that(written: Any) -> None:
    # A table on one line.
    text = json.dumps(written, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(written, list | dict):
        text = tomli_w.dumps({"x": [[written]]}, multiline_strings=False)
        text = " ".join(text.split()) if '"' not in text else text
        text = text.partition("= ")[2].strip()
        written = [[written]]
    assert value("nosuch", text) == written


@given(st.dictionaries(st.sampled_from(KEYS), names, min_size=1))
def test_keys_are_those_of_the_file(given_settings: dict[str, str]) -> None:
    words = [f"{key.replace('_', '-')}={text}" for key, text in given_settings.items()]
    assert list(settings(words)) == list(given_settings)


@given(names, st.text(min_size=1))
def test_the_relay_ends_at_the_first_slash(relay: str, server: str) -> None:
    assert server_name(f"{relay}/{server}") == (relay, server)


@pytest.mark.parametrize("name", ["", "web", "web/", "/10.0.0.5:80", "/"])
def test_what_is_no_server(name: str) -> None:
    with pytest.raises(Misspelt, match="expected NAME/SERVER"):
        server_name(name)

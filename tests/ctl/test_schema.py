"""`relayctl schema`: what it accepts, beside what the reader accepts."""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.readable import default_of
from relayd.configuring.sections import (
    DEFAULTS_KEYS,
    KINDS,
    LOG_KEYS,
    PROCESS_KEYS,
    RELAY_KEYS,
)
from relayd.core.errors import ConfigError
from relayd.core.setting_types import Setting
from relayd.ctl.example import RELAYS, example, sample
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.ctl.schema import schema
from relayd.ctl.texts import explained

SCHEMA = schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def accepts(document: Any) -> bool:
    """Whether the schema does."""
    return bool(VALIDATOR.is_valid(document))


def reads(document: Any) -> bool:
    """Whether the reader does, of the same as JSON."""
    try:
        configure(read_layers("-", io.BytesIO(json.dumps(document).encode()), {}))
    except ConfigError:
        return False
    return True


def relay_with(kind: str, **more: Any) -> dict[str, Any]:
    """A file with one relay, with more in its table."""
    own = next(each for each in RELAYS if each[0] == kind)[3]
    return {kind: {"a": {**own, **more}}}


def test_it_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert main(["schema"]) == Exit.DONE
    assert json.loads(capsys.readouterr().out) == SCHEMA


def test_it_accepts_the_example() -> None:
    found = tomllib.loads(example())
    assert accepts(found)
    assert reads(found)


def test_it_has_every_key_and_no_other() -> None:
    def keys(table: Mapping[str, Any]) -> set[str]:
        assert table["additionalProperties"] is False
        return {each.removesuffix("_file") for each in table["properties"]}

    top = SCHEMA["properties"]
    assert keys(SCHEMA) == {*PROCESS_KEYS, "env", "log", "defaults", *KINDS}
    assert keys(top["defaults"]) == set(DEFAULTS_KEYS)
    assert keys(top["log"]) == set(LOG_KEYS)
    for kind in KINDS:
        assert keys(SCHEMA["$defs"][kind]) == set(RELAY_KEYS[kind])


def test_every_key_is_explained() -> None:
    for kind in KINDS:
        for key, rows in RELAY_KEYS[kind].items():
            found = SCHEMA["$defs"][kind]["properties"][key]
            assert found["description"].startswith(explained(rows[0]))
            assert found.get("default") == default_of(rows[0])


@pytest.mark.parametrize(
    "document",
    [
        {"verbos": True},
        {"drain_timeout": -1},
        {"drain_timeout": "5 parsecs"},
        {"drain_timeout": True},
        {"max_descriptors": 0},
        {"max_descriptors": 63},
        {"max_descriptors": 1.5},
        {"transport": "fast"},
        {"quiet": "yes"},
        {"env": 1},
        {"tcp": 5},
        {"tcp": {"web": 5}},
        {"tcp": {"Web": {"listen": "1", "dest": "2"}}},
        {"tcp": {"x" * 65: {"listen": "1", "dest": "2"}}},
        {"tcp": {"web": {"listen": "1"}}},
        {"tcp": {"web": {"listen": [], "dest": "2"}}},
        {"tcp": {"web": {"dest": "2"}}},
        {"udp": {"dns": {"listen": "1"}}},
        {"udp": {"dns": {"listen": "1", "route": "a:b"}}},
        {"defaults": {"route": "a:b"}, "udp": {"dns": {"listen": "1"}}},
        {"defaults": {"max_age": 5}, "tcp": {"web": {"listen": "1"}}},
        {"tcp": {"web": {"listen": 80, "dest": "2"}}},
        {"tcp": {"web": {"listen": "1", "dest": "2", "udp_timeout": 5}}},
        {"defaults": {"dest": "2"}},
        relay_with("udp", udp_timeout=0),
        relay_with("udp", udp_rcvbuf="64Kib"),
        relay_with("udp", reply_cap=-1),
        relay_with("socks4", clients="10.0.0.0/8"),
        relay_with("socks4", clients=["refuse 10.0.0.0/8"]),
        relay_with("socks4", destinations=["allow "]),
        relay_with("socks4", bind_address="localhost"),
        relay_with("socks4", userid="a", userid_file="b"),
    ],
)
def test_what_both_refuse(document: dict[str, Any]) -> None:
    assert not accepts(document)
    assert not reads(document)


@pytest.mark.parametrize(
    "document",
    [
        {"tcp": {"web": {"listen": "1", "route": "a:b"}}},
        {"tcp": {"web": {"listen": "1", "sni": "=2"}}},
        {"defaults": {"route": "a:b"}, "tcp": {"web": {"listen": "1"}}},
        {"defaults": {"sni": ["=2"]}, "tcp": {"web": {"listen": "1"}}},
        relay_with("tcp", dest={"address": "1", "pool": "a"}, sni="=a"),
    ],
)
def test_what_has_servers_otherwise_is_accepted_by_both(document: Any) -> None:
    assert accepts(document)
    assert reads(document)


def test_a_variable_may_become_anything() -> None:
    document = {"env": True, "drain_timeout": "${TIME}", "transport": "${HOW}"}
    assert accepts({**document, **relay_with("tcp", dest="${SERVER}")})


#: Values of all kinds, near those that settings have.
TEXTS = st.one_of(
    st.text(max_size=8),
    st.from_regex(r"\A[-+ ]?[0-9]{0,3}\.?[0-9]{0,3}(e-?[0-9])?[ \n]?\Z"),
    st.from_regex(r"\A[0-9.]{1,4}(ms|s|m|h|B|kB|KiB|MiB|GB)\Z"),
    st.from_regex(r"\A(allow|deny) {1,2}[0-9.*/:a-z]{0,8}\Z"),
    st.from_regex(r"\A[0-9]{1,3}(\.[0-9]{1,3}){3}(:[0-9]+)?\Z"),
)
NUMBERS = st.one_of(
    st.integers(-2, 10**10),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e8, 1e308]),
)
SINGLE = st.one_of(st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(SINGLE, st.lists(SINGLE, max_size=3))


def good(row: Setting[Any]) -> Any:
    """A value that can be read."""
    found = default_of(row)
    if row.word:
        return [f"{row.word} 10.0.0.0/8"]
    return sample(row) if found in (None, []) else found


@given(st.data())
def test_what_the_reader_accepts_it_accepts(data: st.DataObject) -> None:
    """Whatever the value; and so it refuses nothing that the reader takes."""
    kind = data.draw(st.sampled_from(KINDS))
    keys = {**RELAY_KEYS[kind], **PROCESS_KEYS}
    key = data.draw(st.sampled_from(sorted(keys)))
    row = keys[key][0]
    value = data.draw(st.one_of(VALUES, st.just(good(row))))
    if row.process:
        document = {key: value, **relay_with("tcp")}
    else:
        document = relay_with(kind, **{key: value})
    if reads(document):
        assert accepts(document)


#: What some do nothing without.
NEEDED: dict[str, dict[str, Any]] = {
    "queue": {"max_sessions": 1},
    "client_prefix": {"max_connects_per_client": "10/1"},
    "max_deciding": {"route": "myroutes:route"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_good_values_are_accepted_by_both(kind: str) -> None:
    """Of every key; so the test above compares something."""
    found: Any = RELAY_KEYS
    for key, rows in found[kind].items():
        if key != "open" and rows[0].key not in ("listen", "dest", "external_address"):
            document = relay_with(kind, **{**NEEDED.get(key, {}), key: good(rows[0])})
            assert reads(document), key
            assert accepts(document), key

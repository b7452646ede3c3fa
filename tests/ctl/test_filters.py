"""`relayctl filter`: changes of the setting of that name, of what was read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relayd.ctl.exits import Exit
from relayd.ctl.filters import text_of
from relayd.ctl.main import main
from tests.support.control import FakeRelayd
from tests.support.control_answers import RELAY

Captured = pytest.CaptureFixture[str]

WEB = "/v1/relays/web"


def has(relayd: FakeRelayd, value: Any, in_file: Any = ...) -> None:
    """A relay with these filters.

    :param in_file: what the file says, if that was changed.
    """
    settings = {"filter": {"value": value, "source": "run time"}}
    changes = [
        {"relay": "dns", "server": None, "key": "filter", "file": "first:1"},
        {"relay": "web", "server": "a", "key": "filter", "file": "first:1"},
        {"relay": "web", "server": None, "key": "dest", "file": "a:1"},
    ]
    if in_file is not ...:
        change = {"relay": "web", "server": None, "key": "filter", "file": in_file}
        changes.append(change)
    relayd.answers[f"GET {WEB}"] = (200, {**RELAY, "settings": settings})
    relayd.tags[f"GET {WEB}"] = '"7-1"'
    relayd.answers["GET /v1/diff"] = (200, {"changes": changes})
    relayd.answers[f"PATCH {WEB}"] = (200, RELAY)


def sent(relayd: FakeRelayd) -> Any:
    """The filters that were sent, for what was read."""
    method, path, body = relayd.last
    assert (method, path) == ("PATCH", WEB)
    assert relayd.headers[-1]["If-Match"] == '"7-1"'
    assert set(body["settings"]) == {"filter"}
    return body["settings"]["filter"]


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (
            ["first:5", "latency:latency=100,jitter=5"],
            ["first:5", "latency:latency=100,jitter=5"],
        ),
        ("first:5", ["first:5"]),
        (
            [{"name": "deny", "pattern": "a,b\\", "toxicity": 0.5, "x": True}, "first"],
            ["deny:pattern=a\\,b\\\\,toxicity=0.5,x=on", "first"],
        ),
        (["what is: this?\x1b"], ["what is: this?\\x1b"]),
    ],
)
def test_filters_are_listed(
    relayd: FakeRelayd, capsys: Captured, value: Any, lines: list[str]
) -> None:
    has(relayd, value)
    assert main(["filter", "list", "web"]) == Exit.DONE
    said = capsys.readouterr()
    assert said.out.splitlines() == lines
    assert said.err == ""
    assert main(["filter", "list", "web", "--json"]) == Exit.DONE
    many = value if isinstance(value, list) else [value]
    assert json.loads(capsys.readouterr().out) == {"filters": many}


@pytest.mark.parametrize("value", [None, [], ""])
def test_there_are_none(relayd: FakeRelayd, capsys: Captured, value: Any) -> None:
    has(relayd, value)
    assert main(["filter", "list", "web"]) == Exit.DONE
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "no filters\n")


def test_they_are_added_at_the_end(relayd: FakeRelayd, capsys: Captured) -> None:
    """What is there stays as it is written."""
    there = {"name": "deny", "pattern": "a,b"}
    has(relayd, there)
    words = ("latency:latency=1", "replace:old=a\\,b,new=c")
    assert main(["filter", "add", "web", *words]) == Exit.DONE
    assert sent(relayd) == [there, *words]
    said = capsys.readouterr().out.splitlines()
    assert said == ["deny:pattern=a\\,b", *words]


@pytest.mark.parametrize(
    "text",
    [
        "latency",
        "latency:latency=100,jitter=5",
    ],
)
def test_one_is_removed(relayd: FakeRelayd, capsys: Captured, text: str) -> None:
    there = [
        "first:5",
        {"name": "latency", "latency": 100, "jitter": 5},
        {"name": "deny", "pattern": "latency"},
    ]
    has(relayd, there)
    assert main(["filter", "remove", "web", text]) == Exit.DONE
    assert sent(relayd) == [there[0], there[2]]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_of_several_of_one_name_it_is_said_which(
    relayd: FakeRelayd, capsys: Captured
) -> None:
    has(relayd, ["latency:1", "latency:2,direction=up", "first"])
    assert main(["filter", "remove", "web", "latency"]) == Exit.INVALID
    assert capsys.readouterr().err == (
        "there are 2 filters 'latency': say which: 'latency:1',"
        " 'latency:2,direction=up'\n"
    )
    assert main(["filter", "remove", "web", "latency:1"]) == Exit.DONE
    assert sent(relayd) == ["latency:2,direction=up", "first"]


def test_of_two_that_are_the_same_one_is_removed(relayd: FakeRelayd) -> None:
    has(relayd, ["first", "latency:1", "first"])
    assert main(["filter", "remove", "web", "first"]) == Exit.DONE
    assert sent(relayd) == ["first", "latency:1"]
    has(relayd, ["latency:1", "first", "latency:1"])
    assert main(["filter", "remove", "web", "latency"]) == Exit.DONE
    assert sent(relayd) == ["latency:1", "first"]


@pytest.mark.parametrize(
    ("value", "there"), [([], "none"), (["first:5", "deny:x"], "'first:5', 'deny:x'")]
)
def test_one_that_there_is_not(
    relayd: FakeRelayd, capsys: Captured, value: Any, there: str
) -> None:
    has(relayd, value)
    assert main(["filter", "remove", "web", "first:6"]) == Exit.NOT_FOUND
    assert capsys.readouterr().err == (f"web has no filter 'first:6': it has {there}\n")
    assert all(method == "GET" for method, *_ in relayd.asked)


@pytest.mark.parametrize(
    ("in_file", "says"), [(None, None), ([], None), ("first:5", []), (..., [])]
)
def test_what_the_file_says_is_no_change(
    relayd: FakeRelayd, in_file: Any, says: Any
) -> None:
    """A filter that is added and removed again leaves nothing behind."""
    has(relayd, ["latency:1"], in_file)
    assert main(["filter", "remove", "web", "latency"]) == Exit.DONE
    assert sent(relayd) == says


def test_what_relayd_says_of_it_is_told(relayd: FakeRelayd, capsys: Captured) -> None:
    has(relayd, [])
    for status, code in ((412, Exit.REFUSED), (422, Exit.INVALID)):
        relayd.answers[f"PATCH {WEB}"] = (status, {"problems": ["a line"]})
        assert main(["filter", "add", "web", "first"]) == code
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", "a line\n")
    assert main(["filter", "list", "none"]) == Exit.NOT_FOUND


@pytest.mark.parametrize("settings", [None, [], {}, {"filter": 5}])
def test_one_that_knows_no_filters(
    relayd: FakeRelayd, capsys: Captured, settings: Any
) -> None:
    relayd.answers[f"GET {WEB}"] = (200, {**RELAY, "settings": settings})
    assert main(["filter", "list", "web"]) == Exit.FAILED
    assert capsys.readouterr().err == "web: the relayd that runs has no filters\n"


def test_many_are_not_all_named(relayd: FakeRelayd, capsys: Captured) -> None:
    has(relayd, [f"first:{number}" for number in range(12)])
    assert main(["filter", "remove", "web", "deny"]) == Exit.NOT_FOUND
    assert capsys.readouterr().err.endswith("'first:8', 'first:9', ...\n")


def test_what_is_no_filter_is_shown_all_the_same() -> None:
    assert text_of(5) == "5"
    assert text_of({"x": 1}) == "{'x': 1}"

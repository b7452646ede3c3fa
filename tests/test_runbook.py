"""The operator's page says what each ending, reason and metric means, and no other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from relayd.configuring.address_settings import ALL
from relayd.core.errors import REASONS
from relayd.core.flows import FlowFacts
from relayd.core.session import Ending
from relayd.ctl.commands import relayctl
from relayd.datagrams.filter_chain import FILTER_FAILED, FILTER_FULL, FILTERED
from relayd.observing import metrics
from relayd.observing.readings import ProcessReading, RuleCounts

PACKAGE = Path(__file__).parent.parent / "relayd"
PAGE = (PACKAGE.parent / "docs" / "operating.md").read_text()
README = (PACKAGE.parent / "README.md").read_text()


def section(heading: str) -> str:
    """What is below a heading."""
    found = re.search(
        rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert found is not None, heading
    return found[1]


def rows(heading: str) -> list[tuple[str, list[str]]]:
    """Of each row of a section's table the first cell, and the others."""
    table = re.findall(r"^\| `([^`]+)` \| (.*) \|$", section(heading), re.MULTILINE)
    assert table
    return [(name, cells.split(" | ")) for name, cells in table]


def names(heading: str) -> list[str]:
    return [name for name, _ in rows(heading)]


def test_each_ending_is_there_once() -> None:
    assert sorted(names("How a session has ended")) == sorted(e.word for e in Ending)


def test_each_ending_of_a_flow_is_there_once() -> None:
    told = str(FlowFacts.__doc__).partition(":ivar ending:")[2].partition(":ivar")[0]
    words = sorted(re.findall(r"`(\w+)`", told))
    assert len(words) == 9
    text = section("How a session has ended").partition("A flow of UDP ends")[2]
    for page in (text, README.partition("\n`ending` is")[2].partition(". ")[0]):
        said = re.findall(r"`([a-z_]+)`", page)
        assert [word for word in words if said.count(word) != 1] == []


def test_each_reason_is_there_once() -> None:
    assert sorted(names("Why a client is refused")) == sorted(REASONS)


@pytest.mark.parametrize(
    "heading", ["How a session has ended", "Why a client is refused"]
)
def test_each_says_what_it_means_and_what_to_do(heading: str) -> None:
    for name, cells in rows(heading):
        assert [bool(each.strip()) for each in cells] == [True, True], name


def metric_names() -> set[str]:
    """As Prometheus has them: with what their kind appends."""
    found = set()
    families = (*metrics.STREAMS, *metrics.SERVERS, metrics.REFUSED, *metrics.DATAGRAMS)
    reading = ProcessReading(
        *({}, 0, 0.0, 0.0, 0, 0.0, 0),
        stopping=False,
        loaded_at=0.0,
        rules=RuleCounts(0, 0),
    )
    process = metrics._process(reading)
    for each in (*(family._new() for family in families), *process):
        suffix = {"counter": "_total", "info": "_info"}.get(each.type, "")
        found.add(f"{each.name}{suffix}")
    return found


def test_each_metric_is_there_once() -> None:
    assert sorted(names("What the metrics say")) == sorted(metric_names())


def test_each_word_for_a_dropped_datagram_is_there() -> None:
    text = section("What the metrics say")
    used = {
        word
        for path in (PACKAGE / "datagrams").glob("*.py")
        for word in re.findall(r'dropped\["(\w+)"\]', path.read_text())
    }
    used |= {FILTERED, FILTER_FULL, FILTER_FAILED}
    assert len(used) > 8
    rest = {word for word in used if not word.startswith("send_")} - set(REASONS)
    assert {word for word in rest if f"`{word}`" not in text} == set()


def test_keys_of_the_file_are_keys() -> None:
    """What looks like a setting in the last column is one."""
    keys = {row.key for row in ALL}
    said = {
        word
        for heading in ("How a session has ended", "Why a client is refused")
        for _, cells in rows(heading)
        for word in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", cells[-1])
        if not word.startswith("relayd_")
    }
    endings = {each.word for each in Ending}
    assert said - endings <= keys
    assert said


COMMANDS = sorted(set(re.findall(r"`relayctl ([^`|]+?)`", PAGE.replace("\n", " "))))


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_one(line: str) -> None:
    """Its options are right; some are mentioned without what they take."""
    name, *args = shlex.split(line.partition("&&")[0])
    command = relayctl.get_command(click.Context(relayctl), name)
    assert command is not None, line
    try:
        command.make_context(name, args)
    except click.UsageError as problem:
        said = problem.format_message()
        assert said.startswith("Missing") or "requires an argument" in said, said

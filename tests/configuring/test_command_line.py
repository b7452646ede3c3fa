"""The options of a command line: whose listeners, destinations and names they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_grammar import HostPort
from relayd.configuring.address_settings import DEST, LISTEN, NAME
from relayd.configuring.command_line import relay_sections
from relayd.configuring.given import Given, RelaySection
from relayd.core.errors import ConfigError


def refusal(parse: Callable[..., object], *args: Any) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    message = str(caught.value)
    assert message.isprintable()
    return message


def listen(port: int) -> Given:
    """`--listen`, and a port."""
    return Given(LISTEN, str(port), HostPort(None, port))


def dest(port: int) -> Given:
    """`--dest`, and a port."""
    return Given(DEST, str(port), HostPort(None, port))


def name(text: str) -> Given:
    """`--name`, and the name."""
    return Given.of(NAME, text)


def ports(relays: list[RelaySection]) -> list[tuple[int, list[int]]]:
    """Each listener's port, and its destinations'."""
    found = []
    for each in relays:
        [where, *own] = each.given
        assert where.setting is LISTEN
        assert {one.setting for one in own} <= {DEST}
        found.append((where.value.port, [one.value.port for one in own]))
    return found


def test_one_listener_and_its_destinations() -> None:
    """In the order given; with one listener they may stand before it."""
    assert ports(relay_sections([listen(1), dest(2)])) == [(1, [2])]
    assert ports(relay_sections([dest(2), listen(1)])) == [(1, [2])]
    assert ports(relay_sections([dest(3), listen(1), dest(2)])) == [(1, [3, 2])]
    assert ports(relay_sections([listen(1), dest(2), dest(2)])) == [(1, [2, 2])]


def test_several_listeners_own_what_follows_them() -> None:
    """Two that are written alike stay two."""
    given_ = [listen(1), dest(2), dest(3), listen(1), dest(4)]
    assert ports(relay_sections(given_)) == [(1, [2, 3]), (1, [4])]


def test_a_destination_without_a_listener_is_quoted() -> None:
    """Which one it is, and what to do about it."""
    for given_, message in (
        ([dest(2), dest(3)], "--dest '2' has no --listen"),
        ([dest(2), listen(1), listen(4)], "--dest '2' stands before the first"),
        ([dest(2), listen(1), dest(3), listen(4), dest(5)], "--dest '2' stands"),
    ):
        assert refusal(relay_sections, given_).startswith(message)


def test_a_name_belongs_to_the_listener_after_it() -> None:
    """One that has none is numbered later; a single listener's may stand anywhere."""
    relays = relay_sections([listen(1), dest(2), name("web"), listen(3), dest(4)])
    assert [relay.name for relay in relays] == [None, "web"]
    for given_ in (
        [name("web"), dest(2), listen(1)],
        [dest(2), listen(1), name("web")],
        [listen(1), name("web"), dest(2)],
    ):
        [relay] = relay_sections(given_)
        assert (relay.name, ports([relay])) == ("web", [(1, [2])])


def test_a_name_that_can_not_be_kept_is_quoted() -> None:
    """It is somebody else's, or a second one, or nobody's."""
    for given_, message in (
        (
            [name("a"), listen(1), dest(2), name("a"), listen(3), dest(4)],
            "bad --name 'a': another relay has it already; give each relay its own",
        ),
        (
            [listen(1), dest(2), name("a"), name("b")],
            "--listen '1' has two names, 'a' and 'b': give one",
        ),
        ([name("a"), dest(2)], "--name 'a' has no --listen"),
        (
            [listen(1), dest(2), listen(3), dest(4), name("a")],
            "--name 'a' stands after the last of several --listen: put each --name",
        ),
    ):
        assert refusal(relay_sections, given_).startswith(message)


def test_datagrams_go_to_datagrams() -> None:
    """A listener's destinations are of its own kind, each of them."""
    for texts in (("udp:1", "udp:2", "3"), ("1", "2", "udp:3")):
        options = [Given.of(LISTEN, texts[0])]
        options += [Given.of(DEST, text) for text in texts[1:]]
        assert refusal(relay_sections, options).startswith(
            f"--listen '{texts[0]}' can't be relayed to --dest '{texts[2]}': datagrams"
        )
        [relay] = relay_sections(options[:2])
        assert relay.kind == ("udp" if texts[0] == "udp:1" else "tcp")


@given(st.lists(st.booleans(), max_size=8))
def test_any_order_of_options_is_paired_or_refused(kinds: list[bool]) -> None:
    """Nothing is lost, doubled or reordered."""
    if not kinds:
        assert relay_sections([]) == []
        return
    given_ = [listen(i) if kind else dest(i) for i, kind in enumerate(kinds)]
    listeners = [i for i, kind in enumerate(kinds) if kind]
    try:
        paired = ports(relay_sections(given_))
    except ConfigError:
        # What has an answer is not refused: one that leads.
        assert not listeners or (len(listeners) > 1 and not kinds[0])
    else:
        assert [port for port, _ in paired] == listeners
        served = [port for _, own in paired for port in own]
        assert served == [i for i, kind in enumerate(kinds) if not kind]
        if len(paired) > 1:
            assert all(port < each for port, own in paired for each in own)

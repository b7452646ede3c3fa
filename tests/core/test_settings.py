"""The table of settings: its types, and what its rows may rely on."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_settings import ALL, RELAYD, SOCKS4
from relayd.core import settings
from relayd.core.errors import ConfigError
from relayd.core.process_settings import ACCESS_LOG, TRANSPORT
from relayd.core.setting_types import (
    TIMEOUT_LIMIT,
    Choice,
    Count,
    Flag,
    IPv4,
    Ratio,
    Seconds,
    Setting,
    Size,
)
from relayd.core.settings import (
    BACKLOG,
    BIND_ADDRESS,
    IDLE_TIMEOUT,
    MAX_BINDS,
    RECEIVE_BUFFER_LIMIT,
    REPLY_CAP,
    UDP_RCVBUF,
    UDP_TIMEOUT,
)
from tests.support.trees import MODULES, tree_of


def refusal(parse: Callable[[str], object], text: str) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.isprintable()
    return message


SIZES = "or a size such as 64KiB or 10MB"

# -- types


def test_seconds() -> None:
    """Whole numbers, fractions, and 0 for those who want no limit."""
    for text, value in (
        ("0", 0.0),
        ("10", 10.0),
        ("0.25", 0.25),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("100000000", TIMEOUT_LIMIT),
        ("250ms", 0.25),
        ("10s", 10.0),
        ("1.5m", 90.0),
        ("1h", 3600.0),
    ):
        assert IDLE_TIMEOUT.parse(text) == value


def test_what_is_no_timeout_is_refused() -> None:
    """With the option, the text, and what is expected."""
    bad = [
        "",
        "x",
        "10d",
        "s",
        "1e3s",
        "-1s",
        "10 s",
        "-1",
        "-0.001",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "0x10",
    ]
    bad += ["100000001", "1,5", "1 0", "10\n20", "1_0", "\u0661"]
    for text in bad:
        assert refusal(IDLE_TIMEOUT.parse, text) == (
            f"bad --idle-timeout {text!r}: expected seconds, from 0 to 100000000,"
            " or a time such as 250ms, 10s, 5m or 1h"
        )


def test_a_timeout_that_can_not_be_never() -> None:
    """A flow that never expires would keep its port."""
    assert UDP_TIMEOUT.parse("0.5") == 0.5
    for text in ("0", "0.0", "-0", "soon", "100000001"):
        assert refusal(UDP_TIMEOUT.parse, text) == (
            f"bad --udp-timeout {text!r}: expected seconds, more than 0,"
            " up to 100000000, or a time such as 250ms, 10s, 5m or 1h"
        )


@given(st.floats(0, TIMEOUT_LIMIT))
def test_every_timeout_in_range_is_read_as_it_is_shown(value: float) -> None:
    assert Seconds().parse(repr(value)) == value
    assert Seconds().parse(Seconds().show(value)) == value


@given(st.text() | st.floats().map(str) | st.text("0123456789.e-+_ infa"))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    """Nothing but a finite number in range gets through."""
    for row, most in ((IDLE_TIMEOUT, TIMEOUT_LIMIT), (REPLY_CAP, math.inf)):
        try:
            value = row.parse(text)
        except ConfigError:
            assert repr(text) in refusal(row.parse, text)
        else:
            assert math.isfinite(value)
            assert 0 <= value <= most


def test_a_ratio() -> None:
    assert REPLY_CAP.parse("2.5") == 2.5
    for text in ("", "x", "-1", "inf", "nan", "1_0", "\u0661"):
        assert refusal(REPLY_CAP.parse, text) == (
            f"bad --reply-cap {text!r}: expected a number from 0 up"
        )


def test_what_is_no_count_is_refused() -> None:
    """With the text, and what is expected."""
    bad = ["", "x", "0", "-1", "+1", "1.0", "1e3", " 1", "1_0", "9" * 5000]
    bad += ["²", "\u0663"]  # digits, but not of a number that anyone writes here
    for row, above, expected in (
        (BACKLOG, "65536", "a number from 1 to 65535"),
        (MAX_BINDS, "10000000", "a number from 1 to 9999999"),
        (
            UDP_RCVBUF,
            "1073741824",
            "1 to 1073741823 bytes, or a size such as 64KiB or 10MB",
        ),
    ):
        for text in [*bad, above]:
            assert refusal(row.parse, text) == (
                f"bad --{row.name} {text!r}: expected {expected}"
            )


@given(st.integers(-10, 2 * RECEIVE_BUFFER_LIMIT))
def test_a_count(number: int) -> None:
    """Exactly the numbers in range are taken."""
    for most in (8, 65535, RECEIVE_BUFFER_LIMIT):
        kind = Count(most)
        if 1 <= number <= most:
            assert kind.parse(kind.show(number)) == number
        else:
            with pytest.raises(
                ValueError, match=f"^expected a number from 1 to {most}$"
            ):
                kind.parse(str(number))


def test_an_ipv4_address() -> None:
    """And nothing that stands for one."""
    for text in ("192.0.2.1", "0.0.0.0", "255.255.255.255"):
        assert BIND_ADDRESS.parse(text) == text
    for text in (
        *("", "x", "::1", "::ffff:192.0.2.1", "192.0.2", "192.0.2.01", "192.0.2.1/32"),
        *("192.0.2.1:80", " 192.0.2.1", "192.0.2.1\n", "3221225985", "localhost"),
    ):
        assert refusal(BIND_ADDRESS.parse, text) == (
            f"bad --bind-address {text!r}: expected an IPv4 address such as 192.0.2.1"
        )


def test_a_choice() -> None:
    for text in ("auto", "plane", "twisted"):
        assert TRANSPORT.parse(text) == text
    for text in ("", "Plane", "auto "):
        assert refusal(TRANSPORT.parse, text) == (
            f"bad --transport {text!r}: expected auto, plane or twisted"
        )


def test_a_flag_is_written_on_or_off() -> None:
    """Where it is written: its option has no value."""
    for text, value in (("on", True), ("off", False)):
        assert Flag().parse(text) is value
        assert Flag().show(value) == text
    with pytest.raises(ValueError, match="^expected on or off$"):
        Flag().parse("yes")


@pytest.mark.parametrize(
    "kind",
    [
        Seconds(),
        Seconds(never=False),
        Count(),
        Size(9),
        Ratio(),
        IPv4(),
        Flag(),
    ],
)
def test_a_refusal_says_what_the_type_describes(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"^expected {re.escape(kind.describe())}$"):
        kind.parse("?")


@pytest.mark.parametrize(
    "kind", [Seconds(), Seconds(never=False), Count(), Size(9), Ratio()]
)
def test_a_number_says_its_bounds_and_unit(kind: Any) -> None:
    """For a schema, or a manual page."""
    assert kind.parse(kind.show(kind.maximum)) == kind.maximum
    if kind == Seconds(never=False):
        assert kind.parse("1e-9") > kind.minimum == 0
    else:
        assert kind.parse(kind.show(kind.minimum)) == kind.minimum
    assert kind.unit in ("", "seconds", "bytes")
    assert kind.unit in kind.describe()


# -- as a file has them


KINDS: list[Any] = [
    *(Seconds(), Seconds(never=False), Count(), Size(1 << 40), Ratio(), IPv4(), Flag()),
    *(TRANSPORT.type, ACCESS_LOG.type),
]

#: What TOML and JSON may have for a value.
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 0xF << 20_000])
    | st.floats()
    | st.text()
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.lists(st.integers())
    | st.dictionaries(st.text(), st.integers())
)


@given(PLAIN)
def test_any_value_of_a_file_is_read_or_refused(value: object) -> None:
    """A refusal says what is expected, and nothing else is raised."""
    for kind in KINDS:
        try:
            read = kind.load(value)
        except ValueError as problem:
            assert str(problem).startswith("expected ")
            assert str(problem).isprintable()
        else:
            assert isinstance(read, bool | int | float | str)
            if isinstance(read, float):
                assert math.isfinite(read)


@given(st.floats(0, TIMEOUT_LIMIT) | st.integers(0, int(TIMEOUT_LIMIT)))
def test_a_number_of_seconds(value: float) -> None:
    assert Seconds().load(value) == value
    assert type(Seconds().load(value)) is float
    assert Ratio().load(value) == value


def test_a_string_is_read_as_on_the_command_line() -> None:
    for kind, text, value in (
        (Seconds(), "250ms", 0.25),
        (Seconds(), "10", 10.0),
        (Size(1 << 20), "64KiB", 65536),
        (Size(1 << 20), "64kB", 64000),
        (Size(1 << 20), "0.5KiB", 512),
        (Size(1 << 20), "7", 7),
        (IPv4(), "192.0.2.1", "192.0.2.1"),
        (TRANSPORT.type, "plane", "plane"),
    ):
        assert kind.load(text) == value  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((Seconds(), value) for value in (True, -1, -0.5, math.nan, math.inf, None)),
        *((Seconds(), value) for value in (10**400, "1d", "", "1 s", "s", [1])),
        (Seconds(never=False), 0),
        (Seconds(never=False), "0ms"),
        *((Count(), value) for value in (True, 1.0, "1", 0, -1, 10**400, None)),
        *((Size(9), value) for value in (True, 1.0, 0, 10, "10", "1KiB", "0.5kB")),
        *((Size(9), value) for value in ("1B", "KiB", "1e3kB", "1" * 5000 + "kB")),
        *((Ratio(), value) for value in (True, -1, math.nan, math.inf, "1", 10**400)),
        *((Flag(), value) for value in (0, 1, "on", "true", None)),
        *((IPv4(), value) for value in (1, "::1", None)),
        *((TRANSPORT.type, value) for value in (1, "x", None)),
    ],
)
def test_what_is_none_in_a_file(kind: Any, value: object) -> None:
    with pytest.raises(ValueError, match="^expected "):
        kind.load(value)


def test_a_port_that_is_no_string_is_shown_as_one() -> None:
    with pytest.raises(ValueError, match=r'as a string: "8080"$'):
        ACCESS_LOG.type.load(8080)
    with pytest.raises(ValueError, match="as a string$"):
        ACCESS_LOG.type.load(8080.0)


@given(st.integers(1, 1 << 30))
def test_every_size_is_read_as_it_is_shown(value: int) -> None:
    kind = Size(1 << 30)
    assert kind.load(kind.show(value)) == kind.load(value) == value


# -- rows


@pytest.mark.parametrize("row", ALL, ids=lambda row: f"{row.name}-{row.kinds[0]}")
def test_a_row_is_whole(row: Setting[Any]) -> None:
    """A program can read it, and so can a person."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.name)
    flag_that_is_on = row.is_flag and row.default is True
    assert row.option == (f"no-{row.name}" if flag_that_is_on else row.name)
    assert row.kinds
    assert set(row.kinds) <= {"tcp", "udp", "socks4"}
    assert row.group in settings.GROUPS
    assert row.type.describe()
    # A sentence, in ASCII for every locale, and in one cell of README's tables.
    for text in filter(None, (row.help, row.off)):
        assert re.fullmatch(r"[A-Z].*\.", text)
        assert text.isascii()
        assert "|" not in text
    assert bool(row.off) == flag_that_is_on, "a flag that is on says what off does"
    if not (row.is_flag or row.repeatable or row.default is None):
        assert row.parse(row.shown_default) == row.default, "a default is in its bounds"
    if row.default is None:
        assert row.otherwise


@pytest.mark.parametrize("rows", [RELAYD, SOCKS4], ids=["relayd", "socks4"])
def test_no_two_rows_of_a_command_line_have_one_name(
    rows: tuple[Setting[Any], ...],
) -> None:
    for names in (
        [row.option for row in rows],
        [row.short for row in rows if row.short],
        [row.field for row in rows if not row.repeatable],
    ):
        assert len(set(names)) == len(names)


def test_the_whole_table_is_on_the_command_lines() -> None:
    assert set(RELAYD) | set(SOCKS4) == set(ALL)
    assert set(settings.TABLE) < set(ALL)


def test_a_choice_has_the_words_of_its_type() -> None:
    assert isinstance(TRANSPORT.type, Choice)
    assert TRANSPORT.type.describe() == "auto, plane or twisted"
    assert TRANSPORT.type.placeholder == "auto|plane|twisted"


FIELDS = {row.field for row in ALL}


def is_written_out(value: ast.expr | None) -> bool:
    """Whether a default is a literal; None is no value of a setting."""
    if isinstance(value, ast.Constant):
        return value.value is not None
    return isinstance(value, ast.BinOp)


def repeated_defaults(tree: ast.Module) -> list[str]:
    """Arguments and fields with a setting's name whose default is written out."""
    found: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            takes = node.args
            names = [each.arg for each in [*takes.posonlyargs, *takes.args]]
            # Arguments without a default come first.
            missing = len(names) - len(takes.defaults)
            found += zip(names[missing:], takes.defaults, strict=True)
            keywords = [each.arg for each in takes.kwonlyargs]
            found += zip(keywords, takes.kw_defaults, strict=True)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, node.value))
    return [
        f"{name} = {ast.unparse(value)}"
        for name, value in found
        if value is not None and name in FIELDS and is_written_out(value)
    ]


def test_a_default_stands_in_its_row_and_nowhere_else() -> None:
    # The options of a filter are its own, even if a setting has the same name.
    found = {
        name: repeated
        for name in MODULES
        if not name.startswith("filters.")
        and (repeated := repeated_defaults(tree_of(name)))
    }
    assert not found


def test_that_rule_finds_what_it_is_for() -> None:
    source = """
def listen(address, backlog=4096): ...
class Factory:
    def __init__(self, *, idle_timeout: float = 3600.0, max_binds=1 << 8): ...
class Settings:
    bind: bool = True
    transport: str | None = None
    drain_timeout: float = process_settings.DRAIN_TIMEOUT.default
    other: int = 3
"""
    assert sorted(repeated_defaults(ast.parse(source))) == [
        "backlog = 4096",
        "bind = True",
        "idle_timeout = 3600.0",
        "max_binds = 1 << 8",
    ]

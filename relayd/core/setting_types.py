"""What a setting is: a row of the table of settings, and the types that rows have.

A :class:`Setting` is read by programs.  The command lines are made from it: the option,
its check, the line that says what is wrong, and the help.  Its type reads a value as it
is written (:meth:`Type.parse`) and says what is expected (:meth:`Type.describe`).

The rows are in :mod:`relayd.core.settings`; those that say where (addresses, rules),
whose grammars are not the core's, in :mod:`relayd.configuring.address_settings`.
"""

from __future__ import annotations

import ipaddress
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast, get_args

import attrs

from relayd.core.errors import ConfigError
from relayd.core.units import SIZES, TIMES, load_number, number, with_unit

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: What a setting may be about.
Kind = Literal["tcp", "udp", "socks4"]

#: Those whose sessions are streams, and all of them.
STREAMS: tuple[Kind, ...] = ("tcp", "socks4")
ALL_KINDS: tuple[Kind, ...] = ("tcp", "udp", "socks4")

#: The longest timeout, in seconds: three years, well within any clock.
TIMEOUT_LIMIT = 100_000_000.0

#: A value as it is in a configuration file: what TOML and JSON have in common.
Plain = str | int | float | bool | dict[str, Any]


class Type(Protocol[T_co]):
    """How a setting is written.

    Types of numbers have a `minimum`, a `maximum` and a `unit`, too, which is empty for
    a plain number.

    :ivar placeholder: what stands for a value in the help; empty if there is none.
    """

    @property
    def placeholder(self) -> str: ...

    def parse(self, text: str) -> T_co:
        """The value.

        :raises ValueError: it is none; the message says what is expected.
        """

    def load(self, value: object) -> T_co:
        """The value of one in a configuration file.

        :raises ValueError: it is none; the message says what is expected.
        """

    def describe(self) -> str:
        """What is expected, in a few words: `seconds from 0 to 100000000`."""

    def show(self, value: Any) -> str:
        """A value as it is written."""


def _load_text(kind: Type[T], value: object) -> T:
    """The value of a string in a file, read as on a command line."""
    if not isinstance(value, str):
        # A port is easily taken for a number.
        plain = type(value) is int and 0 <= value <= 65535
        such = f': "{value}"' if plain else ""
        raise ValueError(f"expected {kind.describe()}, as a string{such}")
    return kind.parse(value)


@attrs.frozen
class Seconds:
    """A time in seconds; fractions allowed, and the units ms, s, m and h.

    :ivar never: the minimum, 0, is allowed; for most timeouts it switches them off.
    """

    never: bool = True
    unit: ClassVar[str] = "seconds"
    minimum: ClassVar[float] = 0.0
    maximum: ClassVar[float] = TIMEOUT_LIMIT
    placeholder: ClassVar[str] = "SECONDS"

    def parse(self, text: str) -> float:
        return self._checked(with_unit(text, TIMES))

    def load(self, value: object) -> float:
        if isinstance(value, str):
            return self.parse(value)
        return self._checked(load_number(value))

    def _checked(self, value: float) -> float:
        if not self.minimum <= value <= self.maximum or not (value or self.never):
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        if self.never:
            bounds = f"from 0 to {self.maximum:.0f}"
        else:
            bounds = f"more than 0, up to {self.maximum:.0f}"
        return f"{self.unit}, {bounds}, or a time such as 250ms, 10s, 5m or 1h"

    def show(self, value: float) -> str:
        return repr(value).removesuffix(".0")


@attrs.frozen
class Count:
    """A whole number.

    :ivar maximum: the largest; the smallest is 1.
    """

    maximum: int = 9_999_999
    unit: ClassVar[str] = ""
    minimum: ClassVar[int] = 1
    placeholder: ClassVar[str] = "NUMBER"

    def parse(self, text: str) -> int:
        # Of so few digits that reading them takes no time.
        plain = text.isascii() and text.isdigit() and len(text) <= 10
        return self._checked(int(text) if plain else 0)

    def load(self, value: object) -> int:
        return self._checked(value if type(value) is int else 0)

    def _checked(self, value: int) -> int:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return f"a number from {self.minimum} to {self.maximum}"

    def show(self, value: int) -> str:
        return str(value)


@attrs.frozen
class OpenFiles(Count):
    """How many files a process may have open: enough to start with.

    Python, a reactor and a listener need some twenty.
    """

    maximum: int = 1_000_000_000
    minimum: ClassVar[int] = 64


@attrs.frozen
class Size(Count):
    """A number of bytes; the units kB, MB, GB, KiB, MiB and GiB are allowed."""

    unit: ClassVar[str] = "bytes"
    placeholder: ClassVar[str] = "BYTES"

    def parse(self, text: str) -> int:
        if text.isdigit() or len(text) > 20:
            return super().parse(text)
        value = with_unit(text, SIZES) if text[-1:] == "B" else math.nan
        return self._checked(int(value) if value.is_integer() else 0)

    def load(self, value: object) -> int:
        if isinstance(value, str):
            return self.parse(value)
        return super().load(value)

    def describe(self) -> str:
        return (
            f"{self.minimum} to {self.maximum} bytes, or a size such as 64KiB or 10MB"
        )

    def show(self, value: int) -> str:
        for unit in ("GiB", "MiB", "KiB"):
            if not value % SIZES[unit]:
                return f"{value // SIZES[unit]}{unit}"
        return str(value)


@attrs.frozen
class Ratio:
    """How many times as much; 0 for no limit."""

    unit: ClassVar[str] = ""
    minimum: ClassVar[float] = 0.0
    maximum: ClassVar[float] = sys.float_info.max
    placeholder: ClassVar[str] = "FACTOR"

    def parse(self, text: str) -> float:
        return self._checked(number(text))

    def load(self, value: object) -> float:
        return self._checked(load_number(value))

    def _checked(self, value: float) -> float:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return "a number from 0 up"

    def show(self, value: float) -> str:
        return repr(value).removesuffix(".0")


@attrs.frozen
class Choice(Generic[T]):
    """One of a few words.

    :ivar words: a `Literal` of them.
    """

    words: Any
    placeholder: str = attrs.field(init=False)

    @placeholder.default
    def _find_placeholder(self) -> str:
        return "|".join(get_args(self.words))

    def parse(self, text: str) -> T:
        if text not in get_args(self.words):
            raise ValueError(f"expected {self.describe()}")
        return cast(T, text)

    def load(self, value: object) -> T:
        return _load_text(self, value)

    def describe(self) -> str:
        *others, last = get_args(self.words)
        return f"{', '.join(others)} or {last}"

    def show(self, value: T) -> str:
        return str(value)


@attrs.frozen
class Flag:
    """On or off; its option is given without a value, and is what it is not else."""

    placeholder: ClassVar[str] = ""

    def parse(self, text: str) -> bool:
        if text not in ("on", "off"):
            raise ValueError(f"expected {self.describe()}")
        return text == "on"

    def load(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value

    def describe(self) -> str:
        return "on or off"

    def show(self, value: bool) -> str:
        return "on" if value else "off"


@attrs.frozen
class Switch(Flag):
    """The same, whose option takes the word."""

    placeholder: ClassVar[str] = "on|off"


@attrs.frozen
class IPv4:
    """An IPv4 address, kept as text."""

    placeholder: ClassVar[str] = "ADDRESS"

    def parse(self, text: str) -> str:
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            raise ValueError(f"expected {self.describe()}") from None

    def load(self, value: object) -> str:
        return _load_text(self, value)

    def describe(self) -> str:
        return "an IPv4 address such as 192.0.2.1"

    def show(self, value: str) -> str:
        return value


@attrs.frozen
class Written(Generic[T]):
    """What has a grammar of its own.

    :ivar placeholder: what stands for it in the help.
    :ivar read: its parser: raises ValueError or :class:`ConfigError`.
    :ivar expected: what it is, in a few words.
    """

    placeholder: str
    read: Callable[[str], T]
    expected: str

    def parse(self, text: str) -> T:
        return self.read(text)

    def load(self, value: object) -> T:
        return _load_text(self, value)

    def describe(self) -> str:
        return self.expected

    def show(self, value: T) -> str:
        return str(value)


@attrs.frozen(eq=False, kw_only=True)
class Setting(Generic[T]):
    """One row: all that there is to know of a setting.

    :ivar name: what it is called; its option is `--name`, or `--no-name` if it is a
        flag that is on by default.
    :ivar type: how it is written, its bounds and its unit.
    :ivar default: what it is unless given; None: `otherwise` says it.
    :ivar help: what it does, in a sentence or two: a line of `--help`, and of README.
    :ivar kinds: the kinds of relay that have it.
    :ivar group: the heading in the help below which it stands.
    :ivar field: what the settings, and the relay that takes it, call it: `name` with
        underscores, unless given.
    :ivar short: a letter for a short option.
    :ivar off: of a flag that is on by default, what `--no-name` does.
    :ivar otherwise: the default in words, where it can't be shown as a value.
    :ivar repeatable: it may be given several times; its values are kept in their order,
        among those of the other repeatable ones.
    :ivar process: it is about the whole process; else about a relay, and each may have
        its own.
    :ivar key: what a configuration file calls it: `name` with underscores, unless
        given; empty if no file may have it.
    :ivar in_file: what it does, as the manual of the file says it; `help` unless given.
    :ivar word: in a file, what each of its values begins with: `allow`, `deny`; such
        settings share a key, so that their values keep their order.
    :ivar secret: a file may name another one that has the values, by `key` and `_file`.
    """

    name: str
    type: Type[T]
    default: T
    help: str
    kinds: tuple[Kind, ...]
    group: str
    field: str = attrs.field()
    short: str = ""
    off: str = ""
    otherwise: str = ""
    repeatable: bool = False
    process: bool = False
    key: str = attrs.field()
    in_file: str = ""
    word: str = ""
    secret: bool = False

    @field.default
    def _find_field(self) -> str:
        return self.name.replace("-", "_")

    @key.default
    def _find_key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def is_flag(self) -> bool:
        """Whether its option has no value."""
        return isinstance(self.type, Flag) and not isinstance(self.type, Switch)

    @property
    def option(self) -> str:
        """Its long option, without the dashes."""
        on = self.is_flag and self.default is True
        return f"no-{self.name}" if on else self.name

    @property
    def option_help(self) -> str:
        """What that option does."""
        return self.off or self.help

    @property
    def shown_default(self) -> str:
        """The default as it is written, or in words; empty for a flag."""
        if self.otherwise or self.is_flag or self.default in (None, ()):
            return self.otherwise
        return self.type.show(self.default)

    def parse(self, text: str) -> T:
        """The value that is written so.

        :raises ConfigError: there is none; one line, which quotes option and text.
        """
        try:
            return self.type.parse(text)
        except ValueError as problem:
            raise ConfigError(f"bad --{self.option} {text!r}: {problem}") from None


def rows_in(names: Mapping[str, object]) -> tuple[Setting[Any], ...]:
    """The rows among the names of a module, in their order there."""
    return tuple(each for each in names.values() if isinstance(each, Setting))

r"""How the options of filters are written: the types beside str, int, float and bool.

A filter's class names one in the annotation of a parameter:

    latency: Annotated[float, Milliseconds()] = 0.0

They have the shape of :class:`relayd.core.setting_types.Type`.  A number is kept in the
unit that its type is named after, so that `latency=100` means the same on a command
line, in a file and in Python; Toxiproxy's options have these units as well.

Bytes are text with escapes (:mod:`relayd.core.escapes`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Final

import attrs

from relayd.core.escapes import read_escapes
from relayd.core.setting_types import TIMEOUT_LIMIT
from relayd.core.units import SIZES, load_number, with_unit
from relayd.filters.expressions import compile_expression, read_expression

#: The most bytes that an option of bytes has.
MAX_BYTES = 16 << 10

#: What the text of a pattern begins with that is a regular expression.
REGEX: Final = "re:"

_SHORT = {10: r"\n", 13: r"\r", 9: r"\t", 92: r"\\"}

#: Each byte as printable ASCII, which :class:`Bytes` reads as that byte.
ESCAPES: Final = tuple(
    _SHORT.get(byte, chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}")
    for byte in range(256)
)


@attrs.frozen
class FilePath:
    """The path of a file."""

    placeholder: ClassVar[str] = "FILE"

    def parse(self, text: str) -> str:
        if not text:
            raise ValueError(f"expected {self.describe()}")
        return text

    def load(self, value: object) -> str:
        return self.parse(value if isinstance(value, str) else "")

    def describe(self) -> str:
        return "the path of a file"

    def show(self, value: str) -> str:
        return value


@attrs.frozen
class Bytes:
    """Bytes, as text with escapes.

    :ivar minimum: how many, at least.
    :ivar maximum: how many, at most.
    """

    minimum: int = 0
    maximum: int = MAX_BYTES
    placeholder: ClassVar[str] = "BYTES"

    def parse(self, text: str) -> bytes:
        made = read_escapes(text)
        if not self.minimum <= len(made) <= self.maximum:
            raise ValueError(f"expected {self.describe()}; this is {len(made)}")
        return made

    def load(self, value: object) -> bytes:
        if not isinstance(value, str):
            raise ValueError(f"expected {self.describe()}, as a string")
        return self.parse(value)

    def describe(self) -> str:
        return (
            f"{self.minimum} to {self.maximum} bytes, as text with"
            r" \n, \r, \t, \0, \\ and \xHH"
        )

    def show(self, value: bytes) -> str:
        return "".join([ESCAPES[byte] for byte in value])


@attrs.frozen
class Pattern:
    """What is looked for: bytes, or `re:` and a regular expression.

    Its value is bytes, or a compiled expression (`re.Pattern[bytes]`).
    """

    placeholder: ClassVar[str] = "PATTERN"

    def parse(self, text: str) -> bytes | re.Pattern[bytes]:
        if not text.startswith(REGEX):
            return Bytes(minimum=1).parse(text)
        expression = text.removeprefix(REGEX)
        if not expression.isascii():
            raise ValueError(rf"a {REGEX} pattern is ASCII: write other bytes as \xHH")
        compiled = compile_expression(expression.encode())
        read_expression(compiled)
        return compiled

    def load(self, value: object) -> bytes | re.Pattern[bytes]:
        if not isinstance(value, str):
            raise ValueError(f"expected {self.describe()}, as a string")
        return self.parse(value)

    def describe(self) -> str:
        return rf"bytes (text with escapes such as \n), or {REGEX} and an expression"

    def show(self, value: bytes | re.Pattern[bytes]) -> str:
        if isinstance(value, bytes):
            return Bytes().show(value)
        return f"{REGEX}{value.pattern.decode('ascii', 'backslashreplace')}"


@attrs.frozen
class _Amount:
    """A number from 0 up, with a unit or without.

    :ivar maximum: the largest.
    """

    maximum: float
    minimum: ClassVar[float] = 0.0
    #: What units are worth, in that of the value.
    units: ClassVar[Mapping[str, float]] = {}
    unit: ClassVar[str]
    example: ClassVar[str]

    def parse(self, text: str) -> float:
        return self._checked(with_unit(text, self.units))

    def load(self, value: object) -> float:
        if isinstance(value, str):
            return self.parse(value)
        return self._checked(load_number(value))

    def _checked(self, value: float) -> float:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        bounds = f"{self.minimum:.0f} to {self.maximum:.0f}"
        return f"{bounds} {self.unit}, or with a unit, such as {self.example}"

    def show(self, value: float) -> str:
        return repr(value).removesuffix(".0")


@attrs.frozen
class Milliseconds(_Amount):
    """A time in milliseconds; the units ms, s, m and h are allowed."""

    maximum: float = TIMEOUT_LIMIT * 1e3
    unit: ClassVar[str] = "milliseconds"
    units: ClassVar[Mapping[str, float]] = {"ms": 1, "s": 1e3, "m": 6e4, "h": 3.6e6}
    example: ClassVar[str] = "250ms or 10s"
    placeholder: ClassVar[str] = "MILLISECONDS"


@attrs.frozen
class Microseconds(_Amount):
    """A time in microseconds; the units us, ms and s are allowed."""

    maximum: float = TIMEOUT_LIMIT * 1e6
    unit: ClassVar[str] = "microseconds"
    units: ClassVar[Mapping[str, float]] = {"us": 1, "ms": 1e3, "s": 1e6}
    example: ClassVar[str] = "500us or 10ms"
    placeholder: ClassVar[str] = "MICROSECONDS"


@attrs.frozen
class Kilobytes(_Amount):
    """A rate in kB per second, of 1,000 bytes; the units of sizes are allowed."""

    maximum: float = 1e9
    unit: ClassVar[str] = "kB per second"
    units: ClassVar[Mapping[str, float]] = {
        unit: size / 1e3 for unit, size in SIZES.items()
    }
    example: ClassVar[str] = "100kB or 1MiB"
    placeholder: ClassVar[str] = "KILOBYTES"


@attrs.frozen
class Probability(_Amount):
    """From 0, never, to 1, always."""

    maximum: float = 1.0
    placeholder: ClassVar[str] = "PROBABILITY"

    def describe(self) -> str:
        return f"a number from 0 to {self.maximum:.0f}, such as 0.25"


@attrs.frozen
class Size:
    """A whole number of bytes; the units kB, MB, GB, KiB, MiB and GiB are allowed.

    :ivar minimum: the smallest.
    :ivar maximum: the largest.
    """

    minimum: int = 0
    maximum: int = 1 << 40
    unit: ClassVar[str] = "bytes"
    placeholder: ClassVar[str] = "BYTES"

    def parse(self, text: str) -> int:
        # Without a unit, no fractions and no exponents.
        plain = text.isascii() and text.isdigit()
        value = with_unit(text, SIZES) if plain or text[-1:] == "B" else -1.0
        return self._checked(int(value) if value.is_integer() else -1)

    def load(self, value: object) -> int:
        if isinstance(value, str):
            return self.parse(value)
        return self._checked(value if type(value) is int else -1)

    def _checked(self, value: int) -> int:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return (
            f"{self.minimum} to {self.maximum} bytes, or a size such as 64KiB or 10MB"
        )

    def show(self, value: int) -> str:
        for unit in ("GiB", "MiB", "KiB"):
            if value and not value % SIZES[unit]:
                return f"{value // SIZES[unit]}{unit}"
        return str(value)

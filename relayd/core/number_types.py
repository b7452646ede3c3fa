"""More types of settings that are numbers: those that may be 0, percentages, marks.

They are as those of :mod:`relayd.core.setting_types`.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from relayd.core.setting_types import Count

#: The largest firewall mark.
MAX_MARK = 0xFFFF_FFFF


@attrs.frozen
class CountOrNone(Count):
    """A whole number that may be 0."""

    minimum: ClassVar[int] = 0

    def parse(self, text: str) -> int:
        plain = text.isascii() and text.isdigit() and len(text) <= 10
        return self._checked(int(text) if plain else -1)

    def load(self, value: object) -> int:
        return self._checked(value if type(value) is int else -1)


@attrs.frozen
class Percent(CountOrNone):
    """A percentage, with its sign or without; a whole number."""

    maximum: int = 100
    unit: ClassVar[str] = "%"
    placeholder: ClassVar[str] = "PERCENT"

    def parse(self, text: str) -> int:
        return super().parse(text.removesuffix("%"))

    def load(self, value: object) -> int:
        return self.parse(value) if isinstance(value, str) else super().load(value)

    def describe(self) -> str:
        return f"a percentage from {self.minimum}% to {self.maximum}%"

    def show(self, value: int) -> str:
        return f"{value}%"


@attrs.frozen
class Mark(Count):
    """A firewall mark: a number, which may be hexadecimal, as in `ip rule`."""

    maximum: int = MAX_MARK
    placeholder: ClassVar[str] = "MARK"

    def parse(self, text: str) -> int:
        digits = text.lower().removeprefix("0x")
        if digits != text.lower() and digits.isascii() and digits.isalnum():
            # Of so few digits that reading them takes no time.
            try:
                return self._checked(int(digits, 16) if len(digits) <= 8 else 0)
            except ValueError:
                raise ValueError(f"expected {self.describe()}") from None
        return super().parse(text)


@attrs.frozen
class MarkBit(Mark):
    """One bit of a firewall mark."""

    def _checked(self, value: int) -> int:
        if not self.minimum <= value <= self.maximum or value.bit_count() != 1:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return "a number that is one bit of a firewall mark, such as 0x1000"

    def show(self, value: int) -> str:
        return hex(value)

"""More types of settings that are numbers: those that may be 0, and percentages.

They are as those of :mod:`relayd.core.setting_types`.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from relayd.core.setting_types import Count


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

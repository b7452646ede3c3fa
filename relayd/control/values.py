"""The values of requests: how each is read, and what the description says of it.

A value comes from a body, as JSON has it, or from a query, as text.  What it means is
not known here: only its type, and how long it may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import attrs

from relayd.control.steering import Json, Refusal

#: The longest text, in characters, and the most items of a list: as many numbers as a
#: body holds.
LONGEST, MOST_ITEMS = 1000, 3000

#: The longest time, in seconds: three years, as that of settings.
MOST_SECONDS = 100_000_000

#: The largest number that every reader of JSON keeps whole.
LARGEST = 2**53


def _kept(given: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(given)


class Value(Protocol):
    """A type of values."""

    def schema(self) -> Json:
        """As JSON Schema has it."""

    def load(self, value: object) -> Any:
        """The value of one in JSON.

        :raises ValueError: it is none; the message says what is expected.
        """

    def parse(self, text: str) -> Any:
        """The value of one in a query; raises likewise."""


@attrs.frozen
class Text:
    """A text that is not empty."""

    def schema(self) -> Json:
        return {"type": "string", "minLength": 1, "maxLength": LONGEST}

    def load(self, value: object) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST:
            raise ValueError(f"expected a text of 1 to {LONGEST} characters")
        return value

    def parse(self, text: str) -> str:
        return self.load(text)


@attrs.frozen
class Whole:
    """A whole number."""

    minimum: int = 0
    maximum: int = LARGEST

    def schema(self) -> Json:
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}

    def load(self, value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            # As JSON Schema has it: 1.0 is one.
            value = int(value)
        if type(value) is not int or not self.minimum <= value <= self.maximum:
            raise ValueError(
                f"expected a whole number from {self.minimum} to {self.maximum}"
            )
        return value

    def parse(self, text: str) -> int:
        plain = text.isascii() and text.isdigit() and len(text) <= 20
        return self.load(int(text) if plain else None)


@attrs.frozen
class Seconds:
    """A time in seconds."""

    def schema(self) -> Json:
        return {"type": "number", "minimum": 0, "maximum": MOST_SECONDS}

    def load(self, value: object) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= MOST_SECONDS:  # type: ignore[operator]
            raise ValueError(f"expected seconds from 0 to {MOST_SECONDS}, as a number")
        return float(value)  # type: ignore[arg-type]

    def parse(self, text: str) -> float:
        plain = text.isascii() and "_" not in text
        try:
            return self.load(float(text if plain else ""))
        except ValueError:
            return self.load(math.nan)


@attrs.frozen
class Flag:
    """True or false."""

    def schema(self) -> Json:
        return {"type": "boolean"}

    def load(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value

    def parse(self, text: str) -> bool:
        return self.load({"true": True, "false": False}.get(text))


@attrs.frozen
class OneOf:
    """One of a few words."""

    words: Sequence[str] = attrs.field(converter=_kept)

    def schema(self) -> Json:
        return {"type": "string", "enum": list(self.words)}

    def load(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            *others, last = self.words
            raise ValueError(f"expected {', '.join(others)} or {last}")
        return value

    def parse(self, text: str) -> str:
        return self.load(text)


@attrs.frozen
class Many:
    """A list that is not empty."""

    item: Value

    def schema(self) -> Json:
        return {
            "type": "array",
            "items": self.item.schema(),
            "minItems": 1,
            "maxItems": MOST_ITEMS,
        }

    def load(self, value: object) -> list[Any]:
        if not isinstance(value, list) or not 0 < len(value) <= MOST_ITEMS:
            raise ValueError(f"expected a list of 1 to {MOST_ITEMS}")
        return [self.item.load(each) for each in value]

    def parse(self, text: str) -> list[Any]:
        return self.load([self.item.parse(each) for each in text.split(",")])


@attrs.frozen
class Table:
    """Keys and values of any kind, as a file has them."""

    _expected: ClassVar[str] = "expected an object with a key at least"

    def schema(self) -> Json:
        return {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "type": ["string", "number", "boolean", "array", "object", "null"]
            },
        }

    def load(self, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict) or not value:
            raise ValueError(self._expected)
        return value

    def parse(self, text: str) -> Mapping[str, Any]:
        raise ValueError(self._expected)


@attrs.frozen(kw_only=True)
class Field:
    """One key of a body, or of a query.

    :ivar help: what it does, in a sentence.
    :ivar default: what it is unless given; in a body, null is not given.
    """

    name: str
    type: Value
    help: str
    required: bool = False
    default: Any = None

    def schema(self) -> Json:
        """As JSON Schema has it, of a query."""
        made = {**self.type.schema(), "description": self.help}
        if self.default is not None:
            made["default"] = self.default
        return made

    def body_schema(self) -> Json:
        """The same, of a body."""
        made = self.schema()
        if not self.required:
            made["type"] = [made["type"], "null"]
            if "enum" in made:
                made["enum"] = [*made["enum"], None]
        return made


@attrs.frozen(kw_only=True)
class Fields:
    """The keys of a body, or of a query.

    :ivar one_of: of these, one at least must be given.
    """

    fields: Sequence[Field] = attrs.field(default=(), converter=_kept)
    one_of: Sequence[str] = attrs.field(default=(), converter=_kept)

    @property
    def is_needed(self) -> bool:
        """Whether nothing would be too little."""
        return bool(self.one_of) or any(each.required for each in self.fields)

    def schema(self) -> Json:
        """Of a body that has them."""
        made: Json = {
            "type": "object",
            "properties": {each.name: each.body_schema() for each in self.fields},
            "additionalProperties": False,
        }
        if required := [each.name for each in self.fields if each.required]:
            made["required"] = required
        if self.one_of:
            made["anyOf"] = [
                {"required": [each], "properties": {each: {"not": {"type": "null"}}}}
                for each in self.one_of
            ]
        return made

    def load(self, given: object) -> Json:
        """The values of a body.

        :raises Refusal: something is wrong with it: a line for each problem.
        """
        if not isinstance(given, dict):
            raise Refusal("the body is not an object of JSON")
        absent = {each.name for each in self.fields if not each.required}
        found = {
            key: value
            for key, value in given.items()
            if value is not None or key not in absent
        }
        return self._values(found, lambda field, value: field.type.load(value))

    def parse(self, given: Mapping[str, str]) -> Json:
        """The values of a query; raises likewise."""
        return self._values(given, lambda field, value: field.type.parse(value))

    def _values(self, given: Mapping[str, Any], read: Any) -> Json:
        problems = []
        values: Json = {}
        names = [each.name for each in self.fields]
        for key in list(given)[:20]:
            if key not in names:
                there = f"there are {', '.join(names)}" if names else "there is none"
                problems.append(f"no such key {key[:64]!r}: {there}")
        for field in self.fields:
            values[field.name] = field.default
            if field.name in given:
                try:
                    values[field.name] = read(field, given[field.name])
                except ValueError as problem:
                    problems.append(f"bad {field.name}: {problem}")
            elif field.required:
                problems.append(f"{field.name} is missing")
        if self.one_of and not any(each in given for each in self.one_of):
            problems.append(f"nothing to do: give {' or '.join(self.one_of)}")
        if problems:
            raise Refusal(*problems)
        return values

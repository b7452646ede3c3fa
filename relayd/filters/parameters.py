"""What options a filter has: the parameters of its class, read by their annotations.

An option is a keyword parameter; one without a default must be given.  How its text is
read follows from its annotation: `str`, `int`, `float`, `bool`, a `Literal` of words,
or `Annotated[T, kind]`, where `kind` has `parse`, `load` and `describe` as the types of
settings have (:class:`relayd.core.setting_types.Type`).  `… | None` may be any of them.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import attrs

from relayd.core.setting_types import Choice, Switch, Type
from relayd.core.units import load_number, number

_WHOLE = re.compile(r"-?[0-9]{1,18}")


@attrs.frozen
class Parameter:
    """One option.

    :ivar type: how it is written.
    :ivar required: it has no default.
    """

    name: str
    type: Type[Any]
    required: bool

    @property
    def placeholder(self) -> str:
        """What stands for its value in a message."""
        return getattr(self.type, "placeholder", "") or self.name.upper()

    def read(self, value: object) -> Any:
        """The value of one that was written, or that a file has.

        :raises ValueError: it is none; the message says what is expected.
        """
        if isinstance(value, str):
            return self.type.parse(value)
        return self.type.load(value)


class Text:
    """Any text."""

    placeholder: ClassVar[str] = "TEXT"

    def parse(self, text: str) -> str:
        return text

    def load(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return "text"

    def show(self, value: str) -> str:
        return value


class Whole:
    """A whole number, of at most 18 digits."""

    placeholder: ClassVar[str] = "NUMBER"

    def parse(self, text: str) -> int:
        if not _WHOLE.fullmatch(text):
            raise ValueError(f"expected {self.describe()}")
        return int(text)

    def load(self, value: object) -> int:
        return self.parse(str(value) if type(value) is int else "")

    def describe(self) -> str:
        return "a whole number"

    def show(self, value: int) -> str:
        return str(value)


class Number:
    """A number."""

    placeholder: ClassVar[str] = "NUMBER"

    def parse(self, text: str) -> float:
        return self._checked(number(text))

    def load(self, value: object) -> float:
        return self._checked(load_number(value))

    def _checked(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return "a number"

    def show(self, value: float) -> str:
        return repr(value).removesuffix(".0")


_PLAIN: Mapping[Any, Type[Any]] = {
    str: Text(),
    int: Whole(),
    float: Number(),
    bool: Switch(),
}


@functools.cache
def parameters_of(kind: type[Any]) -> tuple[Parameter, ...]:
    """The options of a class of filters, in the order of its parameters.

    Kept, as a thousand relays may have the same filter, and to read them takes 100 us.

    :raises TypeError: there is a parameter that no option can be; one line.
    """
    named = {}
    for name, each in inspect.signature(kind).parameters.items():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.kind is each.POSITIONAL_ONLY:
            raise TypeError(f"its parameter {name} takes no keyword")
        if name == "name":
            raise TypeError("its parameter name is what a file calls the filter")
        named[name] = each
    hints = _hints(kind, {name: each.annotation for name, each in named.items()})
    return tuple(
        Parameter(name, _type_of(name, hints[name]), each.default is each.empty)
        for name, each in named.items()
    )


def _hints(kind: type[Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The annotations of parameters, none of which is a text any more.

    They may have been written in the modules of base classes.
    """
    fields = {}
    if attrs.has(kind):
        # A converter that says nothing of what it takes hides the field's own.
        fields = {each.alias: each.type for each in attrs.fields(kind)}
    found = {
        name: fields.get(name) or str if each is inspect.Parameter.empty else each
        for name, each in written.items()
    }
    names: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        names.update(vars(sys.modules[each.__module__]))

    def holder() -> None:
        """Has annotations, as `get_type_hints` takes them."""

    holder.__annotations__ = found
    try:
        return get_type_hints(holder, names, include_extras=True)
    except Exception as problem:
        raise TypeError(f"its annotations can't be read: {problem}") from problem


def _type_of(name: str, hint: Any) -> Type[Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for extra in args[1:]:
            found = extra() if isinstance(extra, type) else extra
            if all(hasattr(found, each) for each in ("parse", "load", "describe")):
                return found  # type: ignore[no-any-return]
        return _type_of(name, args[0])
    if origin is Literal and all(isinstance(each, str) for each in args):
        return Choice[Any](hint)
    if origin in (Union, UnionType):
        others = [each for each in args if each is not NoneType]
        if len(others) == 1:
            return _type_of(name, others[0])
    if hint in _PLAIN:
        return _PLAIN[hint]
    raise TypeError(
        f"its parameter {name} can't be an option: annotate it as str, int, float,"
        " bool, a Literal of words, or Annotated"
    )

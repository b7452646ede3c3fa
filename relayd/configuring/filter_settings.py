r"""The row of the table of settings for filters, and how one is written.

deny:pattern=GET /admin             a name, and options: key=value, each after a comma
deny:GET /admin,direction=up        a value without a key is that of its first option
replace:old=a\,b,new=c              \, is a comma, \\ a backslash; any other backslash
                                    belongs to the value
{name = "deny", pattern = "a,b"}    in a file, a table, too; nothing is escaped in it

What begins with a word and `=` is an option, whether or not there is one of that name:
else a misspelt one would be taken for a value.  Which filters there are, and what their
options mean, is not known here: see :mod:`relayd.filters.loading`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs

from relayd.configuring.given import RelaySection
from relayd.core.filter_spec import FilterSpec
from relayd.core.setting_types import ALL_KINDS, Setting
from relayd.core.settings import FILTERS

#: The most filters that a relay may have.
MOST = 16

#: The key of the name in a file's table.
NAME = "name"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NAMED = re.compile(rf"({_NAME.pattern})(?:[:,](.*))?", re.DOTALL)
_OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)=(.*)", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPE = re.compile(r"\\([\\,])|(,)")

_EXPECTED = "a filter, as NAME, NAME:VALUE or NAME:key=value,key=value"


@attrs.frozen
class FilterType:
    """A filter: a text; in a file it may be a table."""

    placeholder: ClassVar[str] = "FILTER"

    # A setting's value is several of them.
    def parse(self, text: str) -> Any:
        return parse_filter(text)

    def load(self, value: object) -> Any:
        if isinstance(value, dict):
            return load_filter(value)
        if isinstance(value, str):
            return parse_filter(value)
        raise ValueError(f"expected {self.describe()}, as a string, or a table")

    def describe(self) -> str:
        return _EXPECTED

    def show(self, value: FilterSpec) -> str:
        return str(value)


def parse_filter(text: str) -> FilterSpec:
    """A filter as it is written behind `--filter`.

    :raises ValueError: it is none; the message says what is expected.
    """
    match = _NAMED.fullmatch(text)
    if match is None:
        raise ValueError(f"expected {_EXPECTED}")
    name, rest = match[1], match[2]
    options: dict[str, Any] = {}
    for number, item in enumerate([] if rest is None else _items(rest)):
        option = _OPTION.fullmatch(item)
        key, value = option.groups() if option else ("", item)
        key = key.replace("-", "_")
        if option is None and (number or not item):
            raise ValueError(
                rf"expected key=value, not {item!r}; a comma in a value is written \,"
                if number
                else f"expected a value, or key=value, after {text[: len(name) + 1]!r}"
            )
        if key in options:
            raise ValueError(f"{key} is given twice")
        options[key] = value
    return FilterSpec(name, options)


def _items(text: str) -> list[str]:
    """What stands between the commas, without the escapes."""
    items, begin = [""], 0
    for found in _ESCAPE.finditer(text):
        items[-1] += text[begin : found.start()] + (found[1] or "")
        begin = found.end()
        if found[2]:
            items.append("")
    items[-1] += text[begin:]
    return items


def load_filter(table: dict[str, Any]) -> FilterSpec:
    """A filter that is a table of a file.

    :raises ValueError: it is none; the message says what is expected.
    """
    name = table.get(NAME)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f'expected {NAME} = "replace", or the like, in it')
    options = {key: value for key, value in table.items() if key != NAME}
    for key, value in options.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"there is no {key!r} in a filter")
        if not isinstance(value, str | int | float):
            raise ValueError(f"{key}: expected a string, a number, true or false")
    return FilterSpec(name, options)


FILTER = Setting[tuple[FilterSpec, ...]](
    name="filter",
    type=FilterType(),
    default=(),
    help="Have a filter see the bytes of every session, or the datagrams of every flow,"
    " and change, delay or end them: replace, deny, first, capture, a fault such as"
    " latency, or one that a package brings; such as deny:pattern=secret,direction=up."
    " May be repeated: the first is nearest to where the bytes come from, both ways.",
    in_file="Filters that see the bytes of every session, or the datagrams of every"
    " flow, and change, delay or end them: replace, deny, first, capture, a fault such"
    ' as latency, or one that a package brings. "deny:pattern=secret,direction=up" is'
    ' the same as {name = "deny", pattern = "secret", direction = "up"}. The first is'
    " nearest to where the bytes come from, both ways.",
    kinds=ALL_KINDS,
    group=FILTERS,
    field="filters",
    repeatable=True,
)

TABLE: tuple[Setting[Any], ...] = (FILTER,)


def about_filters(section: RelaySection) -> Iterator[str]:
    """What is wrong with how many filters a relay has."""
    given = section.all(FILTER.key)
    if len(given) > MOST:
        place = given[-1].place
        yield f"{place.prefix}{len(given)} filters: a relay has at most {MOST}"

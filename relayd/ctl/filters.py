"""The filters of a running relay, as its setting `filter` has them, and changes of it.

A change is of what was read: if another one came between, relayd refuses it (its ETag).
What is said last is taken back altogether if it is what the file says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from relayd.configuring.filter_settings import FILTER
from relayd.core.filter_spec import FilterSpec
from relayd.ctl.amounts import printable
from relayd.ctl.control_client import ControlClient, route
from relayd.ctl.exits import CommandFailed, Exit
from relayd.ctl.tables import rows_of

#: The filters that a line lists.
_LISTED = 10


@attrs.frozen
class Filters:
    """What was read.

    :ivar relay: its name.
    :ivar filters: each a text, or a table, as a file has it.
    :ivar tag: of the relay, as it was then.
    """

    relay: str
    filters: list[Any]
    tag: str


def read(asked: ControlClient, relay: str) -> Filters:
    """The filters of a relay.

    :raises CommandFailed: there is no answer, or a refusal.
    """
    answer, tag = asked.get_tagged(route("relays", relay))
    found = filters_in(answer)
    if found is None:
        line = f"{relay}: the relayd that runs has no filters"
        raise CommandFailed(Exit.FAILED, printable(line))
    return Filters(relay, found, tag)


def filters_in(answer: dict[str, Any]) -> list[Any] | None:
    """The filters in what is said of a relay; None: it knows no such setting."""
    settings = answer.get("settings")
    found = settings.get(FILTER.key) if isinstance(settings, dict) else None
    return _many(found.get("value")) if isinstance(found, dict) else None


def change(asked: ControlClient, before: Filters, filters: list[Any]) -> list[Any]:
    """Have other filters; those that the relay has then.

    :raises CommandFailed: they can't be had, or the relay has changed since.
    """
    in_file = _in_file(asked, before)
    body = {"settings": {FILTER.key: None if filters == in_file else filters}}
    path = route("relays", before.relay)
    asked.change("PATCH", path, body, tag=before.tag)
    return filters


def _in_file(asked: ControlClient, before: Filters) -> list[Any]:
    """What the file says."""
    for each in rows_of(asked.get("/v1/diff"), "changes"):
        said = (each.get("relay"), each.get("server"), each.get("key"))
        if said == (before.relay, None, FILTER.key):
            return _many(each.get("file"))
    # It has the last word.
    return before.filters


def without(found: Filters, text: str) -> list[Any]:
    """The filters without one.

    :param text: its name, or all of it.
    :raises CommandFailed: there is none, or several are meant.
    """
    wanted = _written(text)
    numbers = [n for n, each in enumerate(found.filters) if _written(each) == wanted]
    if not numbers:
        numbers = [n for n, each in enumerate(found.filters) if _name(each) == text]
        if len({_written(found.filters[each]) for each in numbers}) > 1:
            several = [found.filters[each] for each in numbers]
            line = f"there are {len(several)} filters {text!r}: say which: "
            raise CommandFailed(Exit.INVALID, printable(line + _together(several)))
    if not numbers:
        there = _together(found.filters) or "none"
        line = f"{found.relay} has no filter {text!r}: it has {there}"
        raise CommandFailed(Exit.NOT_FOUND, printable(line))
    return [each for n, each in enumerate(found.filters) if n != numbers[-1]]


def text_of(found: Any) -> str:
    """A filter as it is written behind `--filter`; on one line."""
    return printable(str(_spec(found) or found))


def _together(filters: Sequence[Any]) -> str:
    # Each may have commas, and blanks.
    more = ", ..." if len(filters) > _LISTED else ""
    return ", ".join(f"'{text_of(each)}'" for each in filters[:_LISTED]) + more


def _many(value: Any) -> list[Any]:
    """The items of a setting that may have several."""
    if isinstance(value, list):
        return value
    return [] if value in (None, "") else [value]


def _spec(found: Any) -> FilterSpec | None:
    try:
        spec: FilterSpec = FILTER.type.load(found)  # type: ignore[assignment]
    except ValueError:
        return None
    return spec


def _written(found: Any) -> str:
    """What two filters that are the same have in common."""
    return str(_spec(found) or found)


def _name(found: Any) -> str:
    spec = _spec(found)
    return "" if spec is None else spec.name

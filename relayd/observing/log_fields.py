"""The facts of a log line as fields of its event, for structured logs.

Twisted's logger takes the fields of an event as keyword arguments.  A fact that has the
name of one of the logger's own fields (`level`, `format`, `log_time`) would raise
instead of being logged, or change the line's time.  So it is logged as `fact_level`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

from relayd.core.session import TAKEN

#: Reserved by the logger, and by observers of the older kind
#: (:class:`twisted.logger.Logger`, :mod:`twisted.python.log`), as is `log_…`.
RESERVED = frozenset(
    [
        *("self", "format", "level", "line"),
        *("message", "time", "system", "isError", "failure", "why", "text"),
    ]
)


def one_line(text: str) -> str:
    """`text`, escaped if it has characters that would break or hide the line."""
    if text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


def is_reserved(name: str) -> bool:
    """Whether the logger reserves a field of this name."""
    return name in RESERVED or name.startswith("log_")


@functools.lru_cache(maxsize=64)
def are_fields(names: tuple[object, ...], taken: frozenset[str]) -> bool:
    """Whether facts can be fields under these names.

    :param taken: the names of the fields beside them.
    """
    return all(
        isinstance(name, str) and name not in taken and not is_reserved(name)
        for name in names
    )


def as_fields(facts: Mapping[str, object]) -> Mapping[str, object]:
    """The same facts, under names that the logger accepts."""
    if are_fields(tuple(facts), frozenset()):
        return facts
    return {name: fact for name, fact, _ in loggable_facts(facts.items())}


def loggable_facts(
    facts: Iterable[tuple[object, object]],
    taken: frozenset[str] = frozenset(),
    failed: Callable[[object], None] | None = None,
) -> list[tuple[str, object, str]]:
    """Field name, value and text of each fact that can be logged.

    :param facts: names and values.
    :param taken: the names of the fields beside them.
    :param failed: called with the name of a fact that is left out, while its exception
        is handled: the name is no str, or the fact can't be turned into text.
    """
    facts = list(facts)
    names = {name for name, _ in facts if isinstance(name, str)}
    loggable = []
    for name, fact in facts:
        try:
            if not isinstance(name, str):
                raise TypeError(f"the name of a fact is a str, not {name!r}")
            text = str(fact)
        except Exception:
            if failed is not None:
                failed(name)
            continue
        shown = name
        while (
            shown in taken or is_reserved(shown) or (shown != name and shown in names)
        ):
            shown = TAKEN + shown
        loggable.append((shown, fact, text))
    return loggable

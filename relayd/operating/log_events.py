"""Events of Twisted's logger as lines of a JSON log: one object for each.

An event about a session or a flow is an object already; any other, `twistd`'s own
included, becomes one whose `event.name` is `relayd.log`, with its message, its level,
its logger and, of a failure, its type, its text and its traceback.
"""

from __future__ import annotations

from twisted.logger import LogEvent, eventAsText
from twisted.python.failure import Failure
from twisted.python.reflect import qual

from relayd.observing.json_lines import JsonLine, JsonLines, quoted
from relayd.observing.log_times import LogTimes


def event_line(event: LogEvent, objects: JsonLines, times: LogTimes) -> str | None:
    """The line of an event, with its newline; None: it says nothing.

    :param objects: makes the object.
    :param times: writes the event's time.
    """
    line = event.get("line")
    if isinstance(line, JsonLine):
        return f"{line}\n"
    failure = event.get("log_failure")
    said = eventAsText(
        event, includeTraceback=False, includeTimestamp=False, includeSystem=False
    )
    if not said and failure is None:
        return None
    when = event.get("log_time")
    level = getattr(event.get("log_level"), "name", "info")
    made = objects.message(
        str(event.get("log_namespace") or event.get("log_system") or "-"),
        level,
        said,
        "" if when is None else times(when),
        "" if failure is None else _error(failure),
    )
    return f"{made}\n"


def _error(failure: Failure) -> str:
    """The keys of a failure; what it is about may be broken itself."""
    keys = ""
    for key, ask in (
        ("error.type", lambda: qual(type(failure.value))),
        ("error.message", lambda: str(failure.value)),
        ("error.stack_trace", failure.getTraceback),
    ):
        try:
            keys += f',"{key}":{quoted(ask())}'
        except Exception:
            keys += f',"{key}":"(it can\'t be told)"'
    return keys

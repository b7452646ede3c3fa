"""Lines of a log that are no events, and their format.

Formatting an event takes Twisted's logger 30 microseconds, three quarters of what a
session's line costs.  Where nothing but the text of the line is wanted, as on standard
output or in an access log, a :class:`LineLog` takes the lines of
:class:`~relayd.observing.session_log.SessionLog` and
:class:`~relayd.observing.flow_lines.FlowLog` as they are.

A line is text (:mod:`relayd.observing.text_lines`) or a JSON object
(:mod:`relayd.observing.json_lines`).
"""

from __future__ import annotations

from collections.abc import Callable

from relayd.observing.json_lines import JsonLine, JsonLines
from relayd.observing.text_lines import TextLines


class LineLog:
    """Where lines go, and what they look like.

    :param as_json: each line is a JSON object.

    :ivar write: takes a namespace, such as `relayd.session`, and a line without its
        newline; None: the lines are events, of Twisted's logger.
    :ivar format: makes the lines.
    """

    __slots__ = ("as_json", "format", "write")

    def __init__(
        self, write: Callable[[str, str], None] | None = None, *, as_json: bool = False
    ) -> None:
        self.write = write
        self.as_json = as_json
        self.format: TextLines | JsonLines = JsonLines() if as_json else TextLines()

    def event_text(self, line: str) -> str:
        """A line as the text of an event: a :class:`JsonLine` if it is an object."""
        return JsonLine(line) if self.as_json else line

    def takes(self, namespace: str, line: str) -> bool:
        """Write a line, unless it is to be an event; whether it is written."""
        if self.write is None:
            return False
        self.write(namespace, line)
        return True


#: For logs that were given none.
EVENTS = LineLog()

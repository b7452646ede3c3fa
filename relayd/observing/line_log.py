"""Lines of a log that are no events.

Formatting an event takes Twisted's logger 30 microseconds, three quarters of what a
session's line costs.  Where nothing but the text of the line is wanted, as on standard
output or in an access log, a :class:`LineLog` takes the lines of
:class:`~relayd.observing.session_log.SessionLog` and
:class:`~relayd.observing.flow_lines.FlowLog` as they are.
"""

from __future__ import annotations

from collections.abc import Callable


class LineLog:
    """Where lines go.

    :ivar write: takes a namespace, such as `relayd.session`, and a line without its
        newline; None: the lines are events, of Twisted's logger.
    """

    __slots__ = ("write",)

    def __init__(self, write: Callable[[str, str], None] | None = None) -> None:
        self.write = write

    def takes(self, namespace: str, line: str) -> bool:
        """Write a line, unless it is to be an event; whether it is written."""
        if self.write is None:
            return False
        self.write(namespace, line)
        return True


#: For logs that were given none.
EVENTS = LineLog()

"""What the relay's log says, line by line.

Nothing here grows with the number of sessions.
"""

from __future__ import annotations

import re
from collections import deque
from datetime import datetime, timedelta

import attrs

_SESSION = re.compile(
    r"\[relayd\.session#info\] session=\d+ client=(?P<client>\S+)"
    r" listener=(?P<listener>\S+) upstream=\S+ duration=(?P<duration>\S+)"
    r" up=(?P<up>\d+) down=(?P<down>\d+) ending=(?P<ending>\w+) "
)


@attrs.frozen
class SessionLine:
    """What the relay's log says when a session ends."""

    client: str
    listener: str
    duration: float
    up: int
    down: int
    ending: str


def parse_session_line(line: str) -> SessionLine | None:
    """What a line of the log says of a session, or None where it is another line."""
    found = _SESSION.search(line)
    if found is None:
        return None
    return SessionLine(
        found["client"],
        found["listener"],
        float(found["duration"]),
        int(found["up"]),
        int(found["down"]),
        found["ending"],
    )


@attrs.define(eq=False)
class RelayLog:
    """What the relay says, counted.

    :ivar listeners: addresses that it listens on, in the order of the log.
    :ivar troubles: lines that are errors, or begin a traceback.
    :ivar steps: how often its wall clock was set, by STEP or more.
    :ivar remarks: the last REMARKS lines that are more than information.
    """

    REMARKS = 40
    STEP = timedelta(minutes=1)

    listeners: list[str] = attrs.Factory(list)
    troubles: int = 0
    steps: int = 0
    remarks: deque[str] = attrs.Factory(lambda: deque(maxlen=RelayLog.REMARKS))
    _time: datetime | None = None

    _LISTENING = re.compile(r"\blistening on (\S+), ")
    _TROUBLE = re.compile(r"#(error|critical)\] |Traceback \(most recent|Unhandled ")

    def hear(self, line: str) -> SessionLine | None:
        """Take one line; what it says of a session, if it is about one."""
        self._see_time(line)
        if (session := parse_session_line(line)) is not None:
            return session
        if (found := self._LISTENING.search(line)) is not None:
            self.listeners.append(found[1])
        if self._TROUBLE.search(line) is not None:
            self.troubles += 1
        if "#info] " not in line:
            self.remarks.append(line)
        return None

    def _see_time(self, line: str) -> None:
        try:
            now = datetime.fromisoformat(line.partition(" ")[0])
        except ValueError:
            return
        if self._time is not None and abs(now - self._time) >= self.STEP:
            self.steps += 1
        self._time = now

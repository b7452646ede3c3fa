"""Parses the relay's log: lines of sessions, flows, datagrams, and others.

Nothing here grows with the number of sessions.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from datetime import datetime, timedelta

import attrs

_SESSION = re.compile(
    r"\[relayd\.session#info\] session=\d+ relay=\S+ client=(?P<client>\S+)"
    r" listener=(?P<listener>\S+) upstream=\S+ connect=\S+ attempts=\d+"
    r" duration=(?P<duration>\S+)"
    r" up=(?P<up>\d+) down=(?P<down>\d+) ending=(?P<ending>\w+) "
)
_FLOW = re.compile(
    r"\[relayd\.flow#info\] flow relay=\S+ client=(?P<client>\S+)"
    r" listener=(?P<listener>\S+) port=(?P<port>\S+) server=\S+ age=(?P<age>\S+)"
    r" up=(?P<up>\d+)/(?P<up_bytes>\d+) down=(?P<down>\d+)/(?P<down_bytes>\d+)"
    r" ending=(?P<ending>\w+)"
)
_DATAGRAMS = re.compile(
    r"\[relayd\.flow#info\] datagrams relay=\S+ listener=(\S+) (.*)"
)


@attrs.frozen
class SessionLine:
    """The relay's log line when a session ends."""

    client: str
    listener: str
    duration: float
    up: int
    down: int
    ending: str


def parse_session_line(line: str) -> SessionLine | None:
    """Parse a line about a session; None if it is another line."""
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


@attrs.frozen
class FlowLine:
    """The relay's log line when a flow ends.

    :ivar port: the relay's address towards the server.
    :ivar up: datagrams sent to the server, and their bytes.
    :ivar down: the same, to the client.
    """

    client: str
    listener: str
    port: str
    age: float
    up: tuple[int, int]
    down: tuple[int, int]
    ending: str


def parse_flow_line(line: str) -> FlowLine | None:
    """Parse a line about a flow; None if it is another line."""
    found = _FLOW.search(line)
    if found is None:
        return None
    return FlowLine(
        found["client"],
        found["listener"],
        found["port"],
        float(found["age"]),
        (int(found["up"]), int(found["up_bytes"])),
        (int(found["down"]), int(found["down_bytes"])),
        found["ending"],
    )


@attrs.frozen
class DatagramsLine:
    """The relay's log line with a listener's counters, when it ends.

    :ivar dropped: by reason; likewise `replies_dropped`.
    :ivar kernel_dropped: not included in the other counters.
    :ivar counters: all of them, as logged.
    """

    listener: str
    received: int
    sent: int
    replies_received: int
    replies_sent: int
    dropped: Counter[str]
    replies_dropped: Counter[str]
    kernel_dropped: int
    counters: str = attrs.field(default="", eq=False)


def parse_datagrams_line(line: str) -> DatagramsLine | None:
    """Parse a line with a listener's counters; None if it is another line."""
    found = _DATAGRAMS.search(line)
    if found is None:
        return None
    words = dict(word.split("=", 1) for word in found[2].split())
    return DatagramsLine(
        found[1],
        int(words["received"]),
        int(words["sent"]),
        int(words["replies_received"]),
        int(words["replies_sent"]),
        _reasons(words["dropped"]),
        _reasons(words["replies_dropped"]),
        int(words["kernel_dropped"]),
        found[2],
    )


def _reasons(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for part in text.split(",") if text != "-" else ():
        reason, _, count = part.rpartition(":")
        counts[reason] += int(count)
    return counts


@attrs.define(eq=False)
class RelayLog:
    """The relay's log, counted.

    :ivar listeners: addresses that it listens on, in the order of the log.
    :ivar datagrams: the counters of each datagram listener, from its end.
    :ivar troubles: lines that are errors, or begin a traceback.
    :ivar steps: how often its wall clock was set, by STEP or more.
    :ivar remarks: the last REMARKS lines of a level above `info`.
    """

    REMARKS = 40
    STEP = timedelta(minutes=1)

    listeners: list[str] = attrs.Factory(list)
    datagrams: list[DatagramsLine] = attrs.Factory(list)
    troubles: int = 0
    steps: int = 0
    remarks: deque[str] = attrs.Factory(lambda: deque(maxlen=RelayLog.REMARKS))
    _time: datetime | None = None

    _LISTENING = re.compile(r"\blistening on (?:udp:)?(\S+), ")
    _TROUBLE = re.compile(r"#(error|critical)\] |Traceback \(most recent|Unhandled ")

    def add(self, line: str) -> SessionLine | FlowLine | None:
        """Add a line; return it parsed, if it is about a session or a flow."""
        self._count_steps(line)
        about = parse_session_line(line) or parse_flow_line(line)
        if about is not None:
            return about
        if (found := self._LISTENING.search(line)) is not None:
            self.listeners.append(found[1])
        if (datagrams := parse_datagrams_line(line)) is not None:
            self.datagrams.append(datagrams)
        if self._TROUBLE.search(line) is not None:
            self.troubles += 1
        if "#info] " not in line:
            self.remarks.append(line)
        return None

    def _count_steps(self, line: str) -> None:
        try:
            now = datetime.fromisoformat(line.partition(" ")[0])
        except ValueError:
            return
        if self._time is not None and abs(now - self._time) >= self.STEP:
            self.steps += 1
        self._time = now

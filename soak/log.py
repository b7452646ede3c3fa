"""What the relay's log says, line by line: sessions, flows, datagrams, and the rest.

Nothing here grows with the number of sessions.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from datetime import datetime, timedelta

import attrs

_SESSION = re.compile(
    r"\[relayd\.session#info\] session=\d+ relay=\S+ client=(?P<client>\S+)"
    r" listener=(?P<listener>\S+) upstream=\S+ duration=(?P<duration>\S+)"
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


@attrs.frozen
class FlowLine:
    """What the relay's log says when a flow of datagrams ends.

    :ivar port: the relay's address towards the server.
    :ivar up: datagrams, and their bytes, that the server was sent.
    :ivar down: the same, back.
    """

    client: str
    listener: str
    port: str
    age: float
    up: tuple[int, int]
    down: tuple[int, int]
    ending: str


def parse_flow_line(line: str) -> FlowLine | None:
    """What a line of the log says of a flow, or None where it is another line."""
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
    """What the relay's log says of all datagrams of a listener, when it ends.

    :ivar dropped: by reason; likewise `replies_dropped`.
    :ivar kernel_dropped: in none of the others.
    :ivar counters: all of them, as the log has it.
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
    """What a line says of a listener's datagrams, or None where it is another line."""
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
    """What the relay says, counted.

    :ivar listeners: addresses that it listens on, in the order of the log.
    :ivar datagrams: what it says in the end of each listener for datagrams.
    :ivar troubles: lines that are errors, or begin a traceback.
    :ivar steps: how often its wall clock was set, by STEP or more.
    :ivar remarks: the last REMARKS lines that are more than information.
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

    def hear(self, line: str) -> SessionLine | FlowLine | None:
        """Take one line; what it says of a session or a flow, if it is about one."""
        self._see_time(line)
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

    def _see_time(self, line: str) -> None:
        try:
            now = datetime.fromisoformat(line.partition(" ")[0])
        except ValueError:
            return
        if self._time is not None and abs(now - self._time) >= self.STEP:
            self.steps += 1
        self._time = now

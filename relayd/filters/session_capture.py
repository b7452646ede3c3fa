"""One session as it is captured: what happens to it, as the packets of a TCP stream.

It begins with a handshake, whose first packet has a comment that names the session and
its ends as the log does; it ends with a FIN of each side that has ended, or with a RST
that has the session's ending as its comment.  What the capture of a direction leaves
out, for it may have so many bytes only, is not there; nor is its FIN.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime

from relayd.core.filtering import SPLICE, Answer, Course, Filter
from relayd.core.session import Ending, Session
from relayd.filters.packet_times import PacketTimes
from relayd.filters.packets import (
    LONGEST_SEGMENT,
    TcpStream,
    client_end,
    first_numbers,
    made_up_client,
    server_end,
)
from relayd.filters.pcapng import packet

COURSES: tuple[Course, Course] = ("up", "down")

#: What an ending is called that is not known yet.
ABORTED = "aborted"

#: Endings in which the client's side has reset the connection, or is taken to have.
_BY_CLIENT = frozenset(
    {
        Ending.DOWNSTREAM_RESET,
        Ending.DOWNSTREAM_WRITE_FAILED,
        Ending.DOWNSTREAM_LOST,
        Ending.DOWNSTREAM_STALLED,
    }
)


class SessionCapture:
    """Writes the packets of one session.

    :param session: is read only.
    :param clock: that of its times.
    :param write: takes a block; returns whether it did.
    :param living: it has been going on for a while; else it begins as it was connected.
    :param over: called once, when nothing more is captured: with the session's ending
        as the log calls it, or with an empty text if the session goes on.

    :ivar times: of the packets.
    :ivar began: when the first one was made.
    :ivar packets: how many there were.
    :ivar dropped: how many of them `write` has not taken.
    """

    def __init__(
        self,
        session: Session,
        clock: IReactorTime,
        write: Callable[[bytes], bool],
        *,
        living: bool = False,
        over: Callable[[str], object] | None = None,
    ) -> None:
        self.times = PacketTimes(clock)
        self.packets = self.dropped = 0
        self._session = session
        self._write = write
        self._tell = over
        #: Directions of which more may come, and those whose FIN was written.
        self._open: set[Course] = set()
        self._finished: set[Course] = set()
        #: Directions that are over, and were captured to their ends.
        self._closed: set[Course] = set()
        server = server_end(session.upstream)
        client = client_end(session.client, session.id)
        if client == server:
            # So a PROXY header may say.
            client = made_up_client(session.id)
        self.began = when = self.times.now()
        if not living and session.connected_at is not None:
            when = self.times.of(session.connected_at)
        self._stream = TcpStream(
            client, server, first_numbers((when << 20) + session.id)
        )
        first, *others = self._stream.handshake()
        self._put(when, first, b"", _described(session, living, clock))
        for each in others:
            self._put(when, each)

    def open(self, course: Course) -> None:
        """A direction is captured."""
        self._open.add(course)

    def data(self, course: Course, data: bytes, comment: str = "") -> bool:
        """Bytes were read.

        :param comment: of the last packet that has them.
        :return: whether the last of them was written.
        """
        when, taken = self.times.now(), False
        last = len(data) - LONGEST_SEGMENT
        for at in range(0, len(data), LONGEST_SEGMENT):
            piece = data[at : at + LONGEST_SEGMENT]
            headers, acknowledged = self._stream.segment(course, piece)
            taken = self._put(when, headers, piece, comment if at >= last else "")
            if taken:
                # If not, nobody has seen what it acknowledges.
                self._put(when, acknowledged)
        return taken

    def end(self, course: Course) -> None:
        """A direction has come to its end: of its data, or by a reset."""
        if self._session.ending in (None, Ending.DONE):
            self._finish(course)

    def leave(self, course: Course) -> None:
        """No more of a direction is captured, whatever becomes of the session."""
        self._open.discard(course)
        if not self._open:
            self._end()

    def close(self, course: Course, *, ended: bool) -> None:
        """A direction is over.

        :param ended: it has come to its end; else it was cut off: as its session is
            aborted, or as the connection that it leads to is gone.
        """
        self._open.discard(course)
        self._closed.add(course)
        if self._open:
            return
        ending = self._session.ending
        # Of an abort, the filters may hear before the session has its ending.
        if ended if ending is None else ending is Ending.DONE:
            for each in COURSES:
                if each in self._closed:
                    self._finish(each)
            self._end()
        else:
            side: Course = "up" if ending in _BY_CLIENT else "down"
            word = ABORTED if ending is None else ending.word
            comment = f"ending={word} {self._session.detail}".strip()
            self._put(self.times.now(), self._stream.reset(side), b"", comment)
            self._end(word)

    def _end(self, word: str = "") -> None:
        if self._tell is None:
            return
        session = self._session
        if session.ending is not None:
            word = session.ending.word
        elif not word and session.up.eof and session.down.eof:
            # It has all but ended.
            word = Ending.DONE.word
        tell, self._tell = self._tell, None
        tell(word)

    def _finish(self, course: Course) -> None:
        """A FIN, unless there was one."""
        if course not in self._finished:
            self._finished.add(course)
            when = self.times.now()
            for each in self._stream.finish(course):
                self._put(when, each)

    def _put(
        self, when: int, headers: bytes, payload: bytes = b"", comment: str = ""
    ) -> bool:
        self.packets += 1
        taken = self._write(packet(when, headers, payload, comment))
        if not taken:
            self.dropped += 1
        return taken


class CaptureFilter(Filter):
    """Shows one direction to the capture of its session, and passes all on.

    :param most: bytes after which it has seen enough; None: never.
    :param goes_on: asked if a packet was not taken: whether others may be.
    """

    def __init__(
        self,
        capture: SessionCapture,
        course: Course,
        most: int | None,
        goes_on: Callable[[], bool],
    ) -> None:
        self._capture = capture
        self._course: Course = course
        self._left = most
        self._goes_on = goes_on
        #: It has left, or it has ended.
        self._is_gone = self._has_ended = False
        capture.open(course)

    def data(self, data: bytes) -> bytes | Answer:
        capture, left = self._capture, self._left
        if left is not None:
            if len(data) >= left:
                capture.data(self._course, data[:left], "no more is captured (bytes=)")
                self._leave()
                return SPLICE
            self._left = left - len(data)
        if not capture.data(self._course, data) and not self._goes_on():
            self._leave()
            return SPLICE
        return data

    def end(self) -> bytes:
        if not self._is_gone:
            self._has_ended = True
            self._capture.end(self._course)
        return b""

    def remove(self) -> bytes:
        self._leave()
        return b""

    def close(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._capture.close(self._course, ended=self._has_ended)

    def _leave(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._capture.leave(self._course)


def _described(session: Session, living: bool, clock: IReactorTime) -> str:
    """A session and its ends, as the log names them."""
    facts = [
        f"session={session.id}",
        *([f"relay={session.relay}"] if session.relay else []),
        f"client={session.client}",
        *([f"peer={session.peer}"] if session.peer not in ("", session.client) else []),
        *([f"listener={session.listener}"] if session.listener else []),
        f"upstream={session.upstream}",
    ]
    if living:
        age = clock.seconds() - session.opened_at
        read = f"up={session.up.read} down={session.down.read}"
        facts.append(f"(captured from its second {age:.3f} on, after {read} bytes)")
    return " ".join(facts)

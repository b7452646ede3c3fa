r"""The first bytes of a client of which a route decides: looked at, and waited for.

They stay where they are.  Several may wait at once (`await race([...])`), each until
more has come, its time is over, or it is cancelled; the client is asked for more once.
"""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime

from relayd.core.prelude import BadRequest
from relayd.core.routing import Arriving
from relayd.preludes.client_hello import HelloReader, read_server_name

#: The most first bytes that a route can look at: as many as a relay keeps.
MOST_PEEKED: Final = 65_536

#: The most bytes up to a mark, unless a route says otherwise.
MOST_UNTIL: Final = 4096

#: How often a route may look at one client.  A loop around something that fails each
#: time, at once, would keep all others waiting.
MOST_LOOKS: Final = 10_000

_HANDSHAKE = b"\x16\x03"


class ConnectionOver(GeneratorExit):
    """There is nothing more of a client: it has left, or the route has decided.

    No Exception: a route that goes on whatever happens ends by it.
    """


class FirstBytes:
    """What a client has sent.

    :ivar waits_for: what of its client is waited for without an end, in words; empty if
        there is nothing.
    """

    # What is rare has no place of its own before it is there.
    _looks = 0
    _hello: HelloReader | None = None
    #: The server name: a tuple with it, once it is known; or why there can be none.
    _name: tuple[str | None] | str | None = None
    #: Fires when more has come: whoever waits first has it, the others wait for that.
    _more: Deferred[Any] | None = None
    _others: list[Deferred[bool]] | None = None
    #: What is waited for without an end: bytes, or a mark; and by what.
    _wanted: tuple[Deferred[Any], object] | None = None
    #: It says nothing before its server does.
    _silent = False

    #: The client, until there is nothing more of it.
    _arriving: Arriving | None

    async def peek(self, n: int, wait: float | None = None) -> bytes:
        """Look at the first bytes of the client, which stay the session's first data.

        :param n: how many; at most :data:`MOST_PEEKED`.
        :param wait: seconds to wait for them; unless given, until the deadline.
        :return: fewer, if the client has ended its side before, or `wait` is over; none
            if the server speaks first.
        :raises ValueError: too many.
        """
        _check_count("n", n, 0)
        if wait is not None:
            _check_wait(wait)
        data = self._look().data
        if self._silent:
            return b""
        if len(data) < n:
            end = self._end_of(wait)
            comes: Any = True
            while comes is not False and len(data) < n:
                # A copy that is kept for as long as it waits is as much again.
                del data
                comes = await self._come(end, n)
                data = self._client().data
        return data[:n]

    async def until(
        self, mark: bytes, most: int = MOST_UNTIL, wait: float | None = None
    ) -> bytes:
        r"""Look at the first bytes up to a mark, such as b"\r\n", and with it.

        :param most: how many they may be; at most :data:`MOST_PEEKED`.
        :param wait: seconds to wait for them; unless given, until the deadline.
        :return: none if the server speaks first.
        :raises BadRequest: there is no mark within `most`, or before the client has
            ended its side, or `wait` was over.
        :raises ValueError: an empty mark, or too many bytes.
        """
        if not isinstance(mark, bytes) or not mark:
            raise ValueError(f"a mark is bytes, and not empty: {mark!r:.60}")
        _check_count("most", most, len(mark))
        if wait is not None:
            _check_wait(wait)
        data, start = self._look().data, 0
        if self._silent:
            return b""
        end = self._end_of(wait)
        while (at := data.find(mark, start, most)) < 0:
            if len(data) >= most:
                raise BadRequest(f"no {mark!r:.60} in the first {most} bytes")
            start = max(0, len(data) - len(mark) + 1)
            del data
            if await self._come(end, mark) is False:
                raise BadRequest(f"no {mark!r:.60} came")
            data = self._client().data
        return data[: at + len(mark)]

    async def sni(self, wait: float | None = None) -> str | None:
        """The server name that a client asks for as it begins TLS, in lower case.

        Of a listener that ends TLS itself: the one that was asked for there.

        :param wait: seconds to wait for it; unless given, until the deadline.
        :return: None: for no name, it is not TLS, nothing came, or the server speaks
            first.
        :raises BadRequest: what begins as TLS is none.
        """
        if wait is not None:
            _check_wait(wait)
        self._look()
        if self._silent and self._name is None and self._client().server_name is None:
            self._name = (None,)
        end = self._end_of(wait) if self._name is None else None
        while self._name is None and not self._read_hello(self._client()):
            if await self._come(end, "a ClientHello") is False:
                if not (self._client().ended and self._client().data):
                    return None
                self._name = "the client ended its side within its ClientHello"
        if isinstance(self._name, tuple):
            return self._name[0]
        raise BadRequest(self._name or "")

    def _read_hello(self, client: Arriving) -> bool:
        """Read on; whether that was all."""
        # A second one that waits may have had it.
        if self._name is None:
            if (named := client.server_name) is not None:
                self._name = _of_listener(named)
            elif (data := client.data)[:2] != _HANDSHAKE[: len(data)]:
                self._name = (None,)
            else:
                reader = self._hello = self._hello or HelloReader()
                try:
                    found = reader(data)
                except BadRequest as problem:
                    self._name = str(problem)
                else:
                    if found is not None:
                        self._name = (found[0].server_name,)
        return self._name is not None

    # -- waiting

    @property
    def clock(self) -> IReactorTime:
        """The relay's, for timers."""
        return self._client().clock

    def _look(self) -> Arriving:
        """The client, to be looked at once more."""
        self._looks += 1
        if self._looks > MOST_LOOKS:
            raise ConnectionOver(f"the route has looked {MOST_LOOKS} times: it loops")
        return self._client()

    def _client(self) -> Arriving:
        """The client, which is in no variable of what waits.

        What has failed has the variables in its traceback, which may be kept.
        """
        arriving = self._arriving
        if arriving is None:
            raise ConnectionOver("the route has decided, or its client has left")
        return arriving

    def _end_of(self, wait: float | None) -> float | None:
        """When a wait is over that begins now."""
        if wait is None or self._arriving is None:
            return None
        return self._arriving.clock.seconds() + wait

    def _come(self, end: float | None, what: object) -> Deferred[Any]:
        """Fires when more has come; with False, if none will, or it is too late."""
        client = self._client()
        left = 0.0 if end is None else end - client.clock.seconds()
        if client.ended or (end is not None and left <= 0):
            return succeed(False)
        more = self._more
        if more is None or more.called:
            come = self._more = client.more()
        else:
            other: Deferred[Any] = Deferred()
            come = other
            if self._others is None:
                self._others = []
                more.addBoth(self._wake)
            self._others.append(other)
        if end is None:
            self._wanted = (come, what)
        else:
            come.addTimeout(left, client.clock, _too_late)
        return come

    def _wake(self, _: object) -> None:
        """The first has more, or waits no longer; the others look again."""
        others, self._others = self._others, None
        for each in others or ():
            # One of them may have cancelled others.
            if self._arriving is None:
                each.cancel()
            elif not each.called:
                each.callback(True)

    @property
    def waits_for(self) -> str:
        """What of its client is waited for without an end, in words; or empty."""
        if self._wanted is None or self._wanted[0].called:
            return ""
        what = self._wanted[1]
        return f"{what} bytes" if isinstance(what, int) else _shown(what)

    def leave(self) -> None:
        """The client has left: there is nothing more of it."""
        self._arriving = None

    def close(self) -> None:
        """The route has decided: whatever waits for its client is cancelled."""
        self._arriving = None
        more = self._more
        if more is not None:
            self._more = self._wanted = None
            if not more.called:
                more.cancel()


def _of_listener(name: str) -> tuple[str | None] | str:
    """The name of a handshake that the listener does; or why it can be none."""
    if not name:
        return (None,)
    try:
        return (read_server_name(name.encode()),)
    except BadRequest as problem:
        return str(problem)


def _shown(what: object) -> str:
    return what if isinstance(what, str) else f"{what!r:.60}"


def _too_late(_: object, __: float) -> bool:
    return False


def _check_wait(wait: float) -> None:
    """Whether it can be one, whatever has come: what is wrong shows at once."""
    if not (isinstance(wait, int | float) and wait >= 0):
        raise ValueError(f"wait is in seconds, not {wait!r:.60}")


def _check_count(name: str, count: int, least: int) -> None:
    if type(count) is not int or not least <= count <= MOST_PEEKED:
        raise ValueError(
            f"{name} is a number of bytes from {least} to {MOST_PEEKED},"
            f" not {count!r:.60}"
        )

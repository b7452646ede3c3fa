"""How far the bytes that were written to one peer have got.

:class:`Delivery` follows them from check to check, and tells three kinds of peers
apart:

- one that *takes slowly*.  Linux closes its window when its buffer is full, and opens
  it again when a sixteenth of the buffer is free: with 6 MiB of it, a reader of
  16 kB/s is silent for 24 seconds between two openings.  Meanwhile probes are
  answered, with a window of 0, whether the application reads or not.  So only
  acknowledged bytes, or a window that was shut and is open, count as taking, and a
  peer has the *allowance*: the time that such a reader needs for a sixteenth of the
  largest window it has shown;
- one that *takes nothing*.  It has no allowance: that is bounded by the bytes which its
  application must have taken, as its buffer can't hold all that was acknowledged;
- one that is *lost*: what was sent again, or a probe, is not answered at all.

Windows are seen only at checks, and a burst may fall between two.  So what counts as
the largest window is what a peer acknowledged from one check to the next, and would
still take then: what its buffer held, unless its application read meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relayd.net.tcp_info import TcpInfo

#: The part of its buffer that a Linux peer must have free before it opens its window
#: (`__tcp_select_window` in net/ipv4/tcp_output.c).
REOPENS_AT = 1 / 16

#: Bytes a second of the slowest reader that is waited for.
SLOWEST_READER = 16_000

#: Bytes: no peer is waited for as if it had a larger buffer; Linux's own default.
LARGEST_WINDOW = 6 << 20

#: A peer's buffer in terms of the largest window that was seen.  An empty buffer does
#: not show all of itself: the window begins with 64 KiB and grows by twice what
#: arrives (`tcp_grow_window` in net/ipv4/tcp_input.c), so that when it can't grow any
#: more a third of the buffer is full.
BUFFER = 1.5

#: Fewer bytes than this need no check: their allowance is a quarter of a second.
WORTH_A_CHECK = 65536

#: Probes in a row without an answer, before a peer with a shut window counts as
#: silent.  A kernel answers only one in half a second (tcp_invalid_ratelimit).
SILENT_PROBES = 2


def unanswered(info: TcpInfo) -> bool:
    """Whether the kernel has tried again since the peer's last acknowledgement."""
    if info.window:
        # The peer's window is open, so what is sent again was not answered.
        return info.retransmits > 0 or info.probes > 0
    # With its window shut a peer answers and takes nothing: then what was sent again
    # stays so, and only something sent after the last answer is unanswered.
    return info.probes >= SILENT_PROBES or (
        info.retransmits > 0 and info.since_sent < info.since_heard
    )


class Delivery:
    """How far the bytes that were written to one peer have got.

    :ivar taken: how many its kernel had acknowledged at the last check.
    :ivar window: the largest window that it has shown, as far as was seen.
    :ivar waits: whether bytes waited at the last check.
    """

    __slots__ = (
        "_buffered_at",
        "_shut",
        "_silent_at",
        "_taken_at",
        "_waits_at",
        "taken",
        "waits",
        "window",
    )

    def __init__(self) -> None:
        self.taken = 0
        self.window = 0
        self.waits = False
        #: When more was taken, or something began to wait.
        self._taken_at = 0.0
        self._waits_at = 0.0
        #: When our own buffer began to hold something; None while it is empty.
        self._buffered_at: float | None = None
        #: Since when it does not answer; None while it does, or was not asked.
        self._silent_at: float | None = None
        #: Its window was shut at the last check, and nothing was taken since.
        self._shut = False

    def update(
        self,
        now: float,
        since: float,
        taken: int,
        buffered: int,
        queued: int,
        info: TcpInfo | None = None,
    ) -> None:
        """Note how things stand.

        :param since: nothing was written after that, so what waits has waited since.
        :param taken: bytes that were written and are not waiting.
        :param buffered: bytes in the relay's buffer.
        :param queued: bytes in the kernel's.
        :param info: what the kernel says about the connection, if it does.
        """
        moved = taken - self.taken
        if not (buffered or queued):
            self.waits = self._shut = False
            self._silent_at = None
            self.taken = taken
        elif not self.waits:
            self.waits = True
            self._waits_at = self._taken_at = since
            self.taken = taken
        elif moved > 0:
            self._taken_at, self._shut = now, False
            self.taken = taken
        if not buffered:
            self._buffered_at = None
        elif self._buffered_at is None:
            self._buffered_at = now
        if info is not None:
            self._update_from(now, max(moved, 0), info)

    def _update_from(self, now: float, moved: int, info: TcpInfo) -> None:
        self.window = min(max(self.window, info.window + moved), LARGEST_WINDOW)
        if not self.waits:
            return
        if not info.window:
            self._shut = True
        elif self._shut:
            self._taken_at, self._shut = now, False
        heard_at = now - info.since_heard
        if not unanswered(info):
            self._silent_at = None
        elif self._silent_at is None or heard_at > self._silent_at:
            # While its window is open something is always under way, so it has been
            # silent since it was last heard.  One that is shut is asked now and then.
            silent_at = max(self._waits_at, heard_at) if info.window else now
            self._silent_at = silent_at

    def silence(self, now: float) -> float:
        """Seconds that the peer has not answered what was tried again; 0 if it does."""
        return 0.0 if self._silent_at is None else now - self._silent_at

    def idleness(self, now: float) -> float:
        """Seconds that our buffer held something and the peer took nothing."""
        if self._buffered_at is None:
            return 0.0
        return now - max(self._buffered_at, self._taken_at)

    @property
    def allowance(self) -> float:
        """Seconds that the peer's kernel may need before it says what was taken."""
        really_taken = max(self.taken - self.window * BUFFER, 0)
        return min(self.window, really_taken) * REOPENS_AT / SLOWEST_READER

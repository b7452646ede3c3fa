"""`capture`: writes the sessions of a relay to a file that Wireshark and tshark read.

    --filter capture:/var/tmp/web.pcapng,size=100MiB,keep=5

Each session is a TCP stream (:mod:`relayd.filters.session_capture`); where the filter
stands among others says what is seen: the first one sees what each source has sent.
The file is one that sessions share (:mod:`relayd.filters.capture_file`).
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

import attrs

from relayd.core.filtering import FilterFactory, Way
from relayd.filters.capture_file import LEAST_SIZE, MOST_KEPT, CaptureFile, check_path
from relayd.filters.option_types import FilePath, Size
from relayd.filters.session_capture import CaptureFilter, SessionCapture


def _absolute(path: Annotated[str, FilePath()]) -> str:
    return os.path.abspath(path)


@attrs.frozen
class Capture(FilterFactory):
    """The filter, with its options.

    :ivar file: its path.  A file that exists must be a capture, and is appended to; no
        symbolic link is followed.  Relays may have the same file.
    :ivar size: bytes after which the file is renamed to `FILE.1`, and a new one begun.
    :ivar keep: how many old ones are kept, `FILE.1` being the youngest.
    :ivar most: bytes of each direction after which a session has been seen enough;
        None: all of it is captured.  As an option it is called `bytes`.
    :ivar direction: the only one that is captured; None: both.
    :raises ValueError: a file that can't be written, or a number out of its bounds.
    """

    name = "capture"

    file: str = attrs.field(converter=_absolute)
    size: Annotated[int, Size(minimum=LEAST_SIZE)] = 100 << 20
    keep: int = 5
    most: Annotated[int | None, Size(minimum=1)] = attrs.field(
        default=None, alias="bytes"
    )
    direction: Literal["up", "down"] | None = None
    _to: CaptureFile = attrs.field(init=False, eq=False, repr=False)

    @_to.default
    def _find_file(self) -> CaptureFile:
        return CaptureFile.of(self.file)

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.keep <= MOST_KEPT:
            raise ValueError(f"bad keep {self.keep}: expected 0 to {MOST_KEPT} files")
        if self.size < LEAST_SIZE:
            raise ValueError(f"bad size {self.size}: expected at least {LEAST_SIZE}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"bad bytes {self.most}: expected 1 or more")
        try:
            check_path(self.file)
        except ValueError as problem:
            raise ValueError(f"can't capture to {self.file}: {problem}") from None

    @property
    def owns(self) -> str:  # type: ignore[override]
        """Its file: two captures of one session would be one stream, twice."""
        return self.file

    def build_filter(self, way: Way) -> CaptureFilter | None:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_filter`."""
        if self.direction not in (None, way.course):
            return None
        to = self._to
        capture: SessionCapture | None = way.shared.get("capture")
        if capture is None:
            if not to.enter(way.clock, self.size, self.keep):
                return None
            try:
                capture = way.shared["capture"] = SessionCapture(
                    way.session, way.clock, to.write, over=lambda _: to.leave()
                )
            except BaseException:
                # Nobody else would close it.
                to.leave()
                raise
        return CaptureFilter(capture, way.course, self.most, goes_on=_never)


def _never() -> bool:
    """A file that takes no more is one whose capture has ended."""
    return False

"""The bytes that go through a session: a pattern that shows any error.

They depend on the session, the direction and the position, so bytes that are lost,
duplicated, reordered or of another session are detected at once, by one memcmp.
"""

from __future__ import annotations

import random

#: Bytes that are sent or read in one go.
CHUNK = 65536

#: The pattern repeats after so many bytes: a prime, and more than any script sends,
#: except for those that the relay aborts.
PERIOD = 8388593

#: Distance between the patterns of two consecutive sessions.
STRIDE = 2654435761

_pattern = random.Random(1).randbytes(PERIOD)  # noqa: S311 - test data
_pattern += _pattern[:CHUNK]
_view = memoryview(_pattern)


def pattern_start(number: int, up: bool) -> int:
    """Where in the pattern a direction of a session begins."""
    return (2 * number + up) * STRIDE % PERIOD


def pattern_bytes(start: int, position: int, count: int) -> memoryview:
    """The `count` bytes, CHUNK at most, from `position` of a direction on."""
    where = (start + position) % PERIOD
    return _view[where : where + count]


def pattern_matches(start: int, position: int, data: bytes | memoryview) -> bool:
    """Whether `data`, CHUNK at most, is what belongs at `position`."""
    # A memcmp, unlike a comparison of memoryviews, which goes byte by byte.
    return _pattern.startswith(data, (start + position) % PERIOD)

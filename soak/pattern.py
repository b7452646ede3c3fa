"""The bytes that go through a session: which ones they are tells what became of them.

They depend on the session, the direction and the position, so bytes that are lost,
duplicated, reordered or of another session show at once, and checking them costs one
memcmp.
"""

from __future__ import annotations

import random

#: Bytes that are sent or read in one go.
CHUNK = 65536

#: The pattern repeats after so many bytes: a prime, and more than any script
#: sends, but for those that are cut.
PERIOD = 8388593

#: How far the patterns of two neighbours are apart.
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
    # Unlike a comparison of memoryviews, which goes byte by byte, it is a memcmp.
    return _pattern.startswith(data, (start + position) % PERIOD)

r"""The first bytes of each direction, on the line of the access log.

    first:64

adds `first_up=GET\x20/\x20HTTP/1.1\r\n…` and `first_down=…`.  They come from strangers:
the line has them in printable ASCII without spaces and quotes, so that they can neither
break it nor look like another field of it.  What is escaped is what the options of
filters have (:func:`relayd.core.escapes.read_escapes`), which reads it back.

Once it has them, the filter leaves: what follows is spliced.
"""

from __future__ import annotations

from typing import Annotated, Final

import attrs

from relayd.core.filtering import SPLICE, Answer, Filter, FilterFactory, Way
from relayd.filters.option_types import ESCAPES, Size

#: The most bytes of each direction.
MAX_FIRST: Final = 1024

_HIDDEN = b" \"'"
_SHOWN = tuple(
    f"\\x{byte:02x}" if byte in _HIDDEN else shown for byte, shown in enumerate(ESCAPES)
)


class Noting(Filter):
    """Notes the first bytes of a direction as they come."""

    def __init__(self, way: Way, size: int) -> None:
        self._way = way
        self._name = f"first_{way.course}"
        self._left = size
        self._noted = ""

    def data(self, data: bytes) -> bytes | Answer:
        """See :meth:`relayd.core.filtering.IFilter.data`."""
        seen = data[: self._left]
        self._left -= len(seen)
        self._noted += "".join([_SHOWN[byte] for byte in seen])
        # At once, as the session may end at any time.
        self._way.note(self._name, self._noted)
        return data if self._left else SPLICE


@attrs.frozen
class First(FilterFactory):
    """Notes the first bytes of each direction.

    :ivar size: how many.
    :raises ValueError: they are too many, or none.
    """

    name = "first"

    size: Annotated[int, Size(minimum=1, maximum=MAX_FIRST)] = attrs.field()

    @size.validator
    def _check_size(self, _: object, size: int) -> None:
        if not 1 <= size <= MAX_FIRST:
            raise ValueError(f"expected 1 to {MAX_FIRST} bytes, not {size}")

    def build_filter(self, way: Way) -> Noting:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_filter`."""
        return Noting(way, self.size)

"""The name that somebody may have meant who has written another one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

#: How much alike two names are, from 0 to 1, if one is taken for the other.
_NEAR = 0.65


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The most alike of the names that there are; None if none is near."""
    return next(iter(difflib.get_close_matches(word, known, 1, _NEAR)), None)

"""What each relay of a process is called: in the log, and by whoever asks for it.

A relay has the name that it was given, or else `relay1`, `relay2` and so on, numbered
in the order in which the process makes them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

#: The most characters that a name may have.
MAX_LENGTH = 64

#: What a name is, for an error.
EXPECTED = f"1 to {MAX_LENGTH} small letters, digits, '-' or '_'"

_NAME = re.compile(rf"[a-z0-9_-]{{1,{MAX_LENGTH}}}")

_numbers = itertools.count(1)


def check_name(name: str) -> str:
    """The name, if it can be that of a relay.

    :raises ValueError: it can't: it would not be one word of a line of the log.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"bad name {name!r}: expected {EXPECTED}")
    return name


def relay_name(given: str | None = None) -> str:
    """What a relay is called.

    :param given: its name; the next number's unless given.
    :raises ValueError: it can't be a name.
    """
    return _next_number() if given is None else check_name(given)


def relay_names(given: Sequence[str | None]) -> list[str]:
    """What several relays that are made together are called, each by another name.

    :param given: the name of each, or None for the next number's that none of them has.
    :raises ValueError: one can't be a name, or two relays are given the same.
    """
    taken: set[str] = set()
    for each in given:
        if each is not None:
            if check_name(each) in taken:
                raise ValueError(f"two relays can't both be called {each!r}")
            taken.add(each)
    return [_next_number(taken) if each is None else each for each in given]


def _next_number(taken: Collection[str] = ()) -> str:
    return next(name for n in _numbers if (name := f"relay{n}") not in taken)

"""Asking objects and classes what they are, for short cuts past methods of ours.

A short cut may be taken only where nobody has overridden the methods that it passes by:
in a subclass, by a mixin, or on the object itself.  :func:`overrides` tells.  It costs
a few hundred instructions for each method, so what is asked of classes for each
session is remembered, in a table of bounded size: :class:`Remembered`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any, TypeVar

from zope.interface.interface import InterfaceClass

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")

#: Answers that a table keeps.  A program that makes up classes as it goes may ask
#: about any number of them.
REMEMBERED = 64


def overrides(target: Any, base: type, *names: str) -> bool:
    """Whether one of these methods is another than that of `base`.

    :param target: an object, whose own attributes count, or a class.
    :param base: the class whose methods are meant; `target` is one of its kind.
    """
    for name in names:
        method, found = getattr(base, name), getattr(target, name)
        if found is not method and found != MethodType(method, target):
            return True
    return False


class Remembered(dict[Key, Answer]):
    """What a function has answered: `table[key]`, a look-up that takes no call.

    :param ask: answers for a key.
    :param limit: how many answers are kept.  When they are that many all are dropped.
    """

    def __init__(self, ask: Callable[[Key], Answer], limit: int = REMEMBERED) -> None:
        super().__init__()
        self._ask = ask
        self._limit = limit

    def __missing__(self, key: Key) -> Answer:
        answer = self._ask(key)
        if len(self) >= self._limit:
            self.clear()
        self[key] = answer
        return answer


def implementers(interface: InterfaceClass) -> Remembered[Any, bool]:
    """A table that tells, for a class, whether it implements an interface.

    To be asked of `type(thing)`: an object that wraps another, as Twisted's wrappers
    of transports do, claims to provide all that the wrapped one does.
    """
    return Remembered(lambda kind: bool(interface.implementedBy(kind)))

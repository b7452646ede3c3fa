"""Whether somebody has overridden a method; and answers that are remembered.

:mod:`tests.stream.test_hooks_live` tries the short cuts that ask it.
"""

from __future__ import annotations

from typing import Any

import pytest
from zope.interface import Interface, directlyProvides, implementer, providedBy

from relayd.core.hooks import Remembered, implementers, overrides


class Base:
    def asked(self) -> int:
        return 1

    def other(self) -> int:
        return 2


class Derived(Base):
    def more(self) -> int:
        return 3


class Overriding(Base):
    def asked(self) -> int:
        return 4


class Mixin:
    def asked(self) -> int:
        return 5


class Mixed(Mixin, Base):
    pass


def placed(function: Any) -> Base:
    made = Derived()
    made.asked = function  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("target", [Base, Base(), Derived, Derived()])
def test_a_method_that_is_inherited_is_no_override(target: Any) -> None:
    assert not overrides(target, Base, "asked", "other")


@pytest.mark.parametrize(
    "target",
    [
        *(Overriding, Overriding(), Mixed, Mixed()),
        *(placed(lambda: 6), placed(Base().asked)),
    ],
)
def test_an_override_is_found_wherever_it_is(target: Any) -> None:
    assert overrides(target, Base, "asked")
    assert overrides(target, Base, "other", "asked")
    assert not overrides(target, Base, "other")


def test_a_class_that_somebody_has_changed_is_asked_as_it_is_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Derived()
    assert not overrides(made, Base, "asked")
    monkeypatch.setattr(Derived, "asked", lambda self: 7, raising=False)
    assert overrides(made, Base, "asked")
    assert overrides(Derived, Base, "asked")


@pytest.mark.cost
def test_an_answer_is_asked_for_once() -> None:
    """A test of cost."""
    asked: list[int] = []

    def double(key: int) -> int:
        asked.append(key)
        return 2 * key

    table = Remembered(double)
    assert [table[2], table[3], table[2]] == [4, 6, 4]
    assert asked == [2, 3]


@pytest.mark.cost
def test_few_answers_are_kept() -> None:
    """A test of cost."""
    table = Remembered(lambda key: -key, limit=3)
    for key in range(100):
        assert table[key] == -key
        assert len(table) <= 3


def test_a_question_that_fails_is_not_remembered() -> None:
    table = Remembered(lambda key: 1 // key)
    with pytest.raises(ZeroDivisionError):
        table[0]
    assert not table


class IAny(Interface):
    pass


@implementer(IAny)
class Provider:
    pass


class Wrapper:
    """Claims to provide what it wraps, as Twisted's wrappers do."""

    def __init__(self, wrapped: object) -> None:
        directlyProvides(self, providedBy(wrapped))


def test_classes_are_asked_and_not_what_their_objects_claim() -> None:
    table = implementers(IAny)
    wrapper = Wrapper(Provider())
    assert IAny.providedBy(wrapper)
    assert table[Provider]
    assert not table[type(wrapper)]

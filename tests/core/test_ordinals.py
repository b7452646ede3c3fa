"""Sequence numbers, and the next one before it is given out."""

from __future__ import annotations

from relayd.core.ordinals import Ordinals


def test_they_are_given_out_in_order_and_each_once() -> None:
    ordinals = Ordinals()
    assert [next(ordinals) for _ in range(3)] == [0, 1, 2]
    # Whoever iterates takes them, too.
    assert next(iter(ordinals)) == 3


def test_a_look_at_the_next_one_takes_none() -> None:
    ordinals = Ordinals()
    for number in range(3):
        assert ordinals.following == ordinals.following == number
        assert next(ordinals) == number

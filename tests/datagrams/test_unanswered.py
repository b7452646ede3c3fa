"""What is kept of flows without an answer is limited."""

from __future__ import annotations

from relayd.datagrams.unanswered import (
    KEPT_OVERHEAD,
    MAX_KEPT,
    MAX_KEPT_BYTES,
    RESEND_WITHIN,
    Unanswered,
)


def test_the_kept_datagrams_are_limited() -> None:
    """Of a flow, and in all: the oldest goes first."""
    kept = Unanswered()
    kept.add("flow", [b"%d" % n for n in range(MAX_KEPT + 3)], 5)
    kept.add("flow", [b"more"], 6)
    last = [b"%d" % n for n in range(4, MAX_KEPT + 3)] + [b"more"]
    assert len(last) == MAX_KEPT
    assert kept.of("flow", 6) == kept.of("flow", 5 + RESEND_WITHIN) == last
    for number in range(50):
        kept.add(number, [bytes(65507)], 7)
        assert kept.size <= MAX_KEPT_BYTES
    assert kept.of("flow", 7) == kept.of(0, 7) == []
    assert len(kept.of(49, 7)[0]) == 65507
    for number in range(20_000):
        kept.add((1, number), [b""], 8)
        # Who speaks again is among the last that have spoken.
        kept.add((1, 0), [b"again"], 8)
    assert kept.of((1, 0), 8) == [b"again"] * MAX_KEPT
    assert len(kept) <= MAX_KEPT_BYTES // KEPT_OVERHEAD
    for number in range(20_000):
        kept.forget((1, number))
    assert (len(kept), kept.size) == (0, 0)

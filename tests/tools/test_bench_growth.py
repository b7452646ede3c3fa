"""What is measured with more and more connections."""

from __future__ import annotations

from functools import partial

from bench.figures import FEW, MANY, SIZES
from bench.growth import _by_size


def test_what_a_limit_compares_is_measured_in_every_window() -> None:
    """The other sizes are for the table: once in a round."""
    measured: list[int] = []

    def measure_it(size: int) -> float:
        measured.append(size)
        return float(size)

    measure = _by_size("turn", {size: partial(measure_it, size) for size in SIZES})
    assert measure() == {f"turn@{size}": float(size) for size in SIZES}
    for _ in range(2):
        assert list(measure()) == [f"turn@{FEW}", f"turn@{MANY}"]
    assert measured == [*SIZES, FEW, MANY, FEW, MANY]

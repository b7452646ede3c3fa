"""The rules of the Bridge hold through filters that pass everything on.

Here are the tests of the Bridge once more, with such filters in both directions.
"""

from __future__ import annotations

from typing import Any

import pytest

from relayd.stream.filtered_bridge import FilteredBridge
from relayd.stream.filtering import FilteredClosingBridge
from relayd.stream.legs import Leg
from tests.stream import (
    test_bridge,
    test_bridge_resets,
    test_closing_bridge,
    test_deadlines,
)
from tests.support.own_filters import Makes, Own
from tests.support.pairs import Pair, no_kernel, reset_unread, said

__all__ = ["no_kernel", "reset_unread", "said"]

#: Its leg has a `sink` of its own, which filters take the place of.
OTHERWISE = {"test_a_peer_is_judged_by_what_was_written_to_it"}

for _module in (
    test_bridge,
    test_bridge_resets,
    test_closing_bridge,
    test_deadlines,
):
    for _name, _test in vars(_module).items():
        # Hypothesis has one inner function for both places.
        is_own = _name.startswith("test_") and not hasattr(_test, "hypothesis")
        if is_own and _name not in OTHERWISE:
            assert _name not in globals(), _name
            globals()[_name] = _test


class _Factory:
    filters = (Makes(Own), Makes(Own))


@pytest.fixture(autouse=True)
def filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "joins", FilteredBridge)
    monkeypatch.setattr(test_closing_bridge.Closing, "joins", FilteredClosingBridge)
    factory: Any = _Factory
    monkeypatch.setattr(Leg, "factory", factory, raising=False)

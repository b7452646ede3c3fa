"""What several system tests share, and what each of them leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.gateway import Gateway, gateway


@pytest.fixture(scope="session")
def three_machines() -> Iterator[Gateway]:
    """Made once: that takes half a second."""
    with gateway() as made:
        yield made


@pytest.fixture
def network(three_machines: Gateway) -> Iterator[Gateway]:
    """The three machines; whatever a test does, it leaves no rule and no route."""
    before = three_machines.state()
    yield three_machines
    after = three_machines.state()
    if after != before:
        # Those of others are not to fail for that.
        three_machines.relayctl("netfilter", "remove", "--all")
    assert after == before

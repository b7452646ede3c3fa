"""What one end of a session in the soak checks."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from soak.stops import Stops
from soak.timeouts import Violation, check_time
from tests.tools.sessions import ends


@pytest.mark.parametrize(
    ("shut", "sent", "wrong"),
    [(True, 100, ""), (True, 101, "100 of 101"), (False, 100, "was not sent")],
)
def test_an_end_of_data_must_be_the_peers_and_complete(
    shut: bool, sent: int, wrong: str
) -> None:
    async def run() -> None:
        client, _ = ends(shut=shut, sent=sent)
        client.received = 100
        client.check_end()

    if wrong:
        with pytest.raises(Violation, match=wrong):
            asyncio.run(run())
    else:
        asyncio.run(run())


@pytest.mark.parametrize(("waited", "fine"), [(2.9, False), (3.0, True), (8.1, False)])
def test_an_abort_is_neither_early_nor_late(waited: float, fine: bool) -> None:
    if fine:
        check_time("aborted", waited, 3, 8)
    else:
        with pytest.raises(
            Violation, match=r"aborted after .* expected 3\.0 to 8\.0 s"
        ):
            check_time("aborted", waited, 3, 8)


@pytest.mark.parametrize(
    ("stopped", "late"), [(0.0, 0.0), (10.0, 0.0), (0.0, 10.0), (5.0, 5.0)]
)
def test_an_abort_may_be_late_if_the_relay_or_this_process_was(
    stopped: float, late: float
) -> None:
    async def run() -> None:
        stops = Stops()
        client, server = ends(shut=True, sent=0, stops=stops)
        now = asyncio.get_running_loop().time()
        stops.begin(now - 15)
        stops.end(now - 15 + stopped)
        stops.was_late(now - 5 - late, now - 5)
        poll: Any = SimpleNamespace(register=lambda *_: None, poll=lambda _: [1])
        client.moved_at = server.moved_at = now - 20
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("soak.ends.select.poll", lambda: poll)
            await client.until_aborted(5, early=True)

    if stopped or late:
        asyncio.run(run())
    else:
        with pytest.raises(Violation, match=r"aborted after 20\.\d s, expected"):
            asyncio.run(run())

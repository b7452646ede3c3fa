"""The soak's sessions, as a seed draws them."""

from __future__ import annotations

import attrs

from relayd.core.session import Ending
from soak.ends import Session
from soak.scripts import SCRIPTS, draw_session


def drawn(session: Session) -> tuple[object, ...]:
    return attrs.astuple(session, recurse=False)


def test_a_seed_draws_the_same_sessions_again() -> None:
    first = [drawn(draw_session(7, number)) for number in range(1, 200)]
    assert first == [drawn(draw_session(7, number)) for number in range(1, 200)]
    assert first != [drawn(draw_session(8, number)) for number in range(1, 200)]


def test_every_script_is_drawn() -> None:
    names = {draw_session(7, number).script.name for number in range(1, 5000)}
    assert names == {script.name for script in SCRIPTS}
    assert len(names) == len(SCRIPTS)


def test_scripts_expect_existing_endings() -> None:
    words = {ending.word for ending in Ending}
    assert {word for script in SCRIPTS for word in script.endings} <= words

"""A stand-in for a running relayd, which the commands find by RELAYD_CONTROL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from relayd.ctl.places import VARIABLE
from tests.support.control import FakeRelayd, fake_relayd


@pytest.fixture
def relayd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRelayd]:
    path = tmp_path / "control.sock"
    monkeypatch.setenv(VARIABLE, f"unix:{path}")
    with fake_relayd(path) as server:
        yield server

"""The manual pages, set by the programs that people read them with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.system.programs import program

pytestmark = pytest.mark.system

PAGES = sorted((Path(__file__).parents[2] / "man").iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_it_is_set_without_a_warning(page: Path) -> None:
    """Neither has groff one, with all of them on, nor has man."""
    setting = (program("groff"), "-ww", "-man", "-Tutf8", "-Z", page)
    done = subprocess.run(setting, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    reading = (program("man"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page)
    environ = {**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": ""}
    done = subprocess.run(
        reading, capture_output=True, text=True, check=True, env=environ
    )
    assert done.stderr == ""
    assert done.stdout

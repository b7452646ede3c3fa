"""Modules with routes, as an operator writes them: files that a test may change."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


class RouteModules:
    """A folder of them, which is on the path.

    :ivar path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: set[str] = set()

    def write(self, body: str, name: str = "myroutes") -> Path:
        """Write one.

        :param body: of `async def route(conn)`, on one line; or a whole module.
        """
        if "\n" not in body:
            body = f"async def route(conn):\n    {body}\n"
        path = self.path / f"{name}.py"
        path.write_text(body)
        self._names.add(name)
        return path

    def forget(self) -> None:
        """They are imported no more."""
        for name in self._names:
            sys.modules.pop(name, None)


@pytest.fixture
def route_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RouteModules]:
    path = tmp_path / "modules"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    modules = RouteModules(path)
    yield modules
    modules.forget()

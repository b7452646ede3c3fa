"""Packages that bring filters, as pip would have installed them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relayd.filters.loading import GROUP, brought


def install(folder: Path, name: str, code: str, **filters: str) -> None:
    """A package of one module, and what tells others of it.

    :param folder: a folder of packages.
    :param name: of the package, and of its module.
    :param code: of the module.
    :param filters: the entry points, by the names of the filters.
    """
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    )
    lines = [f"{each} = {where}\n" for each, where in filters.items()]
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n" + "".join(lines))


class Packages:
    """Those of one test.

    :param folder: of packages.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def install(self, name: str, code: str, **filters: str) -> None:
        """See :func:`install`."""
        install(self._folder, name, code, **filters)
        # Python looks into a folder again when its time has changed, to some ms.
        importlib.invalidate_caches()
        brought.cache_clear()


@contextmanager
def installed(folder: Path) -> Iterator[Packages]:
    """A folder of packages that this process imports from; nothing is left of it."""
    folder.mkdir()
    sys.path.insert(0, str(folder))
    brought.cache_clear()
    try:
        yield Packages(folder)
    finally:
        sys.path.remove(str(folder))
        brought.cache_clear()
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(folder)):
                del sys.modules[name]

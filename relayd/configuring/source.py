"""Where the settings of a running process came from, so that they can be read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import attrs

from relayd.configuring.file import STDIN
from relayd.configuring.given import Layers, RelaySection

#: What the command line calls standard input.
_STDIN = "-"


@attrs.frozen(eq=False)
class Source:
    """A command line, and maybe a file or a folder.

    :ivar own: what the command line says itself.
    :ivar first: what both have said at first.
    :ivar path: of the file or folder; None: there is none.
    :ivar read_file: reads it; see :func:`relayd.configuring.file.read_layers`.
    """

    own: Layers
    first: Layers
    path: str | None = None
    read_file: Callable[[str], Layers] | None = None

    @classmethod
    def of_file(
        cls, own: Layers, path: str, read_file: Callable[[str], Layers]
    ) -> Source:
        """A command line and a file, which is read now.

        It may be read again from another folder, as that of a daemon.
        """
        first = own.over(read_file(path))
        there = path if path == _STDIN else os.path.abspath(path)
        return cls(own, first, there, read_file)

    @property
    def why_not(self) -> str:
        """Why it can't be read again; empty if it can."""
        if self.path is None:
            return "there is no file to read again: start it with --config FILE"
        if self.path == _STDIN:
            return f"{STDIN} can't be read again: give a file"
        return ""

    def read(self) -> Layers:
        """What is said now; with `problems`, if there are any.  May take a while."""
        if self.path is None or self.read_file is None:
            return self.own
        return self.own.over(self.read_file(self.path))


def with_names(
    relays: Sequence[RelaySection], names: Sequence[str]
) -> Sequence[RelaySection]:
    """The same relays, each with the name that it has got."""
    return [
        attrs.evolve(each, name=name) for each, name in zip(relays, names, strict=True)
    ]

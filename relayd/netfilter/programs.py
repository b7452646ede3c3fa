"""Runs nft and ip, and says in a line what has gone wrong.

Both are asked to speak JSON, in no language but C's.  They end within `LIMIT` seconds,
or are killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import attrs

from relayd.core.errors import NetfilterError

#: Within how many seconds a program has ended.
LIMIT = 10.0

#: Where programs for administrators are, which others may not have on their PATH.
_ADMIN = "/usr/local/sbin:/usr/sbin:/sbin"

#: The packages of Debian that have them.
_PACKAGES = {"nft": "nftables", "ip": "iproute2"}

#: What they say if there is no such table, or the kernel has none at all.
_NOTHING = ("No such file or directory", "does not exist", "not supported")

#: What the kernel says to whom it does not let change anything.
_NOT_PERMITTED = "Operation not permitted"


@attrs.frozen
class Ended:
    """What a program has said.

    :ivar problem: on standard error, the first line of it; empty: it has done all.
    """

    output: str
    problem: str


class Missing(NetfilterError):
    """A program is not installed."""


def run(name: str, *words: str, given: str = "") -> Ended:
    """Run a program, and wait until it has ended.

    :param given: on its standard input.
    :raises Missing: it is not installed.
    :raises NetfilterError: it has not ended in time, or may not do this.
    """
    path = _path()
    try:
        done = subprocess.run(  # noqa: S603 - no shell, and words of ours
            [name, *words],
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT,
            check=False,
            env={**os.environ, "PATH": path, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise Missing(_not_installed(name)) from None
    except subprocess.TimeoutExpired:
        raise NetfilterError(f"{name} has not ended within {LIMIT:g} s") from None
    except OSError as problem:
        raise NetfilterError(f"{name} can't be run: {problem.strerror}") from None
    if done.returncode == 0:
        return Ended(done.stdout, "")
    if _NOT_PERMITTED in done.stderr:
        raise NetfilterError(
            "rules of netfilter can't be seen or changed: that takes the right"
            " CAP_NET_ADMIN; run it as root"
        )
    return Ended(done.stdout, _line_of(done.stderr) or f"exit code {done.returncode}")


def missing() -> list[str]:
    """Which of the programs are not installed: a line for each."""
    return [
        _not_installed(name)
        for name in _PACKAGES
        if shutil.which(name, path=_path()) is None
    ]


def _path() -> str:
    """Where programs are looked for."""
    return f"{os.environ.get('PATH', os.defpath)}:{_ADMIN}"


def _not_installed(name: str) -> str:
    return f"{name} is not installed: it is of the package {_PACKAGES[name]}"


def _line_of(text: str) -> str:
    """The first line of what a program says is wrong."""
    line = next((each for each in text.splitlines() if each.strip()), "").strip()
    # Where in the input, which nobody has seen.
    _, found, why = line.partition("Error: ")
    return why if found else line


def listed(name: str, *words: str) -> Any:
    """What a program lists, from JSON; None: there is nothing of that.

    :raises NetfilterError: as of :func:`run`, or it can't be listed.
    """
    done = run(name, *words)
    if any(each in done.problem for each in _NOTHING):
        return None
    if done.problem:
        raise NetfilterError(f"{name} {' '.join(words)}: {done.problem}")
    if not done.output.strip():
        return []
    try:
        return json.loads(done.output)
    except (ValueError, RecursionError):
        raise NetfilterError(
            f"{name} {' '.join(words)} does not list JSON: it may be too old"
        ) from None


def changed(name: str, words: Sequence[str]) -> None:
    """Have a program change something.

    :raises NetfilterError: it can't.
    """
    done = run(name, *words)
    if done.problem:
        raise NetfilterError(f"{name} {' '.join(words)}: {done.problem}")

"""The limit of open files: raised as the command starts.

A session takes two descriptors, and a flow one.  Most systems start a process with a
soft limit of 1,024 (for programs that use select(2), which can watch no more) and a
hard one of some hundred thousands.  So the soft limit is raised to the hard one, or to
what the operator asks for.

What is derived from it has a limit of its own, as the hard one may be a thousand
millions: in containers it often is.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from twisted.logger import Logger

from relayd.core.errors import ConfigError

log = Logger(namespace="relayd.limits")

#: What select(2) can watch.
FD_SETSIZE = 1024

#: Linux: the most that a hard limit may be; and what stands for "no limit" elsewhere.
_NR_OPEN, _MANY = Path("/proc/sys/fs/nr_open"), 1 << 20


def raise_open_files(asked: int | None, reactor: Any) -> None:
    """Set the soft limit of open files.

    :param asked: what it is to be; None: as many as the hard limit allows.
    :raises ConfigError: what is asked for can't be had.
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError as problem:
        # A sandbox refuses.
        _refused(asked, problem)
        return
    limit = asked or _largest(hard)
    if _selects(reactor):
        if asked and asked > FD_SETSIZE:
            raise ConfigError(
                f"max-descriptors {asked} can't be had: the select reactor can't watch"
                f" more than {FD_SETSIZE}: leave out --reactor=select"
            )
        limit = min(limit, FD_SETSIZE)
    enough = soft == resource.RLIM_INFINITY or soft >= limit
    if limit == soft or (enough and not asked):
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, _at_least(hard, limit)))
    except (OSError, ValueError) as problem:
        _refused(asked, problem)
    else:
        log.info(
            "the limit of open files is {limit} now, it was {soft}",
            limit=limit,
            soft=soft,
        )


def _largest(hard: int) -> int:
    """The largest soft limit below a hard one."""
    if hard != resource.RLIM_INFINITY:
        return hard
    try:
        return int(_NR_OPEN.read_text())
    except (OSError, ValueError):
        return _MANY


def _at_least(hard: int, limit: int) -> int:
    """The hard limit that goes with a soft one."""
    return hard if hard == resource.RLIM_INFINITY else max(hard, limit)


def _selects(reactor: Any) -> bool:
    """Whether the reactor is the one that uses select(2)."""
    module = sys.modules.get("twisted.internet.selectreactor")
    return module is not None and isinstance(reactor, module.SelectReactor)


def _refused(asked: int | None, problem: Exception) -> None:
    if asked:
        raise ConfigError(
            f"max-descriptors {asked} can't be had:"
            f" {getattr(problem, 'strerror', problem)}: raise the hard limit first"
            " (ulimit -Hn, or LimitNOFILE= of its unit)"
        ) from problem

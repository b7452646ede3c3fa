"""Runs what keeps pools up to date, for as long as their relays run.

Names are followed and servers checked from the moment in which the listeners open.
"""

from __future__ import annotations

from collections.abc import Iterable

from twisted.application.service import Service

from relayd.upstreams.pool import Task


class PoolTasks(Service):
    """The tasks of all pools of a process.

    :param tasks: to start and stop.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = tuple(tasks)

    def startService(self) -> None:
        super().startService()
        for each in self._tasks:
            each.start()

    def stopService(self) -> None:
        for each in self._tasks:
            each.stop()
        super().stopService()

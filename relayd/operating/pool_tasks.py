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

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        #: In their order; each once.
        self._tasks = dict.fromkeys(tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def startService(self) -> None:
        super().startService()
        for each in self._tasks:
            each.start()

    def stopService(self) -> None:
        for each in self._tasks:
            each.stop()
        super().stopService()

    def add(self, tasks: Iterable[Task]) -> None:
        """Run some more, at once if these run; one that is there already goes on."""
        for each in tasks:
            if each not in self._tasks:
                self._tasks[each] = None
                if self.running:
                    each.start()

    def remove(self, tasks: Iterable[Task]) -> None:
        """Run some no longer."""
        for each in tasks:
            if each in self._tasks:
                del self._tasks[each]
                if self.running:
                    each.stop()

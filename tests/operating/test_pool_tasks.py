"""The tasks of pools, while relays come and go."""

from __future__ import annotations

from relayd.operating.pool_tasks import PoolTasks


class Task:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self) -> None:
        self.told.append("start")

    def stop(self) -> None:
        self.told.append("stop")


def test_they_run_while_it_runs() -> None:
    tasks = [Task(), Task()]
    service = PoolTasks(tasks)
    for _ in range(2):
        service.startService()
        service.stopService()
    assert [each.told for each in tasks] == [["start", "stop", "start", "stop"]] * 2


def test_one_that_comes_while_it_runs() -> None:
    """It is started at once, and only once; and stopped with the others."""
    first, second = Task(), Task()
    service = PoolTasks()
    service.startService()
    service.add([first])
    service.add([first, second])
    assert len(service) == 2
    service.stopService()
    assert first.told == second.told == ["start", "stop"]


def test_one_that_goes_while_it_runs() -> None:
    first, second = Task(), Task()
    service = PoolTasks([first, second])
    service.startService()
    service.remove([first, Task()])
    service.remove([first])
    assert first.told == ["start", "stop"]
    service.stopService()
    assert first.told == second.told == ["start", "stop"]


def test_what_changes_while_it_does_not_run() -> None:
    """It is told when it starts."""
    first, second = Task(), Task()
    service = PoolTasks([first])
    service.add([second])
    service.remove([first])
    assert first.told == second.told == []
    service.startService()
    assert (first.told, second.told) == ([], ["start"])
    service.stopService()

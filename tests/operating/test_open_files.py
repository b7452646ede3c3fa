"""The limit of open files: raised where it can be, or as it was asked for."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.selectreactor import SelectReactor
from twisted.logger import capturedLogs, formatEvent

from relayd.core.errors import ConfigError
from relayd.operating import open_files
from relayd.operating.open_files import raise_open_files
from tests.support.process import relay

NEVER = resource.RLIM_INFINITY


class Limits:
    """Stands in for the kernel's."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, root: bool = True
    ) -> None:
        self.now = (soft, hard)
        self.root = root
        monkeypatch.setattr(resource, "getrlimit", lambda what: self.now)
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def set(self, what: int, limits: tuple[int, int]) -> None:
        assert what == resource.RLIMIT_NOFILE
        soft, hard = limits
        if hard != self.now[1] and not self.root:
            raise ValueError("not allowed to raise maximum limit")
        assert hard == NEVER or 0 < soft <= hard
        self.now = limits


def said(asked: int | None, reactor: Any = None) -> list[str]:
    """What is logged of it."""
    with capturedLogs() as events:
        raise_open_files(asked, reactor)
    return [str(formatEvent(event)) for event in events]


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "then"),
    [
        (1024, 524_288, None, (524_288, 524_288)),
        (1024, 10**9, None, (10**9, 10**9)),
        (4096, 4096, None, (4096, 4096)),
        (NEVER, NEVER, None, (NEVER, NEVER)),
        (1024, NEVER, None, (2000, NEVER)),
        (1024, 4096, 2048, (2048, 4096)),
        (1024, 4096, 512, (512, 4096)),
        (1024, 4096, 8192, (8192, 8192)),
        (1024, NEVER, 8192, (8192, NEVER)),
        (1024, 4096, 1024, (1024, 4096)),
    ],
)
def test_it_is_raised_or_set(
    soft: int,
    hard: int,
    asked: int | None,
    then: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It is lowered only if that is asked for; and said if it changes."""
    nr_open = tmp_path / "nr_open"
    nr_open.write_text("2000\n")
    monkeypatch.setattr(open_files, "_NR_OPEN", nr_open)
    limits = Limits(monkeypatch, soft, hard)
    lines = said(asked)
    assert limits.now == then
    changed = then[0] != soft
    expected = f"the limit of open files is {then[0]} now, it was {soft}"
    assert lines == ([expected] if changed else [])


def test_where_the_kernel_does_not_say_what_is_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(open_files, "_NR_OPEN", tmp_path / "none")
    limits = Limits(monkeypatch, 1024, NEVER)
    said(None)
    assert limits.now == (1 << 20, NEVER)


def test_what_can_not_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, 1024, 4096, root=False)
    with pytest.raises(ConfigError) as caught:
        said(8192)
    assert str(caught.value) == (
        "max-descriptors 8192 can't be had: not allowed to raise maximum limit: raise"
        " the hard limit first (ulimit -Hn, or LimitNOFILE= of its unit)"
    )
    assert limits.now == (1024, 4096)


def test_a_sandbox_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it stays as it is; unless something was asked for."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    Limits(monkeypatch, 1024, 4096)
    for name in ("setrlimit", "getrlimit"):
        monkeypatch.setattr(resource, name, refuse)
        assert said(None) == []
        with pytest.raises(ConfigError, match="2048 can't be had: Operation not"):
            said(2048)


def test_select_can_not_watch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    reactor = SelectReactor.__new__(SelectReactor)
    limits = Limits(monkeypatch, 256, 4096)
    said(None, reactor)
    assert limits.now == (1024, 4096)
    with pytest.raises(ConfigError, match="the select reactor can't watch more than"):
        said(1025, reactor)
    said(100, reactor)
    assert limits.now == (100, 4096)


@pytest.mark.parametrize("asked", [(), ("--max-descriptors", "300")])
def test_a_relay_has_as_many_as_it_may(asked: tuple[str, ...]) -> None:
    def as_a_shell_limits_it() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000))

    many = int(asked[1]) if asked else 2000
    options = ("-l", "127.0.0.1:0", "-d", "80", *asked)
    with relay(*options, preexec_fn=as_a_shell_limits_it) as running:
        running.wait_for(f"the limit of open files is {many} now, it was 256")
        limits = Path(f"/proc/{running.process.pid}/limits").read_text()
        assert limits.split("Max open files")[1].split()[:2] == [str(many), "2000"]

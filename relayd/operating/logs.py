"""What a command writes for its operator: its log, and maybe an access log beside it.

The lines of sessions and flows are events of Twisted's logger where others take them:
syslog, `twist`, a log file of `twistd`, a program that runs the service itself.
Otherwise they are written as they are, for a tenth of the cost: to standard output if
the log is there, or to what `--access-log` names.  They look the same.

With `--log-format json` each line is a JSON object, in all that is written here: lines
of sessions and flows, and what else the process logs, so that whoever collects standard
output finds one object a line.  Where others write the log (syslog, `twist`), an event
about a session has its object as its text, behind what they put in front of it, and the
other events are as ever.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from relayd.core import process_settings
from relayd.core.errors import CannotStart
from relayd.observing.line_log import LineLog
from relayd.operating.log_file import AnyLogFile, TwistdLog, TwistLog, WrittenLog
from relayd.operating.log_levels import LogLevels

#: Access logs that are standard output: it may be no file that can be opened by a name,
#: and a file would be written at two places at once.
STANDARD_OUTPUT = ("-", "/dev/stdout")


class Logs:
    """The logs of a command.

    :param reactor: an access log ends after everything else that it runs.
    :param command: its name, with which errors begin.
    :param log: what `twistd` or `twist` logs to; None: anything else.
    :param access_log: a path, or `-`; None: lines of sessions go where the log goes.
    :param daemon: the process will be one, which has no standard output.
    :param log_format: of every line.

    :ivar lines: for the lines of sessions and flows.
    :ivar levels: how much else is written.
    """

    def __init__(
        self,
        reactor: Any,
        command: str,
        log: TwistdLog | TwistLog | None = None,
        access_log: str | None = None,
        *,
        daemon: bool = False,
        log_format: process_settings.LogFormat = process_settings.LOG_FORMAT.default,
    ) -> None:
        as_json = log_format == "json"
        self.lines = LineLog(as_json=as_json)
        self._reactor = reactor
        self._command = command
        self._log = log
        self._given = access_log
        self._access: WrittenLog | None = None
        if access_log is not None:
            name = None if access_log in STANDARD_OUTPUT else access_log
            self._access = WrittenLog(reactor, name, "the access log")
        for each in (log, self._access):
            if isinstance(each, WrittenLog):
                each.as_json = as_json
        self._daemon = daemon
        self.levels = log.levels if isinstance(log, TwistdLog) else LogLevels()

    @property
    def files(self) -> list[AnyLogFile]:
        """Those that SIGUSR1 reopens."""
        logs: list[Any] = [self._log, self._access]
        return [each for each in logs if each is not None and each.path is not None]

    @property
    def lines_lost(self) -> int:
        """How many lines nothing has taken in time."""
        logs = (self._log, self._access)
        return sum(each.lost for each in logs if isinstance(each, WrittenLog))

    @property
    def waiting(self) -> int:
        """How many bytes wait in the log that has most of them."""
        written = (self._log, self._access)
        logs = [each.writer for each in written if isinstance(each, WrittenLog)]
        return max([each.waiting for each in logs if each is not None], default=0)

    def attach(self, parent: object) -> None:
        """Open them, and have the application log to its own.

        :param parent: the parent of the service.
        :raises CannotStart: one can't be opened.
        """
        log, access = self._log, self._access
        if isinstance(log, TwistdLog):
            other = "another with --logfile, or run it with -n"
            with self._opening("log file", log.path, other):
                attached = log.attach(parent)
            if attached:
                # When `twistd` has logged its last line.
                atexit.register(log.finish)
                if log.path is None:
                    self._write_to(log)
        if access is not None:
            self._check(access)
            if access.path is not None or self.lines.write is None:
                with self._opening("access log", access.path, "another path"):
                    access.open()
                self._write_to(access)
                self._reactor.addSystemEventTrigger("after", "shutdown", self._end)

    def _write_to(self, log: WrittenLog) -> None:
        as_json = self.lines.as_json
        self.lines.write = log.write_object if as_json else log.write_line

    def _check(self, access: WrittenLog) -> None:
        if access.path is None:
            if self._daemon:
                raise CannotStart(
                    f"{self._command}: bad --access-log {self._given!r}: a daemon has"
                    " no standard output: give a path, or run it with -n"
                )
        elif self._log is not None and access.path == self._log.path:
            raise CannotStart(
                f"{self._command}: bad --access-log {access.path!r}: it is the log"
                " file, where these lines go without it: leave it out, or give another"
            )

    @contextmanager
    def _opening(self, what: str, path: str | None, other: str) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise CannotStart(
                f"{self._command}: can't open the {what} {path!r}: {problem.strerror}:"
                f" give {other}"
            ) from problem

    def _end(self) -> None:
        """Nothing is left that writes sessions' lines: tell in the log what is lost."""
        if self._access is not None:
            self._access.finish()
            self._access.close()

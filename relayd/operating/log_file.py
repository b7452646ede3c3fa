"""The log of a command, and its access log: opened, reopened on SIGUSR1, ended.

logrotate and similar programs rename a log file, create a new one with the old name or
leave that to the program, and send SIGUSR1.  Then the new file is opened first, and the
old one is kept if that fails.

`twistd` uses an application's log observer (an `ILogObserver` component), if it has
one, instead of its own.  So :meth:`TwistdLog.attach` adds one, and everything that the
process logs goes through one writer, which never waits
(:mod:`relayd.operating.log_writer`).  `twist` has opened its log before, and writes it
by itself; :class:`TwistLog` replaces the file behind its descriptor.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from io import TextIOWrapper
from typing import IO, Any, Protocol, cast

from twisted.logger import (
    FileLogObserver,
    ILogObserver,
    LogEvent,
    Logger,
    formatEventAsClassicLogText,
)
from twisted.python.components import Componentized
from twisted.python.logfile import LogFile

from relayd.observing.json_lines import JsonLines
from relayd.observing.log_times import LogTimes
from relayd.operating.log_events import event_line
from relayd.operating.log_levels import LogLevels
from relayd.operating.log_writer import LogWriter
from relayd.operating.outlets import (
    ClosedOutlet,
    FifoOutlet,
    Outlet,
    open_to_append,
    outlet_of,
)

log = Logger(namespace="relayd.log")

#: The default log file of a daemon.
DAEMON_LOG = "twistd.log"

#: Bytes after which twistd starts a new file: twistd's own default.
ROTATE_LENGTH = 1_000_000


class AnyLogFile(Protocol):
    """A log file that can be reopened.

    :ivar path: its name, absolute.
    """

    path: str

    def reopen(self) -> None:
        """Open the file of this name again.

        :raises OSError: it can't be opened; logging continues to the old file.
        """


class _RotatedOutlet(Outlet):
    """A log file that starts anew when it is ROTATE_LENGTH bytes long, as twistd's do.

    The old one is `path.1`, and so on.  A device, such as /dev/null, is not renamed,
    nor is what leads to one, such as /dev/stdout.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        super().__init__(descriptor)
        self._path = path
        found = os.fstat(descriptor)
        named = not path.startswith(("/dev/", "/proc/"))
        self._rotates = named and stat.S_ISREG(found.st_mode)
        self._size = found.st_size

    def write(self, data: bytes | memoryview) -> int:
        if self._rotates and self._size >= ROTATE_LENGTH:
            # If it can't, the next try is another megabyte later.
            self._size = 0
            with suppress(OSError):
                self._rotate()
        taken = super().write(data)
        self._size += taken
        return taken

    def _rotate(self) -> None:
        mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        file = LogFile.fromFullPath(self._path, defaultMode=mode)
        file.rotate()
        file.close()
        descriptor = open_to_append(self._path)
        os.close(self._descriptor)
        self._descriptor = descriptor


class WrittenLog:
    """A log that this process writes: a file, or standard output.

    :param reactor: for what waits to be written.
    :param name: of the file; None: standard output.
    :param what: what it is called in a warning.
    :param rotates: it starts a new file when it is long.

    :ivar path: of the file, absolute; None for standard output.
    :ivar writer: once it is open.
    :ivar as_json: each of its lines is a JSON object; set before it is opened.
    :ivar objects: makes these.
    """

    as_json = False

    def __init__(
        self, reactor: Any, name: str | None, what: str, *, rotates: bool = False
    ) -> None:
        # `twistd` may change its working directory later.
        self.path = None if name is None else os.path.abspath(name)
        self.writer: LogWriter | None = None
        self._reactor = reactor
        self._what = what
        self._encoding = "utf-8"
        self._rotates = rotates
        self._mode: int | None = None
        self._times = LogTimes()
        self.objects = JsonLines(self._times)

    @property
    def lost(self) -> int:
        """How many lines nothing has taken in time."""
        return 0 if self.writer is None else self.writer.lost

    def open(self) -> None:
        """Open it.

        :raises OSError: it can't be opened.
        """
        self.writer = LogWriter(self._reactor, self._outlet(), self._tell)

    def reopen(self) -> None:
        """See :meth:`AnyLogFile.reopen`."""
        if self.writer is not None and self.path is not None:
            self.writer.replace_outlet(self._outlet())

    def close(self) -> None:
        """Stop logging."""
        if self.writer is not None:
            self.writer.replace_outlet(ClosedOutlet())
            self.writer = None

    def write_line(self, namespace: str, line: str, level: str = "info") -> None:
        """Write a line with the time, as an event of this namespace would look."""
        if self.as_json:
            self.write(f"{self.objects.message(namespace, level, line)}\n")
        else:
            self.write(f"{self._times.now()} [{namespace}#{level}] {line}\n")

    def write_object(self, namespace: str, line: str) -> None:
        """Write a line that is a JSON object, and so has its time and its name."""
        self.write(f"{line}\n")

    def write(self, text: str) -> None:
        """Write text, which ends with a newline."""
        if self.writer is not None:
            self.writer.write(text.encode(self._encoding, "backslashreplace"))

    def finish(self) -> None:
        """The process ends: write what can be written, and tell what is lost."""
        if self.writer is not None:
            lost, total = self.writer.finish()
            if lost:
                self._tell(lost, total)

    def _outlet(self) -> Outlet:
        if self.path is None:
            # That of the locale, or PYTHONIOENCODING.
            self._encoding = getattr(sys.__stdout__, "encoding", "utf-8")
            return _output(sys.__stdout__)
        # A new file gets the mode of the old one, regardless of the umask.
        made = self._mode is not None and not os.path.exists(self.path)
        descriptor = open_to_append(self.path)
        if made and self._mode is not None:
            os.fchmod(descriptor, self._mode)
        mode = os.fstat(descriptor).st_mode
        self._mode = stat.S_IMODE(mode)
        if stat.S_ISFIFO(mode):
            return FifoOutlet(descriptor)
        if self._rotates:
            return _RotatedOutlet(self.path, descriptor)
        return Outlet(descriptor)

    def _tell(self, lost: int, total: int) -> None:
        log.warn("{line}", line=self._loss(lost, total))

    def _loss(self, lost: int, total: int) -> str:
        return (
            f"{lost} lines of {self._what} were lost, {total} in all: what reads it did"
            " not keep up, or it can't be written"
        )


class TwistdLog(WrittenLog):
    """The log of `twistd`: everything that the process logs.

    :param reactor: see :class:`WrittenLog`.
    :param name: the value of --logfile; None: standard output.

    :ivar levels: how much of it is written.
    """

    def __init__(self, reactor: Any, name: str | None) -> None:
        super().__init__(reactor, name, "the log", rotates=True)
        self.levels = LogLevels()

    def attach(self, parent: object) -> bool:
        """Log to it from the start of the application on, if nothing else is said.

        :param parent: the parent of the service.
        :return: whether it is what the application logs to.
        :raises OSError: it can't be opened.
        """
        # Otherwise it is an embedder's service collection, which logs by itself.
        application: Any = parent
        if not isinstance(application, Componentized):
            return False
        if application.getComponent(ILogObserver, None) is not None:
            return False
        self.open()
        observer = FileLogObserver(cast(IO[Any], self), self._format)
        application.setComponent(ILogObserver, observer)
        self.levels.in_use = True
        return True

    def flush(self) -> None:
        """Called by Twisted's observer after each event; all is written already."""

    def _format(self, event: LogEvent) -> str | None:
        if not self.levels.shows(event):
            return None
        if self.as_json:
            return event_line(event, self.objects, self._times)
        return formatEventAsClassicLogText(event, formatTime=self._times)

    def finish(self) -> None:
        """See :meth:`WrittenLog.finish`: `twistd` has ended logging, so write it here.

        If even that is lost, it is said on standard error.
        """
        writer = self.writer
        if writer is None:
            return
        lost, total = writer.finish()
        if lost:
            line = self._loss(lost, total)
            self.write_line("relayd.log", line, "warn")
            if writer.finish()[0]:
                writer.replace_outlet(_output(sys.__stderr__))
                writer.write(f"relayd: {line}\n".encode())
                writer.finish()


class TwistLog:
    """The log file of `twist`, which has opened it already.

    :param file: the file that `twist` opened.
    """

    def __init__(self, file: IO[str]) -> None:
        self.path = os.path.abspath(file.name)
        self._file = file

    def reopen(self) -> None:
        """See :meth:`AnyLogFile.reopen`."""
        mode = stat.S_IMODE(os.fstat(self._file.fileno()).st_mode)
        # Opening a FIFO without a reader fails, instead of blocking for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        new = os.open(self.path, flags, mode)
        try:
            os.set_blocking(new, True)
            self._file.flush()
            os.dup2(new, self._file.fileno(), inheritable=False)
        finally:
            os.close(new)


def _escape_unencodable(stream: object) -> None:
    """Have a stream escape characters that its encoding lacks.

    Otherwise a log line with one of them, as in a file's name, would be lost.
    """
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def _descriptor(file: Any) -> int:
    """The file's descriptor; -1 if it has none."""
    try:
        return int(file.fileno())
    except (AttributeError, OSError, ValueError):
        return -1


def _output(stream: object) -> Outlet:
    """The outlet for standard output, or error, as the process was given it."""
    descriptor = _descriptor(stream)
    return ClosedOutlet() if descriptor < 0 else outlet_of(descriptor)


def log_of(
    options: Mapping[str, Any] | None, reactor: Any
) -> TwistdLog | TwistLog | None:
    """What `twistd` or `twist` logs to.

    Its stream, or standard output, escapes unencodable characters from now on.

    :param options: of `twistd` or `twist`; None: of neither.
    :return: None if that can be left to them: `--logger` or `--syslog`, or the output
        of `twist`.
    """
    if options is None:
        return None
    _escape_unencodable(sys.stdout)
    if "logFile" in options:
        file = options["logFile"]
        _escape_unencodable(file)
        # Up to 2 it is standard output or error; -1: it is closed.
        return TwistLog(file) if _descriptor(file) > 2 else None
    name = options["logfile"]
    # `twistd` has no syslog on Windows.
    if options.get("logger") or options.get("syslog"):
        return None
    if not is_daemon(options):
        return TwistdLog(reactor, None if name == "-" else name)
    # Which `twistd` refuses.
    return None if name == "-" else TwistdLog(reactor, name or DAEMON_LOG)


def is_daemon(options: Mapping[str, Any] | None) -> bool:
    """Whether `twistd` will make a daemon of this process."""
    if options is None or "logfile" not in options:
        return False
    return not (options["nodaemon"] or options["debug"])

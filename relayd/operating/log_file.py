"""The log file of a command, reopened by name on SIGUSR1.

logrotate and similar programs rename a log file, create a new one with the old name or
leave that to the program, and send SIGUSR1.  Twisted's `LogFile.reopen` closes the old
file first, and has none if the new one can't be opened.  :class:`TwistdLog` opens the
new file first, and keeps the old one if that fails.

`twistd` uses an application's log observer (an `ILogObserver` component), if it has
one, instead of its own.  So :meth:`TwistdLog.attach` adds one, for the file that the
options name.  `twist` has opened its file before; :class:`TwistLog` replaces the file
behind its descriptor.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from typing import IO, Any, Protocol, cast

from twisted.logger import ILogObserver, textFileLogObserver
from twisted.python.components import Componentized
from twisted.python.logfile import LogFile

from relayd.core.errors import CannotStart

#: The default log file of a daemon.
DAEMON_LOG = "twistd.log"

#: Bytes after which twistd starts a new file: twistd's own default.
ROTATE_LENGTH = 1_000_000


class AnyLogFile(Protocol):
    """A log file that can be reopened.

    :ivar path: its name, absolute.
    """

    path: str

    def attach(self, parent: object) -> None:
        """Log to it from the start of the application on.

        :param parent: the parent of the service.
        :raises OSError: the file can't be opened.
        """

    def reopen(self) -> None:
        """Open the file of this name again.

        :raises OSError: it can't be opened; logging continues to the old file.
        """


class TwistdLog:
    """The log file of `twistd`.

    :param name: the value of --logfile.
    """

    def __init__(self, name: str) -> None:
        # `twistd` may change its working directory later.
        self.path = os.path.abspath(name)
        self._file: LogFile | None = None
        self._mode: int | None = None

    def attach(self, parent: object) -> None:
        """See :meth:`AnyLogFile.attach`."""
        # Otherwise it is an embedder's service collection, which logs by itself.
        application: Any = parent
        if not isinstance(application, Componentized):
            return
        if application.getComponent(ILogObserver, None) is None:
            self.reopen()
            observer = textFileLogObserver(cast(IO[Any], self))
            application.setComponent(ILogObserver, observer)

    def reopen(self) -> None:
        """See :meth:`AnyLogFile.reopen`."""
        there = os.path.exists(self.path)
        file = LogFile.fromFullPath(
            self.path,
            # A device, such as /dev/null, must not be renamed.
            rotateLength=ROTATE_LENGTH if not there or os.path.isfile(self.path) else 0,
            # A new file gets the mode of the old one, regardless of the umask.
            defaultMode=None if there else self._mode,
        )
        self._mode = stat.S_IMODE(os.stat(self.path).st_mode)
        old, self._file = self._file, file
        if old is not None:
            old.close()

    def close(self) -> None:
        """Stop logging."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, text: str) -> None:
        """Called by Twisted's observer with each event, followed by `flush`."""
        if self._file is not None:
            self._file.write(text.encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        """Called by Twisted's observer after each event; see :meth:`write`."""
        if self._file is not None:
            self._file.flush()


class TwistLog:
    """The log file of `twist`, which has opened it already.

    :param file: the file that `twist` opened.
    """

    def __init__(self, file: IO[str]) -> None:
        self.path = os.path.abspath(file.name)
        self._file = file

    def attach(self, parent: object) -> None:
        """See :meth:`AnyLogFile.attach`: `twist` logs to it already."""

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


def log_file_of(options: Mapping[str, Any] | None) -> AnyLogFile | None:
    """The file that `twistd` or `twist` logs to.

    Its stream, or standard output, escapes unencodable characters from now on.

    :param options: of `twistd` or `twist`; None: of neither.
    :return: None if it logs to no file, or `--logger` says where to.
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
    if options.get("logger") or options.get("syslog") or name == "-":
        return None
    if not name and (options["nodaemon"] or options["debug"]):
        return None
    return TwistdLog(name or DAEMON_LOG)


def attach(file: AnyLogFile, parent: object, command: str) -> None:
    """As :meth:`AnyLogFile.attach`.

    :raises CannotStart: the file can't be opened.
    """
    try:
        file.attach(parent)
    except OSError as problem:
        raise CannotStart(
            f"{command}: can't open the log file {file.path!r}: {problem.strerror}:"
            " give another with --logfile, or run it with -n"
        ) from problem

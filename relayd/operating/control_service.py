"""The service behind `--control`: opens the socket that steers a running relayd.

It is the first part of a command to start and the last to stop, so that it answers
while the relays drain.  Imported only if it is asked for, as it takes twisted.web.

Who may do what is decided by who connects, which the kernel says.  Unless other users
are to come, the file of the socket has mode 0600 as well, from the moment it is there;
else 0666, as its mode can't tell them apart.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.configuring.address_settings import ALL
from relayd.control.peers import KNOWS_PEERS, Rights
from relayd.control.site import ControlSite
from relayd.control.steering import Steering
from relayd.core.errors import CannotStart, ConfigError
from relayd.net.binding import FOR_ALL
from relayd.net.listening import UNIXListenerEndpoint
from relayd.net.monotonic import monotonic
from relayd.operating.collecting import keep_for_good

log = Logger(namespace="relayd.control")

#: Clients that may wait in the kernel's queue.
BACKLOG = 128

#: The mode of the socket's file, for root and the user of this process alone.
OWN = 0o600


class ControlService(Service):
    """Serves the control socket.

    :param reactor: runs the relays.
    :param path: of the socket.  Its folder must exist; a socket file there that has no
        listener any more is replaced.
    :param steering: answers.
    :param uids: who may do all, beside root and the user of this process.
    :param read_uids: who may see all, and change nothing.
    :param command: its name, with which errors begin.
    :raises ConfigError: this system does not say who connects.

    :ivar port: the listener, while it is open.
    :ivar site: serves it.
    """

    def __init__(
        self,
        reactor: Any,
        path: str,
        steering: Steering,
        uids: Collection[int] = (),
        read_uids: Collection[int] = (),
        command: str = "relayd",
    ) -> None:
        if not KNOWS_PEERS:
            raise ConfigError(
                "--control needs a system that says who connects (SO_PEERCRED): leave"
                " it out"
            )
        self._reactor = reactor
        self._path = path
        self._command = command
        mode = FOR_ALL if uids or read_uids else OWN
        self._endpoint = UNIXListenerEndpoint(reactor, path, BACKLOG, mode)
        self.port: IListeningPort | None = None
        self.site = ControlSite(
            steering,
            monotonic(reactor),
            Rights(uids, read_uids),
            secrets=[row.key for row in ALL if row.secret],
        )

    def privilegedStartService(self) -> None:
        """Listen.

        :raises CannotStart: the socket can't be opened.
        """
        super().privilegedStartService()
        self._listen()

    def startService(self) -> None:
        """Listen, if `twist` has left out the privileged step.

        :raises CannotStart: likewise.
        """
        super().startService()
        self._listen()
        self._reactor.callWhenRunning(keep_for_good)

    def _listen(self) -> None:
        if self.port is not None:
            return
        problems: list[Failure] = []
        self._endpoint.listen(self.site).addCallbacks(self._opened, problems.append)
        if problems:
            why = self._why(problems[0])
            raise CannotStart(f"{self._command}: --control: {why}")

    def _opened(self, port: IListeningPort) -> None:
        self.port = port
        log.info("control socket at {path}", path=self._path)

    def _why(self, problem: Failure) -> str:
        """Why it can't be opened, and what to do."""
        folder = os.path.dirname(self._path)
        why = problem.getErrorMessage()
        if not os.path.isdir(folder):
            return f"{why}: there is no folder {folder}: make it"
        try:
            found = os.stat(self._path)
        except OSError:
            return why
        if stat.S_ISSOCK(found.st_mode):
            return f"{why}: another process listens there"
        return f"{why}: there is a file that is no socket"

    def stopService(self) -> Deferred[Any]:
        """Close the socket, remove its file, and close its connections."""
        super().stopService()
        return self.close()

    def close(self) -> Deferred[Any]:
        """The same; also of one that has not started."""
        port, self.port = self.port, None
        self.site.close()
        return maybeDeferred(port.stopListening if port is not None else bool)

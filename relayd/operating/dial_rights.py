"""Whether servers can still be dialled, once a process has given up its privileges.

How they are dialled is tried before anything listens (:mod:`relayd.operating.relays`).
With `--uid`, twistd becomes another user after that, who may lack a right that a mark
takes: each dial would fail.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from twisted.application.service import Service

from relayd.core.errors import CannotStart
from relayd.net.dial_options import DialOptions


class DialRights(Service):
    """Tries the options of dials again, if the user is another one by now.

    :param relays: of each relay what an error begins with, and its options.
    :param command: its name, with which errors begin.
    """

    def __init__(self, relays: Sequence[tuple[str, DialOptions]], command: str) -> None:
        self._relays = relays
        self._command = command
        self._user = os.geteuid()

    def startService(self) -> None:
        """:raises CannotStart: a relay can't dial: a line for each."""
        super().startService()
        if os.geteuid() == self._user:
            return
        problems = []
        for whose, options in self._relays:
            try:
                options.check()
            except OSError as problem:
                why = f"{whose}{problem.strerror} (as the user that it has become)"
                problems.append(f"{self._command}: {why}")
        if problems:
            raise CannotStart("\n".join(problems))

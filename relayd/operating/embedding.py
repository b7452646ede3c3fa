"""Relays that a program of its own runs, by the settings of a file, and steers.

For programs that embed relayd beside their own services, and want what `twistd relayd`
has: named relays that can be updated while they run, reload, and a control socket::

    relays = EmbeddedRelays.from_settings(
        reactor, {"tcp": {"web": {"listen": "8080", "dest": "10.0.0.5:80"}}}
    )
    relays.setServiceParent(application)
    ControlService(reactor, "/run/mine.sock", relays.steering).setServiceParent(
        application
    )
    ...
    await relays["web"].update({"dest": "10.0.0.6:80"})

What is the program's own stays so: its signals, its log, its metrics.  A program whose
relays never change needs none of this: :mod:`relayd.tcp` and its factories will do.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.given import Layers
from relayd.configuring.source import Source
from relayd.control.steering import Asker, Json
from relayd.core.errors import ConfigError
from relayd.core.process_settings import TRANSPORT
from relayd.operating.changing import CHANGEABLE, Relays
from relayd.operating.logs import Logs
from relayd.operating.steering import Steered, SteeringTimers

#: Settings of the process that embedded relays have, too.
_OURS = CHANGEABLE | {TRANSPORT.key}


class EmbeddedRelay:
    """One of them, by its name.

    Each method returns a Deferred of how the relay is then, as `relayctl --json` shows
    it; one that can't be done fails with a
    :class:`relayd.control.steering.Refusal`, and nothing has changed.
    """

    def __init__(self, steering: Steered, name: str) -> None:
        self._steering = steering
        self.name = name

    def update(self, settings: Mapping[str, Any]) -> Deferred[Json]:
        """Change settings, as a file has them; None: back to what was said at first.

        The next client gets the new ones; those under way are untouched.
        """
        return self._steering.set(self.name, settings, _myself())

    def start(self) -> Deferred[Json]:
        """Serve new clients."""
        return self._steering.start(self.name, _myself())

    def stop(self, *, cut: bool = False) -> Deferred[Json]:
        """Refuse new clients.

        :param cut: end those under way, too.
        """
        return self._steering.stop(self.name, cut, _myself())

    def pause(self, seconds: float | None = None) -> Json:
        """Hold new clients, until :meth:`resume`, or for so long."""
        return self._steering.pause(self.name, seconds, _myself())

    def resume(self) -> Json:
        """Serve those that are held, and others."""
        return self._steering.resume(self.name, _myself())


class EmbeddedRelays(MultiService):
    """The relays of a program.

    :param reactor: runs them.
    :param source: where their settings came from.
    :raises ConfigError: they are not valid: a line for each problem.

    :ivar steering: what a control socket takes
        (:class:`relayd.operating.control_service.ControlService`).
    """

    def __init__(self, reactor: Any, source: Source) -> None:
        super().__init__()
        config = configure(source.first)
        _check(source.first)
        logs = Logs(reactor, "relayd")
        relays = Relays(config, reactor, logs)
        self.steering = Steered(reactor, relays, source, logs)
        timers = SteeringTimers(self.steering)
        for each in (timers, relays.checks, relays.tasks, relays.service):
            each.setServiceParent(self)

    @classmethod
    def from_file(cls, reactor: Any, path: str) -> EmbeddedRelays:
        """Those of a file or a folder, which :meth:`Steered.reload` reads again.

        :raises ConfigError: it can't be read, or is not valid.
        """
        path = os.path.abspath(path)
        return cls(reactor, Source.of_file(Layers((), ()), path, read_layers))

    @classmethod
    def from_settings(cls, reactor: Any, settings: Mapping[str, Any]) -> EmbeddedRelays:
        """Those of tables, as a file has them.

        :raises ConfigError: they are not valid.
        """
        try:
            text = json.dumps(settings)
        except (TypeError, ValueError) as problem:
            raise ConfigError(f"settings are what a file can say: {problem}") from None
        first = read_layers("-", io.BytesIO(text.encode()))
        return cls(reactor, Source(first, first))

    def __getitem__(self, name: str) -> EmbeddedRelay:
        """:raises Unknown: there is none of this name."""
        self.steering.relay(name)
        return EmbeddedRelay(self.steering, name)


def _check(layers: Layers) -> None:
    """:raises ConfigError: something is said that is the program's own."""
    theirs = sorted({each.setting.key for each in layers.process} - _OURS)
    if theirs:
        raise ConfigError(
            f"{', '.join(theirs)}: it is for the program that embeds the relays: leave"
            " it out"
        )


def _myself() -> Asker:
    return Asker(os.geteuid(), os.getegid(), os.getpid())

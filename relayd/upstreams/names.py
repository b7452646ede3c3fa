"""Servers that a name stands for, followed as its addresses change.

A destination `dns:db.example.com:5432` is a server for each of the name's addresses,
`srv:_postgres._tcp.example.com` one for each of its services.  The name is looked up
again when its answer holds no longer, or after a fixed time, a little sooner or later
each time, so that many relays do not ask at once.

- *An answer with addresses*: those that are new join, those that are in it no longer
  leave: they get no new session, and those that they have go on.  One whose weight or
  priority is another now stays the same server, with its sessions and its health.
- *An answer with none*, or that there is no such name: the servers stay for the grace,
  in which a mistake in a zone may be mended; then they leave.  The name is looked up
  every few seconds until it has some.
- *No answer*: the servers stay.  If the addresses of one family are known, and not
  those of the other, only the servers of the other stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.net.dns import Answer, Found, LookUpFailed
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server

log = Logger(namespace="relayd.upstreams")

#: Seconds after which an answer is looked up again, at least and at most.
SHORTEST, LONGEST = 1.0, 3600.0

#: Seconds until a look-up that has failed, or has found no server, is tried again:
#: clients may be refused until then.
AFTER_FAILURE = 5.0

#: By how much the time until the next look-up may be shorter or longer.
JITTER = 0.1


class Follower:
    """Keeps the servers of one name in a pool.

    :param name: as the operator wrote it, for the log.
    :param look_up: asks the name servers; fails with
        :class:`relayd.net.dns.LookUpFailed`.
    :param make: a server for what was found.
    :param every: seconds between look-ups; None: what the answers say.
    :param grace: seconds for which servers stay that the name has no longer, if it has
        no others.
    :param clock: of the next look-up.

    :ivar answered: the name servers have answered, whatever they said.
    :ivar failures: how many look-ups have failed.
    """

    def __init__(
        self,
        name: str,
        pool: Pool,
        look_up: Callable[[], Deferred[Answer]],
        make: Callable[[Found], Server],
        *,
        clock: IReactorTime,
        every: float | None,
        grace: float,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self._pool = pool
        self._look_up = look_up
        self._make = make
        self._clock = clock
        self._every = every
        self._grace = grace
        self._chance = chance
        #: By address and port, and what was found of each.
        self._servers: dict[tuple[str, int], Server] = {}
        self._found: dict[tuple[str, int], Found] = {}
        self._next: IDelayedCall | None = None
        self._asking: Deferred[Any] | None = None
        self._running = False
        #: When the name has first had no servers; None: it has.
        self._empty_since: float | None = None
        #: What was last told of its failures, so that each is told once.
        self._told = ""
        self.answered = False
        self.failures = 0
        pool.pending += 1
        pool.followed.append(name)

    def start(self) -> None:
        """Look up, now and from now on."""
        if not self._running:
            self._running = True
            self._ask()

    def succeed(self, before: Follower) -> None:
        """Begin with the servers of another one that has followed the same name."""
        if before.answered and not self.answered:
            self.answered = True
            self._pool.pending -= 1
            self._change_to(before._found)

    def stop(self) -> None:
        """Look up no more; the servers stay as they are."""
        self._running = False
        timer, self._next = self._next, None
        if timer is not None and timer.active():
            timer.cancel()
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()

    def _ask(self) -> None:
        self._next = None
        asking = self._asking = self._look_up()
        asking.addCallbacks(self._answered, self._failed)
        asking.addErrback(self._defect)

    def _after(self, seconds: float) -> None:
        self._asking = None
        if self._running:
            spread = 1 + JITTER * (2 * self._chance() - 1)
            self._next = self._clock.callLater(seconds * spread, self._ask)

    def _answered(self, answer: Answer) -> None:
        if not self._running:
            return
        self._is_known()
        wait = self._every
        if wait is None:
            wait = min(max(answer.ttl, SHORTEST), LONGEST)
        if answer.found:
            self._empty_since = None
            self._told = ""
            self._use(answer.found)
        else:
            wait = min(wait, self._has_none(answer.why))
        self._after(wait)

    def _is_known(self) -> None:
        """The name servers have said something of it."""
        if not self.answered:
            self.answered = True
            self._pool.pending -= 1

    def _use(self, those: Iterable[Found]) -> None:
        """The servers are those that were found now."""
        wanted: dict[tuple[str, int], Found] = {}
        for found in those:
            end = found.address, found.port
            # Twice in a service: where it comes first.
            if end not in wanted or found.tier < wanted[end].tier:
                wanted[end] = found
        gone, new = self._change_to(wanted)
        for one in new:
            self._say("{server} joins", one)
        for one in gone:
            self._say("{server} leaves", one)

    def _change_to(
        self, wanted: dict[tuple[str, int], Found]
    ) -> tuple[list[Server], list[Server]]:
        """Have other servers.

        :return: those that leave, and those that join.
        """
        gone = {end: one for end, one in self._servers.items() if end not in wanted}
        new = {}
        for end, found in wanted.items():
            stays = self._servers.get(end)
            if stays is None:
                new[end] = self._make(found)
            elif found != self._found[end]:
                _revise(stays, self._found[end], found)
        self._found = wanted
        if gone or new:
            for end in gone:
                del self._servers[end]
            self._servers |= new
            self._pool.replace(gone.values(), new.values())
        return list(gone.values()), list(new.values())

    def _has_none(self, why: str) -> float:
        """The name has no servers; the seconds until they leave, if there are some."""
        now = self._clock.seconds()
        if self._empty_since is None:
            self._empty_since = now
        left = self._empty_since + self._grace - now
        if not self._servers:
            self._tell(f"{why}; nothing is sent")
            return AFTER_FAILURE
        if left > 0:
            self._tell(f"{why}; its servers stay for {self._grace:g} s")
            # Not sooner than the shortest, which the clock may fall short of.
            return min(max(left, SHORTEST), AFTER_FAILURE)
        self._tell(f"{why}; its servers leave")
        gone, self._servers = self._servers, {}
        self._pool.replace(gone.values(), ())
        for one in gone.values():
            self._say("{server} leaves", one)
        return AFTER_FAILURE

    def _failed(self, reason: Failure) -> None:
        if not self._running:
            return
        reason.trap(LookUpFailed)
        self.failures += 1
        problem: Any = reason.value
        if half := problem.half:
            self._is_known()
            known = {_is_ipv6(each) for each in half}
            stay = [
                each for each in self._found.values() if _is_ipv6(each) not in known
            ]
            self._empty_since = None
            self._use([*half, *stay])
        stays = "its servers stay" if self._servers else "nothing is sent"
        if half:
            stays = f"its {'IPv6' if True in known else 'IPv4'} addresses are known"
        self._tell(f"{reason.getErrorMessage()}; {stays}")
        self._after(min(self._every or AFTER_FAILURE, AFTER_FAILURE))

    def _defect(self, reason: Failure) -> None:
        """A defect, of ours or of a resolver: the name is looked up all the same."""
        if not self._running:
            return
        self.failures += 1
        log.failure("the look-up of {name} failed", reason, name=self.name)
        self._after(AFTER_FAILURE)

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            log.warn(
                "{relay}: {name}: {what}",
                relay=self._pool.relay,
                name=self.name,
                what=what,
            )

    def _say(self, what: str, server: Server) -> None:
        log.info("{relay}: " + what, relay=self._pool.relay, server=server.name)


def _is_ipv6(found: Found) -> bool:
    return ":" in found.address


def _revise(server: Server, before: Found, now: Found) -> None:
    """The name says something else of a server that stays."""
    server.tier += now.tier - before.tier
    if now.weight != before.weight:
        server.revise(now.weight)
    else:
        server.changed()

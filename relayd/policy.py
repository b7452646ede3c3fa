"""Gates: who may connect.

A gate is asked once for each accepted connection, before anything is dialled
for it, and hands out a lease that the session gives back when it has ended
(:class:`relayd.interfaces.IGate`).  A relay without a gate of its own uses the
open one, which costs a session nothing.
"""

from __future__ import annotations

from zope.interface import implementer

from relayd.interfaces import IGate, ILease
from relayd.session import Session


@implementer(IGate, ILease)
class OpenGate:
    """Lets everyone in; its lease is the gate itself, as there is nothing to count."""

    def enter(self, session: Session) -> ILease:
        return self

    def release(self) -> None:
        """Nothing was taken, nothing is given back."""

"""Why a connection is not read: the reasons for which a leg is paused.

Several may hold at once: a leg is paused when the first comes, and read again when
the last has gone (:meth:`relayd.stream.legs.Leg.pause`,
:meth:`relayd.stream.legs.Leg.resume`).  They are the bits of an int, so that a leg
costs nothing more than with one flag.

Only PEER_FULL says something about the other side.  It alone counts for the stall
timeout and for how a lost connection is read: no session is aborted because a pause
was asked for.
"""

from __future__ import annotations

#: The other leg's transport holds as much as it may.  It says so by `pauseProducing`
#: and `resumeProducing`: the leg is its registered producer.
PEER_FULL = 1

#: The leg keeps as much as it may before it is joined.
HOLDING = 2

#: The other leg's connection is lost, and this one is reset as soon as what was read
#: is delivered.  Nothing more is read from it.
RESET_PENDING = 4

#: A rate limit's allowance is used up.
ALLOWANCE = 8

#: The program that embeds the relay, or its operator, has asked for it.
ASKED = 16

#: The gate has not answered yet.
WAITING = 32

#: Its filters hold as much as they may.
FILTERS = 64

#: No other leg can be full before there is one.
BEFORE_JOINING = PEER_FULL | HOLDING

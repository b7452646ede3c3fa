"""Command lines for `twistd` and `twist`: options and wiring, no behaviour.

But for this: it is the first of our own that such a process loads, and a container's
first process must hear SIGTERM from there on.
"""

from relayd.operating.signals import hear_early

hear_early()

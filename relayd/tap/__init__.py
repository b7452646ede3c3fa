"""Command lines for `twistd` and `twist`: options and wiring, no behaviour.

Except that process 1 of a container must handle SIGTERM from the start: this package is
the first of relayd that such a process imports.
"""

from relayd.operating.signals import catch_early_sigterm

catch_early_sigterm()

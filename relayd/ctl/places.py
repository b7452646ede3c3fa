"""Where the control socket of a running relayd is looked for."""

from __future__ import annotations

import os

#: The variable that says where.
VARIABLE = "RELAYD_CONTROL"

#: Where a service of the machine has it.
OF_THE_MACHINE = "/run/relayd/control.sock"

#: What comes before a path, if anything does.
UNIX = "unix:"


def candidates(control: str | None) -> list[str]:
    """The paths at which it may be; the first that is there is taken.

    :param control: what was given: a path, or `unix:PATH`; None: nothing was.
    """
    if control is not None:
        return [control.removeprefix(UNIX)]
    own = os.environ.get("XDG_RUNTIME_DIR")
    return [OF_THE_MACHINE, *([f"{own}/relayd/control.sock"] if own else [])]

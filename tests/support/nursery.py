"""A process that has imported what `twistd` and `twist` do, and forks for tests.

Starting an interpreter and importing Twisted costs half a second of CPU, which a
thousand relays would pay.  Whoever starts a relay (`process.relay`) asks
here instead: each request is one packet, the arguments with two descriptors, for what
the new process writes and for what becomes of it: its number, and then its exit
status, a line each.

The reactor is not imported before the fork: `--reactor` chooses it.  That `twistd`
and `twist` start from nothing, `tests/tap/test_command_lines.py` shows.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.application.service import IServiceMaker
from twisted.application.twist._twist import Twist
from twisted.internet import posixbase
from twisted.plugin import getPlugins
from twisted.scripts import twistd

from relayd.tap import relayd, socks4
from tests.support import sandbox
from tests.support.setns import NAMED, enter

#: More than a request's arguments and environment.
REQUEST = 1 << 20

#: Imported for those who are forked.
__all__ = ["posixbase", "relayd", "socks4"]


def serve(asked: socket.socket) -> None:
    """Fork whatever is asked for.  Returns in each new process, and never in ours."""
    #: By the descriptor that tells its end: each process, and who is to hear of it.
    living: dict[int, tuple[int, int]] = {}
    events = select.poll()
    events.register(asked, select.POLLIN)
    while True:
        for ready, _ in events.poll():
            if ready != asked.fileno():
                events.unregister(ready)
                pid, news = living.pop(ready)
                tell(news, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(news)
                os.close(ready)
                continue
            data, (*descriptors,), *_ = socket.recv_fds(asked, REQUEST, 2)
            if not data:
                os._exit(0)
            output, news = descriptors
            pid = os.fork()
            if not pid:
                asked.close()
                for each, (_, theirs) in living.items():
                    os.close(each)
                    os.close(theirs)
                os.close(news)
                become(output, **json.loads(data))
                return
            os.close(output)
            tell(news, pid)
            end = os.pidfd_open(pid)
            living[end] = (pid, news)
            events.register(end, select.POLLIN)


def tell(news: int, number: int) -> None:
    """To who asked, unless they are gone."""
    with suppress(BrokenPipeError):
        os.write(news, b"%d\n" % number)


def become(
    output: int,
    argv: list[str],
    env: dict[str, str],
    cwd: str,
    refusing: dict[str, int],
    namespace: str,
) -> None:
    """Be as a process is that was just started, maybe in a sandbox.

    :param namespace: the name of the network namespace; empty: this one.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    if namespace:
        with open(NAMED / namespace) as there:
            enter(there.fileno())
    if refusing:
        sandbox.refuse(refusing)


def main() -> Any:
    # Control-C is for those who run the tests, and for what was forked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # All of them, as `twistd` asks for them; and no collection is to touch, and so to
    # copy, what those who are forked share.
    list(getPlugins(IServiceMaker))
    assert "twisted.internet.reactor" not in sys.modules
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    if Path(sys.argv[0]).name == "twist":
        return Twist.main(sys.argv)
    return twistd.run()


if __name__ == "__main__":
    sys.exit(main())

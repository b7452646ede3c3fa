"""A process that has imported what `twistd` does, and forks when a test wants one.

Starting an interpreter and importing Twisted costs half a second of CPU, which a
hundred and fifty tests would pay.  Whoever starts a relay (`process.relay`) asks
here instead: each request is one packet, the arguments with two descriptors, for what
the new process writes and for what becomes of it.  A nurse, forked as well, waits for
the process and tells its number, and then its exit status, a line each.

The reactor is not imported before the fork: `--reactor` chooses it.  That `twistd`
starts from nothing, `tests/tap/test_command_lines.py` and `tests/test_reactors.py`
show.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

from twisted.internet import posixbase
from twisted.scripts import twistd

from relayd.tap import relayd, socks4
from tests.support import sandbox

#: More than a request's arguments and environment.
REQUEST = 1 << 20

#: Imported for those who are forked.
__all__ = ["posixbase", "relayd", "socks4"]


def serve(asked: socket.socket) -> None:
    """Fork whatever is asked for.  Returns in each new process, and never in ours."""
    while True:
        data, (*descriptors,), *_ = socket.recv_fds(asked, REQUEST, 2)
        if not data:
            os._exit(0)
        if not os.fork():
            asked.close()
            break
        for descriptor in descriptors:
            os.close(descriptor)
        # Nurses that are done.
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    output, news = descriptors
    if pid := os.fork():
        os.close(output)
        os.write(news, b"%d\n" % pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(news, b"%d\n" % status)
        os._exit(0)
    os.close(news)
    become(output, **json.loads(data))


def become(
    output: int,
    argv: list[str],
    env: dict[str, str],
    cwd: str,
    refusing: dict[str, int],
) -> None:
    """Be as a process is that was just started, maybe in a sandbox."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    if refusing:
        sandbox.refuse(refusing)


def main() -> Any:
    assert "twisted.internet.reactor" not in sys.modules
    # Control-C is for those who run the tests, and for what was forked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
    return twistd.run()


if __name__ == "__main__":
    sys.exit(main())

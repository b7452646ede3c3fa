"""Checks in Python, for a command line: who is primary, and which replicas lag.

Patroni has an HTTP server beside each database (port 8008), which says what the
database is to the cluster.  Two relays, one to the primary and one to its replicas::

    export PYTHONPATH=examples
    twistd -n --pidfile= relayd --check python:replica_checks:primary \\
        --listen 5432 --dest 10.0.0.5:5432 --dest 10.0.0.6:5432
    twistd -n --pidfile= relayd --check python:replica_checks:replica \\
        --listen 5433 --dest 10.0.0.5:5432 --dest 10.0.0.6:5432

A check returns True (up), False (down) or a weight from 0 to 256; one that raises
counts as down, too.  The first could be `--check http://:8008/primary`; the second is
more than a status: the further a replica lags behind, the fewer sessions it gets.
PATRONI_PORT is another port than 8008.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

from twisted.internet.threads import deferToThread

PORT = int(os.environ.get("PATRONI_PORT", "8008"))

#: Seconds that a thread waits for an answer, and the most bytes of it.
TIMEOUT, MOST = 2, 65536

#: Bytes behind the primary at which a replica has half of its weight.
HALF = 1 << 20


async def _state(server: Any) -> Any:
    """What Patroni says of a server: a dictionary.

    :param server: as relayd gives it; `server.name` is its address, behind the name
        that the operator gave it, if any: `db1/10.0.0.5:5432`.
    """
    host = server.name.rpartition("/")[2].rpartition(":")[0]
    # A check must not block the relay: this waits in a thread.
    return await deferToThread(_get, host)


def _get(host: str) -> Any:
    with closing(HTTPConnection(host, PORT, timeout=TIMEOUT)) as connection:
        connection.request("GET", "/patroni")
        return json.loads(connection.getresponse().read(MOST))


async def primary(server: Any) -> bool:
    """Whether a server is the primary."""
    state = await _state(server)
    return bool(state["state"] == "running" and state["role"] in ("primary", "master"))


async def replica(server: Any) -> bool | int:
    """The weight of a replica; False for what is none."""
    state = await _state(server)
    if state["state"] != "running" or state["role"] != "replica":
        return False
    xlog = state["xlog"]
    lag = max(0, xlog["received_location"] - xlog["replayed_location"])
    return max(1, round(100 / (1 + lag / HALF)))

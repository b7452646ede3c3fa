"""Refuse clients of the networks in a list: BAN_LIST is its URL, http: or file:.
BAN_LIST=file:///etc/banned twistd -n --pidfile= relayd … --route ban_list:route"""

import os
from time import monotonic
from urllib.request import urlopen

from twisted.internet import defer, threads

from relayd.gates import RulesGate, parse_client_rule

URL, LOCK, BANS = os.environ["BAN_LIST"], defer.DeferredLock(), {"due": 0.0}


def read():  # in a thread; what it has read stays, even if its client has left
    with urlopen(URL, timeout=5) as answer:
        networks = answer.read().decode().split()
    BANS["gate"] = RulesGate(parse_client_rule(each, allow=False) for each in networks)


async def route(conn):
    if "gate" not in BANS or monotonic() >= BANS["due"]:
        async with LOCK:  # at first all wait; later one a minute, the others do not
            if monotonic() >= BANS["due"]:
                BANS["due"] = monotonic() + 60
                await threads.deferToThread(read)
    if "gate" not in BANS or BANS["gate"].decide(str(conn.client)).why:
        conn.refuse("banned" if "gate" in BANS else "the list was not read yet")
    return conn.pool()

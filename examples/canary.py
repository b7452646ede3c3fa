"""5 % of the clients go to the pool `canary`, and always the same ones.

    twistd -n --pidfile= relayd -l 8080 --route canary:route -d 10.0.0.5:80 \\
        -d 10.0.0.9:80,pool=canary -d 10.0.0.5:80,name=old,pool=canary,backup

While the canary is out, its clients go to the old server.
"""

from hashlib import blake2b

SHARE = 0.05


def place(host):
    """Where a client is among all, from 0 to 1: the same on every relay."""
    return int.from_bytes(blake2b(host.encode(), digest_size=8).digest()) / 2**64


async def route(conn):
    if place(conn.client.host) < SHARE:
        return conn.pool("canary")
    return conn.pool()

"""Capture the sessions of one client for Wireshark; those of all others are spliced.

    CAPTURE=192.0.2.7 twistd -n --pidfile= relayd -l 8080 -d 10.0.0.5:80 \\
        --route capture_one_client:route

The file is its owner's alone, and has 100 MiB at most; five old ones are kept.
"""

import os

CLIENT = os.environ["CAPTURE"]
FILE = os.environ.get("CAPTURE_FILE", "/var/tmp/one_client.pcapng")


async def route(conn):
    if conn.client.host == CLIENT:
        conn.filter("capture", file=FILE, size="100MiB", keep=5)
    return conn.pool()

"""Each tenant's TLS clients go to its own server, which a table in SQLite names.

sqlite3 tenants.db 'CREATE TABLE names (name PRIMARY KEY, tenant, server)'
sqlite3 tenants.db "INSERT INTO names VALUES ('a.example', 'a', '10.0.0.5:443')"
TENANTS=tenants.db twistd -n --pidfile= relayd -l 443 --route tenant_by_sni:route
"""

import os
import sqlite3
from contextlib import closing

from twisted.internet.threads import deferToThread

TABLE = f"file:{os.environ['TENANTS']}?mode=ro"
ASKED = "SELECT tenant, server FROM names WHERE name = ?"


def look_up(name):  # in a thread: the disk may be slow, the relay must not be
    with closing(sqlite3.connect(TABLE, uri=True, timeout=1)) as table:
        return table.execute(ASKED, [name]).fetchone()


async def route(conn):
    found = await deferToThread(look_up, await conn.sni())
    if found is None:
        conn.refuse("no tenant has this name")
    conn.facts["tenant"], server = found
    return conn.server(server)

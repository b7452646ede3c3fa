"""SSH, TLS and HTTP on one port, each to a pool of its own.

    twistd -n --pidfile= relayd --route several_protocols:route -l 443 \\
        -d 10.0.0.5:22,pool=ssh -d 10.0.0.6:443,pool=tls -d 10.0.0.7:80,pool=http

Who says nothing for two seconds is an SSH client that waits for its server.
"""

HTTP = {b"GET /", b"HEAD ", b"POST ", b"PUT /", b"DELET", b"OPTIO", b"PATCH", b"PRI *"}


async def route(conn):
    first = await conn.peek(5, wait=2)
    if first.startswith(b"\x16\x03"):
        return conn.pool("tls")
    if first in HTTP:
        return conn.pool("http")
    if first and not first.startswith(b"SSH-"):
        conn.refuse("neither SSH nor TLS nor HTTP")
    return conn.pool("ssh")
